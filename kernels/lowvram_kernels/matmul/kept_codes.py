"""8-bit codes of weights, made once for all micro-batches of a step.

Without them each use of a master quantises it anew: as it lies for y = x Wᵀ, turned for dx = dy W, twice for each
weight and micro-batch.  Tensor cores take 8-bit operands only along what is summed, so both forms are kept, made from
one read: 2 bytes for each number, as a kept cast of 16 bits takes.  They never differ from codes made at use, so no
result changes; where E4M3 projections of the same rows are joined, one product makes all of them.  INT8 has a scale
for a whole row of the turned weight, so joining would change it.  Compiled code does not read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_kernels.quant.both_ways import quantise_weight_both_
from lowvram_kernels.quant.quantise import BLOCK, QuantTensor, new_weight, quantise_weight


class _Codes(NamedTuple):
    """The codes of a weight, as it lies, [O, I], and turned, [I, O]; after E those of a stack."""

    plain: QuantTensor
    turned: QuantTensor


# By group: the codes of all its weights as one matrix, where y may be views of one, and turned.
_Joined = dict[tuple[Tensor, ...], tuple[QuantTensor | None, QuantTensor]]
_codes: dict[Tensor, _Codes] = {}
_joined: _Joined = {}


class KeptCodes:
    """The codes of some weights.

    weights: masters of any floating dtype, matrices or stacks of them.  matmul_format: "e4m3" or "int8".  joined:
    groups of matrices that multiply the same rows; in E4M3 they lie below each other as one where all but the last have
    whole blocks of outputs, so that one product makes dx.  viewed: those of them whose y may be views of one, too.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        matmul_format: str,
        joined: Iterable[tuple[Tensor, ...]] = (),
        viewed: Iterable[tuple[Tensor, ...]] = (),
    ) -> None:
        self._format, self._viewed = matmul_format, set(viewed)
        self._codes: dict[Tensor, _Codes] = {}
        self._joined: _Joined = {}
        for group in joined:
            if matmul_format == "e4m3" and len(group) > 1 and not any(w.shape[0] % BLOCK for w in group[:-1]):
                self._join(group)
        for weight in weights:
            if weight not in self._codes:
                shapes = weight.shape, (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
                self._codes[weight] = _Codes(*(new_weight(shape, matmul_format, weight.device) for shape in shapes))

    def _join(self, group: tuple[Tensor, ...]) -> None:
        outputs, inputs, device = [weight.shape[0] for weight in group], group[0].shape[1], group[0].device
        plain = new_weight((sum(outputs), inputs), "e4m3", device)
        turned = new_weight((inputs, sum(outputs)), "e4m3", device)
        heights = [-(-height // BLOCK) for height in outputs]
        plains = zip(plain.code.split(outputs), plain.scale.split(heights), strict=True)
        turneds = zip(turned.code.split(outputs, 1), turned.scale.split(heights, 1), strict=True)
        for weight, one, other in zip(group, plains, turneds, strict=True):
            self._codes[weight] = _Codes(QuantTensor(*one), QuantTensor(*other))
        self._joined[group] = plain if group in self._viewed else None, turned

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights again, after they have changed."""
        for weight, codes in self._codes.items():
            quantise_weight_both_(weight, self._format, *codes)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let ops inside read the codes."""
        global _codes, _joined
        before = _codes, _joined
        _codes, _joined = self._codes, self._joined
        try:
            yield
        finally:
            _codes, _joined = before


def codes_of(weight: Tensor, matmul_format: str, transposed: bool = False) -> QuantTensor:
    """Return a weight's codes, as it lies or turned: those kept of it where they are in use, else new ones."""
    # Dynamo must not see the codes: it would take those of one block for the next one, which has the same code.
    kept = None if torch.compiler.is_compiling() or not _codes else _codes.get(weight)
    if kept is not None:
        found = kept.turned if transposed else kept.plain
        # Codes of a whole are strided where they are turned, and a product takes them as one: see `joined_codes`.
        if found.code.is_contiguous():
            return found
    return quantise_weight(weight, matmul_format, transposed)


def joined_codes(weights: Sequence[Tensor], transposed: bool = False) -> QuantTensor | None:
    """Return the codes in use of several weights as one matrix, [Σ O, I] or turned; None where there are none."""
    if torch.compiler.is_compiling() or not _joined:
        return None
    plain, turned = _joined.get(tuple(weights), (None, None))
    return turned if transposed else plain
