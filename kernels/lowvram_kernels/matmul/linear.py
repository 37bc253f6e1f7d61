"""A linear layer whose weight is a master of another dtype, multiplied in a format of `quant_linear.py`.

    y = x @ Wᵀ        dx = dy @ W        dW = dyᵀ @ x

The master is cast or quantised at each use and the copy is freed at once: a run with fp32 masters and bf16 products
never holds a second set of weights.
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
from lowvram_kernels.matmul.fp32_sums import leaves_of
from lowvram_kernels.matmul.quant_linear import (
    MatmulFormat,
    along_columns,
    along_rows,
    backward_input,
    backward_weight,
    check_matmul_format,
    forward,
    gradient_operands,
)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the textbook form; autograd of it is the gradient's truth."""
    return x @ weight.to(x.dtype).mT


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, matmul_format: MatmulFormat) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leaves = leaves_of(weight)
        ctx.matmul_format = matmul_format
        x_NI = x.reshape(-1, weight.shape[1])
        return forward(along_rows(x_NI, matmul_format), weight, matmul_format, x.dtype).view(
            *x.shape[:-1], weight.shape[0]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight_OI), matmul_format = ctx.saved_tensors, ctx.matmul_format
        if ctx.leaves is not None:
            (weight_OI,) = ctx.leaves
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        dy_NO, x_NI = dy.reshape(-1, weight_OI.shape[0]), x.reshape(-1, weight_OI.shape[1])
        dx = dweight = None
        rows, columns = gradient_operands(dy_NO, matmul_format, needs_dx, needs_dweight)
        if needs_dx:
            dx = backward_input(rows, weight_OI, matmul_format, dy.dtype).view(x.shape)
        del rows
        if needs_dweight:
            dweight = backward_weight(columns, along_columns(x_NI, matmul_format), weight_OI)
        return dx, dweight, None


def linear(x: Tensor, weight: Tensor, matmul_format: MatmulFormat = "plain") -> Tensor:
    """Multiply x by the transposed weight; the result comes in x's dtype.

    x: [..., I].  weight: [O, I], a master of any floating dtype.  matmul_format: the numbers that are multiplied, see
    `quant_linear.py`.  Returns [..., O] in x's dtype.
    dx comes in x's dtype, dweight in weight's.
    Saved for backward: x and the master; the cast copy is made again, never kept.
    Raises ShapeError if weight is not [O, I], either is not floating, or there is no such form.
    """
    check_matmul_format(matmul_format, "linear")
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ShapeError(f"linear: weight is {list(weight.shape)}; x {list(x.shape)} needs [O, I].")
    if not (x.dtype.is_floating_point and weight.dtype.is_floating_point):
        raise ShapeError(f"linear: x is {x.dtype}, weight {weight.dtype}; both must be floating.")
    if matmul_format == "plain" and x.dtype == weight.dtype:
        return F.linear(x, weight)
    return _CastLinear.apply(x, weight, matmul_format)  # type: ignore[no-untyped-call]
