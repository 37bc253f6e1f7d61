"""Copies of weights in the dtype of the products, made once for all micro-batches of a step.

Without them each use of an fp32 master casts it anew: twice for each weight and micro-batch.  They cost 2 bytes for
each number of the weights that have one, and never differ from a cast at use, so no result changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_copies: dict[Tensor, Tensor] = {}


class KeptCasts:
    """The copies of some weights.  weights: masters; those that have the dtype already get no copy."""

    def __init__(self, weights: Iterable[Tensor], dtype: torch.dtype) -> None:
        self._copy_of = {
            weight: torch.empty_like(weight, dtype=dtype, requires_grad=False)
            for weight in weights
            if weight.dtype != dtype
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights again, after they have changed: few launches on a card, whatever their number."""
        if self._copy_of:
            torch._foreach_copy_(list(self._copy_of.values()), list(self._copy_of))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let ops inside read the copies."""
        global _copies
        before, _copies = _copies, self._copy_of
        try:
            yield
        finally:
            _copies = before


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in dtype: itself if it has that dtype, else its kept copy, else a new one."""
    copy = kept(weight, dtype)
    return weight.to(dtype) if copy is None else copy


def kept(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the copy of a weight in dtype that is in use; None where there is none."""
    if not _copies or torch.compiler.is_compiling():
        return None
    copy = _copies.get(weight)
    return copy if copy is not None and copy.dtype == dtype else None
