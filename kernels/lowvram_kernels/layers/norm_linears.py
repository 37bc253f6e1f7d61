"""RMSNorm and the projections that read it as one op, so that the normalised rows are never stored.

    n = rms_norm(x)        y_i = n @ W_iᵀ        in a format of `quant_linear.py`
    dn = Σ_i dy_i @ W_i    dW_i = dy_iᵀ @ n    dx, dweight as in rms_norm

A norm costs a pass over memory; keeping its result costs 2 bytes × D a row and layer in bf16, a sixth of a dense
block's activations.  So backward computes n again from x and the kept fp32 of each row: on a card in the pass that
makes dx, where n takes dn's place.  In E4M3, of which only codes are read, n is never written: forward and backward
write its codes (`codes.py`).
Saved for backward: x, one fp32 per row, and the masters.
Source: the chain rule; not keeping what is cheap to compute again is Chen et al. 2016, applied to one op.

Shapes: N rows, D width, O outputs of one projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers import codes
from lowvram_kernels.layers import rms_norm as norm
from lowvram_kernels.matmul.fp32_sums import leaves_of
from lowvram_kernels.matmul.kept_casts import joined
from lowvram_kernels.matmul.kept_codes import joined_codes
from lowvram_kernels.matmul.quant_linear import (
    MatmulFormat,
    Operand,
    along_columns,
    along_rows,
    backward_input,
    backward_weight,
    check_matmul_format,
    forward,
    gradient_operands,
)
from lowvram_kernels.matmul.scaled_matmul import scaled_matmul
from lowvram_kernels.quant.both_ways import quantise_beside
from lowvram_kernels.quant.quantise import QuantTensor


def reference(x: Tensor, weight: Tensor, projections: list[Tensor], eps: float = 1e-6) -> list[Tensor]:
    """Compute the textbook form; autograd of it is the gradient's truth."""
    normed = norm.reference(x, weight, eps)
    return [normed @ projection.to(x.dtype).mT for projection in projections]


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        added: Tensor | None,
        weight: Tensor,
        eps: float,
        matmul_format: MatmulFormat,
        *projections: Tensor,
    ) -> tuple[Tensor, ...]:
        operand: Operand
        if codes.norms_to_codes(x, matmul_format):
            operand, rstd_N1, stream = codes.normalise_to_codes(x, weight, eps, matmul_format, added)
        else:
            normed, rstd_N1, stream = norm.normalise(x, weight, eps, added=added)
            operand = along_rows(normed.reshape(-1, x.shape[-1]), matmul_format)
            del normed
        ctx.save_for_backward(stream, weight, rstd_N1, *projections)
        ctx.leaves = leaves_of(weight, *projections)
        ctx.matmul_format = matmul_format
        ctx.set_materialize_grads(False)
        whole = _product_of_all(operand, projections, x.dtype)
        if whole is not None:
            return stream, *whole.view(*x.shape[:-1], -1).split([p.shape[0] for p in projections], -1)
        ys = [forward(operand, p, matmul_format, x.dtype).view(*x.shape[:-1], p.shape[0]) for p in projections]
        return stream, *ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, weight, rstd_N1, *projections), matmul_format = ctx.saved_tensors, ctx.matmul_format
        if ctx.leaves is not None:
            weight, *projections = ctx.leaves
        needs_x, needs_added, needs_dweight, _, _, *needs_projections = ctx.needs_input_grad
        needs_dx = needs_x or needs_added
        if all(dy is None for dy in given):
            return d_stream, d_stream if needs_added else None, *(None for _ in ctx.needs_input_grad[2:])
        dys = [
            x.new_zeros(rstd_N1.shape[0], projection.shape[0]) if dy is None else dy.reshape(-1, dy.shape[-1])
            for dy, projection in zip(given, projections, strict=True)
        ]
        needs = needs_dx, needs_dweight
        if any(needs) and any(needs_projections) and norm.has_kernels(x):
            # One pass makes the norm's gradient and its rows again, which take the place of their gradient.
            rows, columns = _gradient_operands(dys, projections, needs_projections, matmul_format)
            dn_ND = _sum_inputs(rows, projections, matmul_format, x.dtype)
            del rows
            is_coded = matmul_format == "e4m3" and codes.norms_to_codes(x, matmul_format)
            normed_ND = None if is_coded else dn_ND
            dx, dweight = norm.gradients_on_card(dn_ND, x, weight, rstd_N1, needs, d_stream, normed=normed_ND)
            del dn_ND
            if normed_ND is None:
                operand: Operand = codes.normed_columns(x, weight, rstd_N1)
            else:
                operand = along_columns(normed_ND, matmul_format)
            d_projections = _weight_gradients(columns, operand, projections, needs_projections)
            return dx if needs_x else None, dx if needs_added else None, dweight, None, None, *d_projections
        d_projections = [None] * len(projections)
        if any(needs_projections):
            normed_ND = norm.normalise(x, weight, 0.0, rstd_N1).y.reshape(-1, x.shape[-1])
            columns = [along_columns(dy, matmul_format) for dy in dys]
            operand = along_columns(normed_ND, matmul_format)
            d_projections = _weight_gradients(columns, operand, projections, needs_projections)
            del normed_ND, columns, operand
        if not any(needs):
            return None, None, None, None, None, *d_projections
        dn_ND = _sum_inputs([along_rows(dy, matmul_format) for dy in dys], projections, matmul_format, x.dtype)
        dx, dweight = norm.gradients(dn_ND, x, weight, rstd_N1, needs, d_stream)
        return dx if needs_x else None, dx if needs_added else None, dweight, None, None, *d_projections


def _product_of_all(operand: Operand, projections: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return the outputs of all projections as one matrix [N, Σ O]; None where their kept copies are not joined."""
    if isinstance(operand, QuantTensor):
        codes = joined_codes(projections)
        return None if codes is None else scaled_matmul(operand, codes, dtype)
    whole = joined(projections, dtype)
    return None if whole is None else F.linear(operand, whole)


def _gradient_operands(
    dys: list[Tensor], projections: list[Tensor], needed: Sequence[bool], matmul_format: MatmulFormat
) -> tuple[list[Operand], list[Operand]]:
    """Return the gradients along their rows and along their columns.

    Where the turned codes of the projections are kept as one matrix, the rows are one operand too: side by side.
    """
    if joined_codes(projections, transposed=True) is not None:
        whole, columns = quantise_beside(dys)
        return [whole], list(columns)
    pairs = [gradient_operands(dy, matmul_format, True, needs) for dy, needs in zip(dys, needed, strict=True)]
    return [rows for rows, _ in pairs], [columns for _, columns in pairs]


def _weight_gradients(
    columns: list[Operand], operand: Operand, projections: list[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    return [
        backward_weight(dy, operand, projection) if is_needed else None
        for dy, projection, is_needed in zip(columns, projections, needed, strict=True)
    ]


def _sum_inputs(
    rows: list[Operand], projections: list[Tensor], matmul_format: MatmulFormat, dtype: torch.dtype
) -> Tensor:
    """Return the gradient of the normalised rows, which all projections read: [N, D], contiguous.

    rows: one operand for each projection, or one of all of them beside each other.
    """
    if len(rows) < len(projections):
        whole, codes = rows[0], joined_codes(projections, transposed=True)
        assert isinstance(whole, QuantTensor), "only codes are joined"
        assert codes is not None, "rows lie beside each other because these exist"
        return scaled_matmul(whole, codes, dtype)
    dn_ND = None
    for row, projection in zip(rows, projections, strict=True):
        dn_ND = backward_input(row, projection, matmul_format, dtype, dn_ND)
    assert dn_ND is not None, "there is a projection"
    return dn_ND


def norm_linears(
    x: Tensor,
    weight: Tensor,
    projections: list[Tensor],
    eps: float = 1e-6,
    matmul_format: MatmulFormat = "plain",
    added: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Normalise the rows of x, or of x + added, as rms_norm does and multiply them by each transposed projection.

    x: [..., D] fp32|bf16|fp16.  weight: [D].  projections: [O_i, D] each, masters of any floating dtype, cast or
    quantised at use.  matmul_format: the numbers that are multiplied, see `quant_linear.py`.  added: of x's shape and
    dtype.  Returns the stream, x or x + added, and one [..., O_i] in x's dtype per projection; these are views of one
    tensor where the kept casts of the projections are joined.  Who goes on with the stream that is returned has its
    gradient added in the norm's own pass.  Gradients come in their arguments' dtypes.
    Saved for backward: the stream, one fp32 per row, the masters; the normalised rows are computed again.
    Raises ShapeError if weight is not [D], a projection is not [O, D], there is none, or a dtype does not fit.
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    norm.check(x, weight)
    if added is not None:
        norm.check_added(x, added)
    check_matmul_format(matmul_format, "norm_linears")
    wrong = [p for p in projections if p.dim() != 2 or p.shape[1] != x.shape[-1] or not p.dtype.is_floating_point]
    if wrong or not projections:
        shapes = [f"{list(p.shape)} {p.dtype}" for p in projections]
        raise ShapeError(f"norm_linears: projections are {shapes}; x {list(x.shape)} needs floating [O, D].")
    stream, *ys = _NormLinears.apply(x, added, weight, eps, matmul_format, *projections)  # type: ignore[no-untyped-call]
    return stream, ys
