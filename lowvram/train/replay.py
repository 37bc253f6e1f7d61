"""Repeats steps of a run with the trainer's own step, and compares what comes out bit by bit; writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.config.plan import Plan
from lowvram.errors import MemoryRanOutError
from lowvram.storage.checkpoint import Checkpoint
from lowvram.storage.tensor_files import MappedTensors
from lowvram.train.compilation import forget_compiled
from lowvram.train.events import Event, Halved, Saved, StepDone
from lowvram.train.state import is_healthy
from lowvram.train.trainer import Trainer
from lowvram.units import count_of

# Numbers whose difference is taken at once: 8 MiB in fp64.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor of a checkpoint differs from the one that was computed again.

    differing: how many of its `size` numbers.  greatest: the greatest difference, None where the two have other shapes
    or types, or one of them is missing.  scale: the greatest magnitude in the checkpoint's tensor.
    """

    name: str
    differing: int
    size: int
    greatest: float | None
    scale: float

    def describe(self) -> str:
        """Return a sentence about it."""
        if self.greatest is None:
            return f"{self.name} is missing, or has another shape or type."
        much = f"{self.differing:,} of its {self.size:,} numbers differ, by at most {self.greatest:.3g}"
        return f"{self.name}: {much}; its greatest number is {self.scale:.3g}."


@dataclass
class Replay(Trainer):
    """A trainer that repeats steps: it takes no lock, saves nothing and does not halve its micro-batch."""

    @property
    def conditions(self) -> dict[str, Any]:
        """What changes the last bits, as a checkpoint would hold it if it were saved here."""
        return self._conditions()

    def begin(self, checkpoint: Checkpoint | None) -> Path | None:
        """Take a checkpoint's state, or that of a new run; return whose weights a new run begins with."""
        if checkpoint is None:
            return self._begin_anew()[0]
        self.state.check(checkpoint)
        self._take_first_scale()
        self._restore(checkpoint)
        # A run that went back in these steps does so again when they are repeated.
        self._healthy_step = checkpoint.step if is_healthy(checkpoint.numbers()) else None
        return None

    def repeat(self, last: int, plan_of: Callable[[int], Plan]) -> Iterator[StepDone]:
        """Make the steps up to `last`; plan_of: the plan of each step, counted from 1.

        Raises MemoryRanOutError where a step does not fit as it is.
        """
        self._start_clock()
        try:
            while self.state.step < last:
                self._use(plan_of(self.state.step + 1))
                yield from _only_steps(self._advance())
            yield from _only_steps(self._read_step())
        except MemoryRanOutError as error:
            raise self._explain_memory() from error

    def _use(self, plan: Plan) -> None:
        if plan == self.plan:
            return
        self.drop_graphs()
        if not plan.keep_casts:
            self.state.model.kept_casts = None
        if self.plan.compile:
            forget_compiled()
        self.plan = plan

    def _save(self) -> Iterator[Saved]:
        yield from ()

    def _reload(self) -> None:
        return None

    def _halve(self) -> Halved:
        raise self._explain_memory()

    def _explain_memory(self) -> MemoryRanOutError:
        return MemoryRanOutError(
            f"Memory ran out when step {self.state.step + 1} was repeated.",
            f"It was made with {count_of(self.plan.micro_batch, 'sequence')} at a time; fewer give other last bits.",
            "Close what else uses the memory (perhaps the run itself, which still trains) and type the command again.",
        )


def _only_steps(events: Iterator[Event]) -> Iterator[StepDone]:
    yield from (event for event in events if isinstance(event, StepDone))


def differing_tensors(found: dict[str, Tensor], expected: MappedTensors) -> Iterator[TensorDifference]:
    """Yield each tensor in which a bit differs, in the order of `found`; those that only `expected` has come last.

    found: what was computed.  expected: what a checkpoint holds.
    """
    names = set(expected.names())
    for name, tensor in found.items():
        difference = compare_bits(name, tensor, expected.read(name) if name in names else None)
        if difference is not None:
            yield difference
    for name in sorted(names - found.keys()):
        yield TensorDifference(name, 0, 0, None, 0.0)


def compare_bits(name: str, found: Tensor, expected: Tensor | None) -> TensorDifference | None:
    """Return how two tensors differ, None where every bit is equal: -0 and 0 are not, a NaN and itself are."""
    if expected is None or found.shape != expected.shape or found.dtype != expected.dtype:
        return TensorDifference(name, 0, found.numel(), None, 0.0)
    found, expected = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in (found, expected))
    if torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
        return None
    differing, greatest, scale = 0, 0.0, 0.0
    for new, old in zip(found.split(_AT_ONCE), expected.split(_AT_ONCE), strict=True):
        is_other = (new.view(torch.uint8) != old.view(torch.uint8)).view(-1, new.element_size()).any(1)
        differing += int(is_other.sum())
        numbers = old.double()
        greatest = max(greatest, float((new.double() - numbers).abs().nan_to_num(torch.inf).max()))
        scale = max(scale, float(numbers.abs().nan_to_num(torch.inf).max()))
    return TensorDifference(name, differing, found.numel(), greatest, scale)
