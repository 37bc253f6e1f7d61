"""Triton kernels of silu(gate) · up times the routing weight of each row, and of its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest
from lowvram_kernels.layers.swiglu_triton import sigmoid


@triton.jit
def weighted_swiglu_kernel(
    gate_up_ptr, weights_ptr, order_ptr, product_ptr, M, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """product [M, width] = weight · silu(gate) · up of gate_up [M, 2·width]; the weight is that of order's choice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < width)[None, :]
    weight = load_fp32(weights_ptr + tl.load(order_ptr + row, mask=row < M, other=0), row < M)
    at = gate_up_ptr + row[:, None] * (2 * width) + column[None, :]
    gate, up = load_fp32(at, inside), load_fp32(at + width, inside)
    product = gate * sigmoid(gate) * up * weight[:, None]
    store_nearest(product_ptr + row[:, None] * width + column[None, :], product, inside)


@triton.jit
def weighted_swiglu_backward_kernel(
    d_product_ptr,
    gate_up_ptr,
    weights_ptr,
    order_ptr,
    d_gate_up_ptr,
    d_weights_ptr,
    M,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """d_gate_up [M, 2·width] and d_weights from d_product [M, width], in whose place the product itself is written.

    d_weights lies in the order of the weights, one for each choice; None where it is not wanted.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    choice = tl.load(order_ptr + row, mask=row < M, other=0)
    weight = load_fp32(weights_ptr + choice, row < M)[:, None]
    d_weight = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < M)[:, None] & (column < width)[None, :]
        narrow, wide = row[:, None] * width + column[None, :], row[:, None] * (2 * width) + column[None, :]
        gate, up = load_fp32(gate_up_ptr + wide, inside), load_fp32(gate_up_ptr + wide + width, inside)
        d_weighted = load_fp32(d_product_ptr + narrow, inside)
        slope = sigmoid(gate)
        silu = gate * slope
        d_weight += tl.sum(d_weighted * silu * up, 1)
        d_product = d_weighted * weight
        tl.debug_barrier()  # every number is read before another thread may write in its place
        store_nearest(d_gate_up_ptr + wide, d_product * up * (slope + silu * (1.0 - slope)), inside)
        store_nearest(d_gate_up_ptr + wide + width, d_product * silu, inside)
        store_nearest(d_product_ptr + narrow, silu * up * weight, inside)
    if d_weights_ptr is not None:
        store_nearest(d_weights_ptr + choice, d_weight, row < M)
