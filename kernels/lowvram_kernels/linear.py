"""A matrix product whose weight is a master of another dtype; knows no layers and no quantised formats.

    y = x @ Wᵀ        dx = dy @ W        dW = dyᵀ @ x

The master is cast to x.dtype at each use and the copy dies at once: a run with fp32 masters and bf16
products never holds a second set of weights.
Saved for backward: x and the master itself.
Source: the chain rule; casting at use instead of keeping copies is this project's choice.

Shapes: N rows, O out, I in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.errors import ShapeError


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the textbook form; autograd of it is the gradient's truth."""
    return x @ weight.to(x.dtype).mT


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        needs_dx, needs_dweight = ctx.needs_input_grad
        dx = dy @ weight_OI.to(dy.dtype) if needs_dx else None
        if not needs_dweight:
            return dx, None
        dy_NO, x_NI = dy.reshape(-1, weight_OI.shape[0]), x.reshape(-1, weight_OI.shape[1])
        return dx, (dy_NO.mT @ x_NI).to(weight_OI.dtype)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x by the transposed weight, in x's dtype.

    x: [..., I].  weight: [O, I], a master of any floating dtype.  Returns [..., O] in x's dtype.
    dx comes in x's dtype, dweight in weight's.
    Saved for backward: x and the master; the cast copy is made again, never kept.
    Raises ShapeError if weight is not [O, I] or either is not floating.
    """
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ShapeError(f"linear: weight is {list(weight.shape)}; x {list(x.shape)} needs [O, I].")
    if not (x.dtype.is_floating_point and weight.dtype.is_floating_point):
        raise ShapeError(f"linear: x is {x.dtype}, weight {weight.dtype}; both must be floating.")
    if x.dtype == weight.dtype:
        return F.linear(x, weight)
    return _CastLinear.apply(x, weight)  # type: ignore[no-untyped-call]
