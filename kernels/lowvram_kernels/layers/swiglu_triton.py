"""Triton kernels of silu(gate) · up and of its gradient: each number is read once and written once, in fp32 between."""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(−x)); 0, and not NaN, where exp(−x) overflows."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def swiglu_kernel(gate_up_ptr, product_ptr, N, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """product [N, width] = silu(gate) · up of gate_up [N, 2·width]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < width)[None, :]
    at = gate_up_ptr + row[:, None] * (2 * width) + column[None, :]
    gate, up = load_fp32(at, inside), load_fp32(at + width, inside)
    store_nearest(product_ptr + row[:, None] * width + column[None, :], gate * sigmoid(gate) * up, inside)


@triton.jit
def swiglu_backward_kernel(
    d_product_ptr, gate_up_ptr, d_gate_up_ptr, product_ptr, N, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """d_gate_up [N, 2·width] from d_product [N, width]; and the product itself again, unless its pointer is None."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < width)[None, :]
    narrow, wide = row[:, None] * width + column[None, :], row[:, None] * (2 * width) + column[None, :]
    gate, up = load_fp32(gate_up_ptr + wide, inside), load_fp32(gate_up_ptr + wide + width, inside)
    d_product = load_fp32(d_product_ptr + narrow, inside)
    slope = sigmoid(gate)
    silu = gate * slope
    store_nearest(d_gate_up_ptr + wide, d_product * up * (slope + silu * (1.0 - slope)), inside)
    store_nearest(d_gate_up_ptr + wide + width, d_product * silu, inside)
    if product_ptr is not None:
        store_nearest(product_ptr + narrow, silu * up, inside)
