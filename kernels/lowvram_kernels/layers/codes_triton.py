"""Triton kernels of RMSNorm and SwiGLU that write 8-bit codes in the place of 16-bit numbers.

Every number is rounded to its 16-bit type first, so that codes are those of a separate launch that reads such numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, rounded_as, store_nearest
from lowvram_kernels.layers.swiglu_triton import sigmoid
from lowvram_kernels.quant.both_ways_triton import block_at, block_mask, store_e4m3_columns, store_e4m3_rows
from lowvram_kernels.quant.quantise_triton import e4m3_code, e4m3_scale, int8_code, int8_scale, magnitude_bits

# Numbers that share a scale of E4M3.
BLOCK: tl.constexpr = tl.constexpr(128)


@triton.jit
def store_row_codes(
    y,
    code_ptr,
    scale_ptr,
    row,
    column,
    N,
    D,
    first_block,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Round rows [ROWS, COLUMNS] of fp32 and store their codes, [N, D], and scales.

    Bytes are E4M3: a scale for each of whole blocks, of which first_block is the first here, [N, ⌈D/128⌉].  Of INT8,
    whose rows are whole here, a row has one: [N].
    """
    inside = (row < N)[:, None] & (column < D)[None, :]
    code_at = code_ptr + row[:, None] * D + column[None, :]
    if code_ptr.dtype.element_ty == tl.int8:
        scale, factor = int8_scale(tl.max(magnitude_bits(y), axis=1))
        tl.store(code_at, int8_code(y, factor[:, None]), mask=inside)
        tl.store(scale_ptr + row, scale, mask=row < N)
    else:
        blocks_y = tl.reshape(y, (ROWS, COLUMNS // BLOCK, BLOCK))
        scale, factor = e4m3_scale(tl.max(magnitude_bits(blocks_y), axis=2), False)
        code = tl.reshape(e4m3_code(blocks_y, factor[:, :, None], False, NATIVE), (ROWS, COLUMNS))
        tl.store(code_at, code, mask=inside)
        block, width = first_block + tl.arange(0, COLUMNS // BLOCK), tl.cdiv(D, BLOCK)
        scale_at = scale_ptr + row[:, None] * width + block[None, :]
        tl.store(scale_at, scale, mask=(row < N)[:, None] & (block < width)[None, :])


@triton.jit
def rms_norm_codes_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    rstd_ptr,
    stream_ptr,
    code_ptr,
    scale_ptr,
    N,
    D,
    stride,
    stride_added,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write r [N] and the codes of x · r · weight; with added_ptr, of x + added, which is stored as the stream.

    stride, stride_added: of the rows of x and added.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < D)[None, :]
    x = load_fp32(x_ptr + row[:, None] * stride + column[None, :], inside)
    if added_ptr is not None:
        x += load_fp32(added_ptr + row[:, None] * stride_added + column[None, :], inside)
        store_nearest(stream_ptr + row[:, None] * D + column[None, :], x, inside)
        x = rounded_as(x_ptr, x)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < N)
    weight = load_fp32(weight_ptr + column, column < D)
    y = rounded_as(x_ptr, x * rstd[:, None] * weight[None, :])
    store_row_codes(y, code_ptr, scale_ptr, row, column, N, D, 0, ROWS, COLUMNS, NATIVE)


@triton.jit
def normed_columns_kernel(x_ptr, weight_ptr, rstd_ptr, code_ptr, scale_ptr, N, D, stride, NATIVE: tl.constexpr):
    """Round a block of x · r · weight along its columns: E4M3 code [D, N]."""
    at_row, at_column = tl.program_id(0), tl.program_id(1)
    row = at_row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = at_column * BLOCK + tl.arange(0, BLOCK)
    x = load_fp32(block_at(x_ptr, at_row, at_column, stride, 1), block_mask(at_row, at_column, N, D))
    rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
    weight = load_fp32(weight_ptr + column, column < D)
    y = rounded_as(x_ptr, x * rstd[:, None] * weight[None, :])
    store_e4m3_columns(y, code_ptr, scale_ptr, at_row, at_column, N, D, NATIVE)


@triton.jit
def swiglu_codes_kernel(
    gate_up_ptr,
    code_ptr,
    scale_ptr,
    N,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write the codes [N, width] of silu(gate) · up of gate_up [N, 2·width]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < width)[None, :]
    at = gate_up_ptr + row[:, None] * (2 * width) + column[None, :]
    gate, up = load_fp32(at, inside), load_fp32(at + width, inside)
    product = rounded_as(gate_up_ptr, gate * sigmoid(gate) * up)
    first_block = tl.program_id(1) * (COLUMNS // BLOCK)
    store_row_codes(product, code_ptr, scale_ptr, row, column, N, width, first_block, ROWS, COLUMNS, NATIVE)


@triton.jit
def swiglu_backward_codes_kernel(
    d_product_ptr,
    gate_up_ptr,
    code_ptr,
    scale_ptr,
    turned_code_ptr,
    turned_scale_ptr,
    product_code_ptr,
    product_scale_ptr,
    N,
    width,
    NATIVE: tl.constexpr,
):
    """Write the E4M3 codes of d_gate_up [N, 2·width] both ways, and those of the product along its columns.

    width is a multiple of 128.  Three programs share a block, one for each of d_gate, d_up and the product: all three
    do not fit into one's registers.  They run side by side, so that what they read comes from memory once.
    """
    part, at_row, at_column = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inside = block_mask(at_row, at_column, N, width)
    gate_at = block_at(gate_up_ptr, at_row, at_column, 2 * width, 1)
    gate = load_fp32(gate_at, inside)
    slope = sigmoid(gate)
    silu = gate * slope
    if part == 2:
        product = rounded_as(gate_up_ptr, silu * load_fp32(gate_at + width, inside))
        store_e4m3_columns(product, product_code_ptr, product_scale_ptr, at_row, at_column, N, width, NATIVE)
    else:
        # The factors that hang on the gate alone first: what is read after them takes registers later.
        factor = slope + silu * (1.0 - slope) if part == 0 else silu
        gradient = load_fp32(block_at(d_product_ptr, at_row, at_column, width, 1), inside)
        if part == 0:
            gradient *= load_fp32(gate_at + width, inside)
        gradient, place = rounded_as(gate_up_ptr, gradient * factor), at_column + part * (width // BLOCK)
        stride = 2 * width
        store_e4m3_rows(gradient, code_ptr, scale_ptr, at_row, place, N, stride, stride, stride // BLOCK, NATIVE)
        store_e4m3_columns(gradient, turned_code_ptr, turned_scale_ptr, at_row, place, N, stride, NATIVE)
