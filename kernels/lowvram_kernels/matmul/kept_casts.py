"""Copies of weights in the dtype of the products, made once for all micro-batches of a step.

Without them each use of an fp32 master casts it anew: twice for each weight and micro-batch.  They cost 2 bytes for
each number of the weights that have one, and never differ from a cast at use, so no result changes; where projections
of the same rows are joined, one product makes all of them, up to rounding the same.  Compiled code does not read them.
Of weights that are multiplied in 8 bits their codes are kept instead: see `kept_codes.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from lowvram_kernels.matmul.kept_codes import KeptCodes

_copies: dict[Tensor, Tensor] = {}
_joined: dict[tuple[Tensor, ...], Tensor] = {}


class KeptCasts:
    """The copies of some weights.

    weights: masters; those that have the dtype already get no copy.  joined: groups of them that multiply the same
    rows, whose copies lie below each other as one matrix.  codes: those kept of other weights, refreshed and used with
    the copies.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        dtype: torch.dtype,
        joined: Iterable[tuple[Tensor, ...]] = (),
        codes: KeptCodes | None = None,
    ) -> None:
        self._codes = codes
        self._copy_of: dict[Tensor, Tensor] = {}
        self._joined: dict[tuple[Tensor, ...], Tensor] = {}
        for group in joined:
            if group and all(weight.dtype != dtype for weight in group):
                outputs = [weight.shape[0] for weight in group]
                whole = torch.empty(sum(outputs), group[0].shape[1], dtype=dtype, device=group[0].device)
                self._joined[group] = whole
                self._copy_of |= dict(zip(group, whole.split(outputs), strict=True))
        for weight in weights:
            if weight.dtype != dtype and weight not in self._copy_of:
                self._copy_of[weight] = torch.empty_like(weight, dtype=dtype, requires_grad=False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights again, after they have changed: few launches on a card, whatever their number."""
        if self._copy_of:
            torch._foreach_copy_(list(self._copy_of.values()), list(self._copy_of))
        if self._codes is not None:
            self._codes.refresh()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let ops inside read the copies."""
        global _copies, _joined
        before = _copies, _joined
        _copies, _joined = self._copy_of, self._joined
        try:
            with self._codes.in_use() if self._codes is not None else nullcontext():
                yield
        finally:
            _copies, _joined = before


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight in dtype: itself if it has that dtype, else its kept copy, else a new one."""
    copy = kept(weight, dtype)
    return weight.to(dtype) if copy is None else copy


def kept(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the copy of a weight in dtype that is in use; None where there is none."""
    # Dynamo must not see the copies: it would take those of one block for the next one, which has the same code.
    if torch.compiler.is_compiling() or not _copies:
        return None
    copy = _copies.get(weight)
    return copy if copy is not None and copy.dtype == dtype else None


def joined(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return the copies in use of several weights as one matrix, [sum of outputs, I]; None where there is none."""
    if torch.compiler.is_compiling() or not _joined:
        return None
    whole = _joined.get(tuple(weights))
    return whole if whole is not None and whole.dtype == dtype else None
