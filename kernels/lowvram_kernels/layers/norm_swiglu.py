"""RMSNorm and a whole SwiGLU layer behind it as one op, where in E4M3 no gradient between its parts is written out.

    n = rms_norm(x)        [gate | up] = n @ gate_upᵀ        y = (silu(gate) · up) @ downᵀ

It is `norm_linears` and `swiglu` in a row, with their gradients.  Where E4M3 is multiplied on a card and x has 16 bits,
the gradient of [gate | up], the largest of a layer, is read by two products alone: the kernel that makes it writes
their operands in the place of numbers.
Saved for backward: x, one fp32 per row, [gate | up] and the masters, as by the two ops.
Alive in backward: less than in that of `swiglu`, since codes take the place of the gradient and of the product.

Shapes: N rows, D width, I inner width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram_kernels.layers import codes
from lowvram_kernels.layers import norm_linears as joined_ops
from lowvram_kernels.layers import rms_norm as norm
from lowvram_kernels.layers import swiglu as gating
from lowvram_kernels.matmul.fp32_sums import leaves_of
from lowvram_kernels.matmul.quant_linear import (
    MatmulFormat,
    backward_input,
    backward_weight,
    forward,
    gradient_operands,
)
from lowvram_kernels.quant.quantise import BLOCK


def reference(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute the textbook form; autograd of it is the gradient's truth."""
    (projected,) = joined_ops.reference(x, weight, [gate_up], eps)
    return gating.reference(projected, down)


class _NormSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, gate_up: Tensor, down: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        operand, rstd_N1, stream = codes.normalise_to_codes(x, weight, eps, "e4m3", added)
        projected_N2I = forward(operand, gate_up, "e4m3", x.dtype)
        del operand
        ctx.save_for_backward(stream, weight, rstd_N1, projected_N2I, gate_up, down)
        ctx.leaves = leaves_of(weight, gate_up, down)
        ctx.set_materialize_grads(False)
        y = forward(codes.gate_to_codes(projected_N2I, "e4m3"), down, "e4m3", x.dtype)
        return stream, y.view(x.shape[:-1] + down.shape[:1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, needs_added = ctx.needs_input_grad[:2]
        if dy is None:
            return d_stream, d_stream if needs_added else None, None, None, None, None
        x, weight, rstd_N1, projected_N2I, gate_up, down = ctx.saved_tensors
        if ctx.leaves is not None:
            weight, gate_up, down = ctx.leaves
        rows, columns = gradient_operands(dy.reshape(-1, down.shape[0]), "e4m3")
        d_product_NI = backward_input(rows, down, "e4m3", dy.dtype)
        del rows
        d_rows, d_columns, product = codes.gate_to_codes_backward(projected_N2I, d_product_NI)
        del d_product_NI
        d_down = backward_weight(columns, product, down)
        del columns, product
        dn_ND = backward_input(d_rows, gate_up, "e4m3", dy.dtype)
        del d_rows
        needs = needs_x or needs_added, True
        dx, d_weight = norm.gradients_on_card(dn_ND, x, weight, rstd_N1, needs, d_stream)
        del dn_ND
        d_gate_up = backward_weight(d_columns, codes.normed_columns(x, weight, rstd_N1), gate_up)
        return dx if needs_x else None, dx if needs_added else None, d_weight, d_gate_up, d_down, None


def norm_swiglu(
    x: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    eps: float = 1e-6,
    matmul_format: MatmulFormat = "plain",
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise the rows of x, or of x + added, and pass them through a SwiGLU layer.

    x, added: [..., D] of one dtype fp32|bf16|fp16.  weight: [D].  gate_up: [2I, D], the gate first; down: [D, I]:
    masters of any floating dtype.  matmul_format: see `quant_linear.py`.  Returns the stream, x or x + added, and
    [..., D] in x's dtype.  Gradients come in their arguments' dtypes.
    Saved for backward: the stream, one fp32 per row, gate_up's product, the masters.
    Raises ShapeError as `norm_linears` and `swiglu` do.
    Source: Zhang & Sennrich 2019, eq. 4; Shazeer 2020, eq. 6.
    """
    if not _writes_codes(x, weight, gate_up, down, matmul_format, added):
        stream, (projected,) = joined_ops.norm_linears(x, weight, [gate_up], eps, matmul_format, added)
        return stream, gating.swiglu(projected, down, matmul_format)
    stream, y = _NormSwiGLU.apply(x, added, weight, gate_up, down, eps)  # type: ignore[no-untyped-call]
    return stream, y


def _writes_codes(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, matmul_format: MatmulFormat, added: Tensor | None
) -> bool:
    """Say whether the one op computes: of a layer that learns, and whose shapes the other two would not refuse."""
    learns = torch.is_grad_enabled() and all(tensor.requires_grad for tensor in (weight, gate_up, down))
    if matmul_format != "e4m3" or not learns or x.dtype == torch.float32 or not codes.norms_to_codes(x, "e4m3"):
        return False
    fits = gate_up.dim() == down.dim() == 2 and gate_up.shape == (2 * down.shape[1], x.shape[-1])
    fits = fits and down.shape[0] == x.shape[-1] and down.shape[1] % BLOCK == 0 and weight.shape == x.shape[-1:]
    return fits and (added is None or (added.shape == x.shape and added.dtype == x.dtype))
