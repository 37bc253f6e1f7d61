"""A step's numbers on their way from the device to the host, and the pace of the steps; knows no loop.

A host that waited for a step's numbers would launch the next step to an idle card.  So on CUDA they are copied while
the card goes on, and read when the next step has been launched.
"""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import torch
from torch import Tensor


class LateRead:
    """A vector that is being copied to the host.  Only CUDA copies while the host goes on; elsewhere reading waits."""

    def __init__(self, vector: Tensor) -> None:
        self._vector, self._copied = vector, None
        if vector.is_cuda:
            self._vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._vector.copy_(vector, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def values(self) -> list[float]:
        """Return the numbers; waits until they have come."""
        if self._copied is not None:
            self._copied.synchronize()
        return [float(number) for number in self._vector.tolist()]


class Launched(NamedTuple):
    """A step that was launched.

    step, tokens: those done when it ends.  stats: see `StepStats`.  limit: the loss above which it is a spike.
    is_void: the run has gone back since, so that the step teaches nothing.
    """

    step: int
    tokens: int
    learning_rate: float
    stats: LateRead
    limit: float
    is_void: bool = False


# A step that lasts so many times the usual one, and so many seconds longer, did not compute all the time: the process
# was stopped, or the computer asleep.
_MOST_TIMES, _MOST_LONGER_S = 4.0, 3.0
# So many steps tell what is usual.
_USUAL_STEPS = 3


class Pace:
    """The speed of the last steps, whatever else the run does between them.

    A time in which the process was stopped or the computer slept does not count; it is recognised by a step that lasts
    far longer than those before it.  Where steps stay so long, they count from the second one on.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []
        self._speed: float | None = None

    def begin(self, tokens: int) -> None:
        """Begin anew, with so many tokens done: what came before must not count."""
        self._marks = [(time.monotonic(), tokens)]

    def measure(self, tokens: int) -> float:
        """Return the tokens per second of the last twenty steps; tokens: those done now."""
        mark = (time.monotonic(), tokens)
        if self._speed is not None and self._was_away(mark[0]):
            self._marks = [mark]
            return self._speed
        self._marks = [*self._marks[-20:], mark]
        (began, tokens_then), (now, tokens_now) = self._marks[0], self._marks[-1]
        self._speed = (tokens_now - tokens_then) / max(1e-9, now - began)
        return self._speed

    def _was_away(self, now: float) -> bool:
        times = [mark[0] for mark in self._marks]
        steps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
        if len(steps) < _USUAL_STEPS:
            return False
        usual_s, last_s = steps[len(steps) // 2], now - times[-1]
        return last_s > _MOST_TIMES * usual_s and last_s > usual_s + _MOST_LONGER_S


def on_its_way(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device; on CUDA the host waits neither for the copy nor for what the card has to do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
