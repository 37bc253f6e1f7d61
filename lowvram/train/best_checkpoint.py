"""Which checkpoint of a run was best in validation, so that retention keeps it; reads no file and deletes none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# The key under which a checkpoint's numbers hold the last validation before it: its step and its bits per byte.
KEY = "valid"


class BestCheckpoint(NamedTuple):
    """A checkpoint's step, and the bits per byte of the last validation before it."""

    step: int
    bits_per_byte: float


def read_validation(numbers: Mapping[str, Any]) -> tuple[int, float] | None:
    """Return the step and the bits per byte of the last validation before a checkpoint; None where there was none."""
    match numbers.get(KEY):
        case [int(step), float(bits)]:
            return step, bits
    return None


def better_of(best: BestCheckpoint | None, step: int, numbers: Mapping[str, Any]) -> BestCheckpoint | None:
    """Return the better of the best checkpoint so far and that of `step`; of equals the one that was saved first.

    numbers: those of the checkpoint; one without a finite validation is never better.
    """
    found = read_validation(numbers)
    if found is None or not math.isfinite(found[1]) or (best is not None and found[1] >= best.bits_per_byte):
        return best
    return BestCheckpoint(step, found[1])


def best_of(numbers_by_step: Iterable[tuple[int, Mapping[str, Any]]]) -> BestCheckpoint | None:
    """Return the best of several checkpoints, whatever their order; None where none was validated."""
    best: BestCheckpoint | None = None
    for step, numbers in sorted(numbers_by_step, key=lambda each: each[0]):
        best = better_of(best, step, numbers)
    return best
