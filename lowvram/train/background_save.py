"""Writes a checkpoint in a thread beside training, from a copy of the state; knows no loop and no run directory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
from torch import Tensor

from lowvram.config.run import LEAST_COPIED_BYTES
from lowvram.storage.checkpoint import Checkpoint
from lowvram.storage.tensor_files import size_of_tensors
from lowvram.train.state import TrainState

# Host memory that must stay free beside the copy: less would let the system swap, which costs more than a wait.
_LEFT_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds of a training state: its tensors by name, and its plain values."""

    weights: dict[str, Tensor]
    states: dict[str, Tensor]
    numbers: dict[str, Any]

    @property
    def step(self) -> int:
        """The steps that were done."""
        return int(self.numbers["step"])

    @property
    def size_bytes(self) -> int:
        """The bytes of all tensors."""
        return size_of_tensors(self.weights, self.states)

    def copy(self) -> Snapshot:
        """Return a copy in host memory, which later steps do not change."""
        weights, states = (
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
            for tensors in (self.weights, self.states)
        )
        return Snapshot(weights, states, copy.deepcopy(self.numbers))


def take_snapshot(state: TrainState, **further: Any) -> Snapshot:
    """Return the state as it is now, whose tensors are the state's own.  further: more plain values to save."""
    weights, states = state.tensors()
    return Snapshot(weights, states, state.numbers() | further)


def may_copy(size_bytes: int) -> bool:
    """Say whether a checkpoint is worth a copy in host memory, and whether there is room for one."""
    return size_bytes >= LEAST_COPIED_BYTES and psutil.virtual_memory().available >= size_bytes + _LEFT_FREE_BYTES


class BackgroundSave:
    """At most one save in progress, in a thread of its own.  Ending the process waits for it; `kill -9` does not."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._future: Future[Checkpoint] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a save was begun and its result not yet taken."""
        return self._future is not None

    @property
    def has_ended(self) -> bool:
        """Whether there is a result to take, or an error."""
        return self._future is not None and self._future.done()

    def begin(self, write: Callable[[], Checkpoint]) -> None:
        """Let the thread call `write`."""
        assert self._future is None, "the result of the save before must be taken first"
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._future = self._thread.submit(write)

    def take(self) -> Checkpoint:
        """Wait for the save, and return its checkpoint or raise its error."""
        assert self._future is not None, "no save was begun"
        future, self._future = self._future, None
        return future.result()

    def close(self) -> None:
        """Wait for a save in progress, so that nobody writes where the run's lock is given back; end the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
