"""Triton kernels that round a matrix along its rows and along its columns from one read; they choose no tile.

Blocks are 128 × 128 for E4M3: each of the block's rows has a scale, and so has each of its columns.  INT8, whose scales
are those of whole rows and columns, takes two passes: one finds the largest magnitudes both ways, one rounds both ways.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.quant.quantise_triton import e4m3_code, e4m3_scale, int8_code, int8_scale, magnitude_bits

BLOCK: tl.constexpr = tl.constexpr(128)


@triton.jit
def block_at(ptr, block_row, block_column, stride_row, stride_column):
    """Return the addresses of a block [128, 128]: offsets within it have 32 bits, which halves what they take."""
    first = block_row.to(tl.int64) * BLOCK * stride_row + block_column.to(tl.int64) * BLOCK * stride_column
    index = tl.arange(0, BLOCK)
    return ptr + first + (index[:, None] * stride_row + index[None, :] * stride_column)


@triton.jit
def block_mask(block_row, block_column, N, K):
    """Say which numbers of a block [128, 128] lie inside of [N, K]."""
    index = tl.arange(0, BLOCK)
    return (index < N - block_row * BLOCK)[:, None] & (index < K - block_column * BLOCK)[None, :]


@triton.jit
def load_block(x_ptr, block_row, block_column, N, K, stride_n, stride_k):
    """Return a block [128, 128] in fp32, 0 beyond the edges."""
    at = block_at(x_ptr, block_row, block_column, stride_n, stride_k)
    return tl.load(at, mask=block_mask(block_row, block_column, N, K), other=0.0).to(tl.float32)


@triton.jit
def store_e4m3_rows(
    x, code_ptr, scale_ptr, block_row, block_column, N, K, stride_code, stride_scale, NATIVE: tl.constexpr
):
    """Round a block [128, 128] of fp32 along its rows and store it: code [N, K], scale [N, ⌈K/128⌉] of such rows."""
    scale, factor = e4m3_scale(tl.max(magnitude_bits(x), axis=1), False)
    code = e4m3_code(x, factor[:, None], False, NATIVE)
    code_at = block_at(code_ptr, block_row, block_column, stride_code, 1)
    tl.store(code_at, code, mask=block_mask(block_row, block_column, N, K))
    row = block_row.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scale_ptr + row * stride_scale + block_column, scale, mask=row < N)


@triton.jit
def store_e4m3_columns(x, code_ptr, scale_ptr, block_row, block_column, N, K, NATIVE: tl.constexpr):
    """Round a block [128, 128] of fp32 along its columns and store it turned: code [K, N], scale [K, ⌈N/128⌉]."""
    scale, factor = e4m3_scale(tl.max(magnitude_bits(x), axis=0), False)
    code = tl.trans(e4m3_code(x, factor[None, :], False, NATIVE))
    code_at = block_at(code_ptr, block_column, block_row, N, 1)
    tl.store(code_at, code, mask=block_mask(block_column, block_row, K, N))
    column = block_column.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(scale_ptr + column * tl.cdiv(N, BLOCK) + block_row, scale, mask=column < K)


@triton.jit
def e4m3_both_ways_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    turned_code_ptr,
    turned_scale_ptr,
    N,
    K,
    stride_n,
    stride_k,
    stride_code,
    stride_scale,
    NATIVE: tl.constexpr,
):
    """Round one block of x along its rows and along its columns.  stride_code, stride_scale: of the rows' results."""
    at_row, at_column = tl.program_id(0), tl.program_id(1)
    x = load_block(x_ptr, at_row, at_column, N, K, stride_n, stride_k)
    store_e4m3_rows(x, code_ptr, scale_ptr, at_row, at_column, N, K, stride_code, stride_scale, NATIVE)
    store_e4m3_columns(x, turned_code_ptr, turned_scale_ptr, at_row, at_column, N, K, NATIVE)


@triton.jit
def absmax_both_ways_kernel(x_ptr, row_absmax_ptr, column_absmax_ptr, N, K, stride_n, stride_k):
    """Write the bits of the absmax of a block's rows, [⌈K/128⌉, N], and of its columns, [⌈N/128⌉, K]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bits = magnitude_bits(load_block(x_ptr, tl.program_id(0), tl.program_id(1), N, K, stride_n, stride_k))
    tl.store(row_absmax_ptr + tl.program_id(1).to(tl.int64) * N + row, tl.max(bits, axis=1), mask=row < N)
    tl.store(column_absmax_ptr + tl.program_id(0).to(tl.int64) * K + column, tl.max(bits, axis=0), mask=column < K)


@triton.jit
def scale_of_slices(absmax_ptr, index, count, slices):
    """Return the INT8 scales of rows or columns whose slices' absmax is known: [slices, count]."""
    bits = tl.zeros((BLOCK,), dtype=tl.int32)
    at = absmax_ptr + index
    for _ in range(slices):
        bits = tl.maximum(bits, tl.load(at, mask=index < count, other=0))
        at += count
    return int8_scale(bits)


@triton.jit
def int8_both_ways_kernel(
    x_ptr,
    row_absmax_ptr,
    column_absmax_ptr,
    code_ptr,
    scale_ptr,
    turned_code_ptr,
    turned_scale_ptr,
    N,
    K,
    stride_n,
    stride_k,
):
    """Round one block of x both ways, with the scales of its whole rows and columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at_row, at_column = tl.program_id(0), tl.program_id(1)
    x = load_block(x_ptr, at_row, at_column, N, K, stride_n, stride_k)
    scale, factor = scale_of_slices(row_absmax_ptr, row, N, tl.num_programs(1))
    code = int8_code(x, factor[:, None])
    tl.store(block_at(code_ptr, at_row, at_column, K, 1), code, mask=block_mask(at_row, at_column, N, K))
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + row, scale, mask=row < N)
    scale, factor = scale_of_slices(column_absmax_ptr, column, K, tl.num_programs(0))
    code = tl.trans(int8_code(x, factor[None, :]))
    tl.store(block_at(turned_code_ptr, at_column, at_row, N, 1), code, mask=block_mask(at_column, at_row, K, N))
    if tl.program_id(0) == 0:
        tl.store(turned_scale_ptr + column, scale, mask=column < K)
