"""Normalisation and the projections that read it as one op, so that the normalised rows are never kept.

    n = rms_norm(x)        y_i = n @ W_iᵀ
    dn = Σ_i dy_i @ W_i    dW_i = dy_iᵀ @ n    dx, dweight as in rms_norm

A norm costs a pass over memory; keeping its result costs 2 bytes × D a row and layer in bf16, a sixth of a dense
block's activations.  So backward computes n again from x and the kept fp32 of each row.
Saved for backward: x, one fp32 per row, and the masters.
Source: the chain rule; not keeping what is cheap to compute again is Chen et al. 2016, applied to one op.

Shapes: N rows, D width, O outputs of one projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels import rms_norm as norm
from lowvram_kernels.errors import ShapeError


def reference(x: Tensor, weight: Tensor, projections: list[Tensor], eps: float = 1e-6) -> list[Tensor]:
    """Compute the textbook form; autograd of it is the gradient's truth."""
    normed = norm.reference(x, weight, eps)
    return [normed @ projection.to(x.dtype).mT for projection in projections]


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, *projections: Tensor) -> tuple[Tensor, ...]:
        rstd_N1 = norm.row_scales(x, eps)
        ctx.save_for_backward(x, weight, rstd_N1, *projections)
        normed = norm.apply_scales(x, rstd_N1, weight)
        return tuple(F.linear(normed, projection.to(x.dtype)) for projection in projections)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd_N1, *projections = ctx.saved_tensors
        needs_dx, needs_dweight, _, *needs_projections = ctx.needs_input_grad
        d_projections: list[Tensor | None] = [None] * len(projections)
        if any(needs_projections):
            normed_ND = norm.apply_scales(x, rstd_N1, weight).reshape(-1, x.shape[-1])
            for i, (dy, projection) in enumerate(zip(dys, projections, strict=True)):
                if needs_projections[i]:
                    d_projections[i] = (dy.reshape(-1, dy.shape[-1]).mT @ normed_ND).to(projection.dtype)
            del normed_ND
        if not (needs_dx or needs_dweight):
            return None, None, None, *d_projections
        dn_ND = torch.zeros((), dtype=x.dtype, device=x.device)
        for i, (dy, projection) in enumerate(zip(dys, projections, strict=True)):
            dy_NO = dy.reshape(-1, dy.shape[-1])
            matrix_OD = projection.to(x.dtype)
            dn_ND = torch.addmm(dn_ND, dy_NO, matrix_OD) if i else dy_NO @ matrix_OD
        dx, dweight = norm.gradients(dn_ND, x, weight, rstd_N1, (needs_dx, needs_dweight))
        return dx, dweight, None, *d_projections


def norm_linears(x: Tensor, weight: Tensor, projections: list[Tensor], eps: float = 1e-6) -> list[Tensor]:
    """Normalise the rows of x as rms_norm does and multiply them by each transposed projection.

    x: [..., D] fp32|bf16|fp16.  weight: [D].  projections: [O_i, D] each, masters of any floating dtype, cast at
    use.  Returns one [..., O_i] in x's dtype per projection.  Gradients come in their arguments' dtypes.
    Saved for backward: x, one fp32 per row, the masters; the normalised rows are computed again.
    Raises ShapeError if weight is not [D], a projection is not [O, D], there is none, or a dtype does not fit.
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    norm.check(x, weight)
    wrong = [p for p in projections if p.dim() != 2 or p.shape[1] != x.shape[-1] or not p.dtype.is_floating_point]
    if wrong or not projections:
        shapes = [f"{list(p.shape)} {p.dtype}" for p in projections]
        raise ShapeError(f"norm_linears: projections are {shapes}; x {list(x.shape)} needs floating [O, D].")
    return list(_NormLinears.apply(x, weight, eps, *projections))  # type: ignore[no-untyped-call]
