"""SwiGLU and the down projection of a feed-forward block as one op.

    p = silu(gate) · up        y = p @ downᵀ        [gate | up] = gate_up, silu(z) = z·σ(z)

The products are made in a format of `quant_linear.py`.

    dp = dy @ down             ddown = dyᵀ @ p
    dup = dp · silu(gate)      dgate = dp · up · σ(gate)·(1 + gate·(1 − σ(gate)))

Saved for backward: gate_up and the master; silu and the product are computed again.
Source: Shazeer 2020, eq. 6; the gradient is its derivative.
On a card one launch gates, to codes where 8 bits are multiplied (`codes.py`), and one makes gate_up's gradient and the
product again; nothing else is allocated.  In compiled blocks torch.compile fuses the plain form.

Shapes: N rows, I inner width, D out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.dispatch import Launch, Tile, as_read, card_of, launch, runs_kernels
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers import codes
from lowvram_kernels.matmul.fp32_sums import leaves_of
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

# 16 numbers of each half a thread, two reads of 16 bytes.
TILE = Tile(4, 512, 512)


def reference(gate_up: Tensor, down: Tensor) -> Tensor:
    """Compute the textbook form; autograd of it is the gradient's truth."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up) @ down.to(gate_up.dtype).mT


def gated_product(gate_up: Tensor) -> Tensor:
    """Multiply silu of the first half by the second half.  gate_up: [..., 2I].  Returns [..., I]."""
    if has_kernels(gate_up):
        product = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _launch("swiglu_kernel", gate_up.contiguous(), product)
        return product
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def has_kernels(gate_up: Tensor) -> bool:
    """Say whether the Triton kernels gate; in compiled blocks the compiler does."""
    return gate_up.numel() > 0 and runs_kernels("swiglu", gate_up.device)


def _launch(kernel: str, *tensors: Tensor) -> None:
    """Launch a kernel whose last tensor is the product, [..., I]; all of them contiguous."""
    width = tensors[-1].shape[-1]
    rows = tensors[-1].numel() // width
    grid = (-(-rows // TILE.rows), -(-width // TILE.columns))
    constants = {"ROWS": TILE.rows, "COLUMNS": TILE.columns}
    arguments = (*map(as_read, tensors), rows, width)
    what = Launch("layers.swiglu_triton", kernel, grid, arguments, constants, TILE.warps)
    launch(what, moved=tensors)


def gated_product_backward(d_product: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate gated_product.  d_product: [..., I]; gate_up: [..., 2I].

    Returns the gradient of gate_up and the product itself, which comes for one multiplication more.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # Dynamo takes no view as `out`; the compiler makes this one pass by itself
        silu = F.silu(gate)
        return torch.cat([torch.ops.aten.silu_backward(d_product * up, gate), d_product * silu], dim=-1), silu * up
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    if has_kernels(gate_up):
        product = torch.empty_like(d_product, memory_format=torch.contiguous_format)
        _launch("swiglu_backward_kernel", d_product.contiguous(), gate_up.contiguous(), d_gate_up, product)
        return d_gate_up, product
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    torch.mul(d_product, silu, out=d_up)
    if card_of(d_gate_up.device).platform == "mps":  # its graphs do not promise that output may be input
        d_gate.copy_(torch.ops.aten.silu_backward(d_product * up, gate))
    else:
        torch.mul(d_product, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
    return d_gate_up, silu.mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down: Tensor, matmul_format: MatmulFormat) -> Tensor:
        ctx.save_for_backward(gate_up, down)
        ctx.leaves = leaves_of(down)
        ctx.matmul_format = matmul_format
        product: Operand
        if codes.gates_to_codes(gate_up, matmul_format):
            product = codes.gate_to_codes(gate_up.reshape(-1, gate_up.shape[-1]), matmul_format)
        else:
            product = along_rows(gated_product(gate_up).reshape(-1, down.shape[1]), matmul_format)
        return forward(product, down, matmul_format, gate_up.dtype).view(*gate_up.shape[:-1], down.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gate_up, down_DI), matmul_format = ctx.saved_tensors, ctx.matmul_format
        if ctx.leaves is not None:
            (down_DI,) = ctx.leaves
        needs_input, needs_down, _ = ctx.needs_input_grad
        dy_ND, d_gate_up = dy.reshape(-1, down_DI.shape[0]), None
        rows, columns = gradient_operands(dy_ND, matmul_format, needs_input, needs_down)
        if needs_input:
            d_product_NI = backward_input(rows, down_DI, matmul_format, dy.dtype)
            del rows
            d_gate_up, product = gated_product_backward(d_product_NI.view(*dy.shape[:-1], -1), gate_up)
            del d_product_NI
        else:
            product = gated_product(gate_up)
        if not needs_down:
            return d_gate_up, None, None
        product_NI = product.reshape(-1, down_DI.shape[1])
        return d_gate_up, backward_weight(columns, along_columns(product_NI, matmul_format), down_DI), None


def swiglu(gate_up: Tensor, down: Tensor, matmul_format: MatmulFormat = "plain") -> Tensor:
    """Gate, multiply and project down: (silu(gate) · up) @ downᵀ.

    gate_up: [..., 2I] fp32|bf16|fp16, the gate first.  down: [D, I], a master of any floating dtype, cast or
    quantised at use.  matmul_format: the numbers that are multiplied, see `quant_linear.py`.  Returns [..., D] in
    gate_up's dtype; silu is taken in fp32.  ddown comes in down's dtype.
    Saved for backward: gate_up and the master.
    Raises ShapeError if gate_up's last is not twice down's, or either is not floating.
    Source: Shazeer 2020, eq. 6.
    """
    check_matmul_format(matmul_format, "swiglu")
    if gate_up.dim() < 1 or down.dim() != 2 or gate_up.shape[-1] != 2 * down.shape[1]:
        shapes = f"gate_up is {list(gate_up.shape)}, down {list(down.shape)}"
        raise ShapeError(f"swiglu: {shapes}; they need [..., 2I] and [D, I].")
    if not (gate_up.dtype.is_floating_point and down.dtype.is_floating_point):
        raise ShapeError(f"swiglu: gate_up is {gate_up.dtype}, down {down.dtype}; both must be floating.")
    return _SwiGLU.apply(gate_up, down, matmul_format)  # type: ignore[no-untyped-call]
