"""Outer products of many experts' slices in one launch; knows no routing."""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.moe.grouped_matmul_triton import dot_scaled, order


@triton.jit
def _slice_of(ends_ptr, expert):
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    return start, tl.load(ends_ptr + expert).to(tl.int32)


@triton.jit
def outer_kernel(
    left_ptr,
    right_ptr,
    ends_ptr,
    left_order_ptr,
    right_order_ptr,
    out_ptr,
    outputs,
    inputs,
    left_stride_m,
    left_stride_o,
    right_stride_m,
    right_stride_i,
    CHOICES: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum the outer products of one expert's rows, for one tile of its [O, I]; every element is written.

    ADDS: to what out holds.  An order: row m of that side is row order[m] // CHOICES of what its pointer points to.
    """
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    expert = tl.program_id(0) // (tiles_o * tiles_i)
    tile_o, tile_i = order(tl.program_id(0) % (tiles_o * tiles_i), tiles_o, tiles_i, GROUP)
    start, end = _slice_of(ends_ptr, expert)
    at_m = tl.arange(0, BLOCK_M)
    at_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    at_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    in_o, in_i = (at_o < outputs)[:, None], (at_i < inputs)[None, :]
    left_at, right_at = left_ptr + at_o[:, None] * left_stride_o, right_ptr + at_i[None, :] * right_stride_i
    if left_order_ptr is None:
        left_at = left_at + start.to(tl.int64) * left_stride_m + at_m[None, :] * left_stride_m
    if right_order_ptr is None:
        right_at = right_at + start.to(tl.int64) * right_stride_m + at_m[:, None] * right_stride_m
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for m in range(start, end, BLOCK_M):
        # Both sides: a neighbour's NaN times zero would be NaN.
        in_m = at_m < end - m
        in_left, in_right = in_o & in_m[None, :], in_m[:, None] & in_i
        if left_order_ptr is None:
            left = tl.load(left_at, mask=in_left, other=0)
            left_at += BLOCK_M * left_stride_m
        else:
            left_m = (tl.load(left_order_ptr + m + at_m, mask=in_m, other=0) // CHOICES).to(tl.int64)
            left = tl.load(left_at + left_m[None, :] * left_stride_m, mask=in_left, other=0)
        if right_order_ptr is None:
            right = tl.load(right_at, mask=in_right, other=0)
            right_at += BLOCK_M * right_stride_m
        else:
            right_m = (tl.load(right_order_ptr + m + at_m, mask=in_m, other=0) // CHOICES).to(tl.int64)
            right = tl.load(right_at + right_m[:, None] * right_stride_m, mask=in_right, other=0)
        total = tl.dot(left, right, total, input_precision="ieee")
    out_at = out_ptr + expert.to(tl.int64) * outputs * inputs + at_o[:, None] * inputs + at_i[None, :]
    if ADDS:
        total += tl.load(out_at, mask=in_o & in_i, other=0.0)
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=in_o & in_i)


@triton.jit
def outer_fp8_kernel(
    left_ptr,
    left_scale_ptr,
    right_ptr,
    right_scale_ptr,
    ends_ptr,
    out_ptr,
    M,
    outputs,
    inputs,
    WAY: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum the outer products of one expert's rows, which are columns of E4M3 [O, M] and [I, M].

    The scales' blocks lie at multiples of 128 of M and not at the slices' ends, so the tiles do too, and the bytes of
    other experts' rows are made zero on one side.
    """
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    expert = tl.program_id(0) // (tiles_o * tiles_i)
    tile_o, tile_i = order(tl.program_id(0) % (tiles_o * tiles_i), tiles_o, tiles_i, GROUP)
    start, end = _slice_of(ends_ptr, expert)
    blocks = tl.cdiv(M, 128)
    at_m = tl.arange(0, BLOCK_M)
    at_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    at_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    place_o, place_i = tl.minimum(at_o, outputs - 1), tl.minimum(at_i, inputs - 1)
    first = start // BLOCK_M * BLOCK_M
    end = tl.where(start < end, end, first)  # an empty slice reads nothing, not even scales
    left_at = left_ptr + place_o.to(tl.int64)[:, None] * M + (first + at_m)[None, :]
    right_at = right_ptr + place_i.to(tl.int64)[None, :] * M + (first + at_m)[:, None]
    left_scale_at, right_scale_at = place_o * blocks, place_i * blocks
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for m in range(first, end, BLOCK_M):
        in_memory, in_slice = at_m < M - m, (at_m >= start - m) & (at_m < end - m)
        left = tl.load(left_at, mask=in_memory[None, :], other=0)
        right = tl.load(right_at, mask=in_memory[:, None], other=0)
        # Not as the loads' masks, which would have to be wide; and codes are never NaN, so that one side is enough.
        left = tl.where(in_slice[None, :], left, 0)
        left_scale = tl.load(left_scale_ptr + m // 128 + left_scale_at)
        right_scale = tl.load(right_scale_ptr + m // 128 + right_scale_at)
        total = dot_scaled(left, left_scale[:, None], right, right_scale[None, :], total, WAY)
        left_at += BLOCK_M
        right_at += BLOCK_M
    out_ptr += expert.to(tl.int64) * outputs * inputs
    in_out = (at_o < outputs)[:, None] & (at_i < inputs)[None, :]
    tl.store(out_ptr + at_o[:, None] * inputs + at_i[None, :], total.to(out_ptr.dtype.element_ty), mask=in_out)


@triton.jit
def _sum_codes(left_row, right_row, first, last, start, end, M, total, BLOCK_M: tl.constexpr):
    """Sum the products of int8 rows [O] and [I], given by their pointers, over first ≤ m < last within the slice."""
    at_m = tl.arange(0, BLOCK_M)
    left_at, right_at = left_row[:, None] + (first + at_m)[None, :], right_row[None, :] + (first + at_m)[:, None]
    for m in range(first, last, BLOCK_M):
        in_memory, in_slice = at_m < M - m, (at_m >= start - m) & (at_m < end - m)
        left = tl.load(left_at, mask=in_memory[None, :], other=0)
        right = tl.load(right_at, mask=in_memory[:, None], other=0)
        total = tl.dot(tl.where(in_slice[None, :], left, 0), right, total, out_dtype=tl.int32)
        left_at += BLOCK_M
        right_at += BLOCK_M
    return total


@triton.jit
def outer_int8_kernel(
    left_ptr,
    left_scale_ptr,
    right_ptr,
    right_scale_ptr,
    ends_ptr,
    out_ptr,
    M,
    outputs,
    inputs,
    TERMS: tl.constexpr,
    IS_LONG: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Sum the outer products of one expert's rows, which are columns of int8 [O, M] and [I, M], and scale once.

    The tiles lie at multiples of BLOCK_M, where a load is wide.  IS_LONG: a slice may have more than TERMS rows, which
    are what int32 holds.
    """
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    expert = tl.program_id(0) // (tiles_o * tiles_i)
    tile_o, tile_i = order(tl.program_id(0) % (tiles_o * tiles_i), tiles_o, tiles_i, GROUP)
    start, end = _slice_of(ends_ptr, expert)
    at_o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    at_i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    place_o, place_i = tl.minimum(at_o, outputs - 1), tl.minimum(at_i, inputs - 1)
    first = start // BLOCK_M * BLOCK_M
    last = tl.where(start < end, end, first)
    left_row, right_row = left_ptr + place_o.to(tl.int64) * M, right_ptr + place_i.to(tl.int64) * M
    none = tl.zeros([BLOCK_O, BLOCK_I], tl.int32)
    if IS_LONG:
        total = none.to(tl.float32)
        for part in range(first, last, TERMS):
            stop = tl.minimum(part + TERMS, last)
            total += _sum_codes(left_row, right_row, part, stop, start, end, M, none, BLOCK_M).to(tl.float32)
    else:
        total = _sum_codes(left_row, right_row, first, last, start, end, M, none, BLOCK_M).to(tl.float32)
    left_scale, right_scale = tl.load(left_scale_ptr + place_o), tl.load(right_scale_ptr + place_i)
    value = total * left_scale[:, None] * right_scale[None, :]
    value = tl.where(start < end, value, 0.0)  # a scale is of all experts' rows: a NaN in it is none of an empty slice
    out_ptr += expert.to(tl.int64) * outputs * inputs
    in_out = (at_o < outputs)[:, None] & (at_i < inputs)[None, :]
    tl.store(out_ptr + at_o[:, None] * inputs + at_i[None, :], value.to(out_ptr.dtype.element_ty), mask=in_out)
