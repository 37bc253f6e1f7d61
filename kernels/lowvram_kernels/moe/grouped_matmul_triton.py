"""Products of many experts' slices in one launch each; knows no routing and no gradients.

Which expert and which of its rows a program has, it finds out by itself: expert e's tiles begin at slot
start_e // BLOCK_M + e, and slot start_{e+1} // BLOCK_M + e + 1 is never before their end, because ⌊(r + n)/B⌋ + 1 tiles
hold n rows for every r ≥ 0.  So M // BLOCK_M + E slots are enough for any loads, and no sum over experts is needed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.quant.e4m3_triton import decode_256th


@triton.jit
def _find_tile(ends_ptr, slot, FIRST: tl.constexpr, COUNT: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return a slot's expert (0 is FIRST's), its tile's first row, and where the slice ends; no tile: row ≥ end.

    EXPERTS: COUNT or the next power of two.
    """
    index = tl.arange(0, EXPERTS)
    has_before = (index < COUNT) & (FIRST + index > 0)
    before = tl.load(ends_ptr + FIRST + index - 1, mask=has_before, other=0).to(tl.int32)
    origin = 0
    if FIRST > 0:
        origin = tl.load(ends_ptr + FIRST - 1).to(tl.int32) // BLOCK_M
    begins = before // BLOCK_M - origin + index
    expert = tl.sum(((index < COUNT) & (begins <= slot)).to(tl.int32), 0) - 1
    start = tl.load(ends_ptr + FIRST + expert - 1, mask=FIRST + expert > 0, other=0).to(tl.int32)
    end = tl.load(ends_ptr + FIRST + expert).to(tl.int32)
    return expert, start + (slot - (start // BLOCK_M - origin + expert)) * BLOCK_M, end


@triton.jit
def order(program, heights, widths, GROUP: tl.constexpr):
    """Return the tile of a program: GROUP tiles down before one across, so that L2 still has what they share."""
    width = GROUP * widths
    first = program // width * GROUP
    height = tl.minimum(heights - first, GROUP)
    return first + program % width % height, program % width // height


@triton.jit
def dot_scaled(left, left_scale, right, right_scale, total, WAY: tl.constexpr):
    """Add the product of E4M3 bytes [A, K] and [K, B], K within one block of 128; scales [A, 1] and [1, B] or a number.

    WAY: "mxfp8", "tensor" or "storage", as `dispatch.choose` names them.
    """
    if WAY == "mxfp8":
        groups: tl.constexpr = left.shape[1] // 32
        left_e8m0 = (left_scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
        right_e8m0 = (right_scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
        left_e8m0 = tl.broadcast_to(left_e8m0, [left.shape[0], groups])
        right_e8m0 = tl.trans(tl.broadcast_to(right_e8m0, [groups, right.shape[1]]))
        return tl.dot_scaled(left, left_e8m0, "e4m3", right, right_e8m0, "e4m3", total)
    if WAY == "tensor":
        part = tl.dot(left.to(tl.float8e4nv, bitcast=True), right.to(tl.float8e4nv, bitcast=True))
        return total + part * left_scale * right_scale
    part = tl.dot(decode_256th(left), decode_256th(right))
    return total + part * (left_scale * 65536.0) * right_scale


@triton.jit
def multiply_kernel(
    rows_ptr,
    code_ptr,
    scale_ptr,
    ends_ptr,
    order_ptr,
    out_ptr,
    N,
    K,
    slots,
    rows_stride_m,
    rows_stride_k,
    code_stride_e,
    code_stride_n,
    code_stride_k,
    scale_stride_e,
    scale_stride_n,
    scale_stride_k,
    CHOICES: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALE: tl.constexpr,
    IS_TURNED: tl.constexpr,
    HAS_WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply each slice by its matrix transposed, which may lie in other numbers and is then decoded in registers.

    SCALE: "none"; "block" of 128×128 for E4M3; "n" or "k", the one that each int8 scale belongs to.
    IS_TURNED: a matrix is contiguous along N.  order: row m is row order[m] // CHOICES of what rows points to.
    """
    slot, column = order(tl.program_id(0), slots, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = _find_tile(ends_ptr, slot, FIRST, COUNT, EXPERTS, BLOCK_M)
    if row >= end:
        return
    at_m, at_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    at_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    # What is past an edge is read as the last of the inside and never written: cheaper than a mask.  But not along
    # the contiguous dimension, where it would break wide loads.
    place_m = tl.minimum(at_m, end - 1 - row)
    place_n = at_n if IS_TURNED else tl.minimum(at_n, N - 1)
    in_n = (at_n < N)[None, :]
    if order_ptr is None:
        rows_ptr += row.to(tl.int64) * rows_stride_m
        left_ptr = rows_ptr + place_m[:, None] * rows_stride_m + at_k[None, :] * rows_stride_k
    else:
        source = (tl.load(order_ptr + row + place_m) // CHOICES).to(tl.int64)
        left_ptr = rows_ptr + source[:, None] * rows_stride_m + at_k[None, :] * rows_stride_k
    code_ptr += expert.to(tl.int64) * code_stride_e
    right_ptr = code_ptr + place_n[None, :] * code_stride_n + at_k[:, None] * code_stride_k
    if SCALE != "none":
        scale_ptr += expert.to(tl.int64) * scale_stride_e
    if SCALE == "block":
        scale_ptr += column * BLOCK_N // 128 * scale_stride_n
    if SCALE == "n":
        scale_n = tl.load(scale_ptr + tl.minimum(at_n, N - 1) * scale_stride_n)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = at_k < K - k
        if HAS_WHOLE_K:
            left = tl.load(left_ptr)
            right = tl.load(right_ptr, mask=in_n, other=0) if IS_TURNED else tl.load(right_ptr)
        else:
            left = tl.load(left_ptr, mask=in_k[None, :], other=0)
            in_right = in_k[:, None] & in_n if IS_TURNED else in_k[:, None]
            right = tl.load(right_ptr, mask=in_right, other=0)
        if SCALE == "block":
            value = decode_256th(right).to(tl.float32) * (tl.load(scale_ptr + k // 128 * scale_stride_k) * 256.0)
            right_value = tl.where((right & 0x7F) == 0x7F, float("nan"), value).to(left.dtype)
        elif SCALE == "n":
            right_value = (right.to(tl.float32) * scale_n[None, :]).to(left.dtype)
        elif SCALE == "k":
            scale_k = tl.load(scale_ptr + (k + at_k) * scale_stride_k, mask=in_k, other=0.0)
            right_value = (right.to(tl.float32) * scale_k[:, None]).to(left.dtype)
        else:
            right_value = right.to(left.dtype)
        total = tl.dot(left, right_value, total, input_precision="ieee")
        left_ptr += BLOCK_K * rows_stride_k
        right_ptr += BLOCK_K * code_stride_k
    out_ptr += row.to(tl.int64) * N
    in_out = (at_m < end - row)[:, None] & in_n
    tl.store(out_ptr + at_m[:, None] * N + at_n[None, :], total.to(out_ptr.dtype.element_ty), mask=in_out)


@triton.jit
def multiply_fp8_kernel(
    left_ptr,
    left_scale_ptr,
    right_ptr,
    right_scale_ptr,
    ends_ptr,
    out_ptr,
    N,
    K,
    slots,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    WAY: tl.constexpr,
    HAS_WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply each slice of E4M3 rows by its E4M3 matrix transposed; a tile lies within one block of 128 each way."""
    slot, column = order(tl.program_id(0), slots, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = _find_tile(ends_ptr, slot, FIRST, COUNT, EXPERTS, BLOCK_M)
    if row >= end:
        return
    blocks = tl.cdiv(K, 128)
    at_m, at_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    at_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    place_m, place_n = tl.minimum(at_m, end - 1 - row), tl.minimum(at_n, N - 1)
    left_ptr += row.to(tl.int64) * K
    right_ptr += expert.to(tl.int64) * N * K
    left_at = left_ptr + place_m[:, None] * K + at_k[None, :]
    right_at = right_ptr + place_n[None, :] * K + at_k[:, None]
    left_scale_ptr += row.to(tl.int64) * blocks
    right_scale_ptr += (expert.to(tl.int64) * tl.cdiv(N, 128) + column * BLOCK_N // 128) * blocks
    place_scale = place_m * blocks
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if HAS_WHOLE_K:
            left, right = tl.load(left_at), tl.load(right_at)
        else:
            in_k = at_k < K - k
            left = tl.load(left_at, mask=in_k[None, :], other=0)
            right = tl.load(right_at, mask=in_k[:, None], other=0)
        # A vector, broadcast after it is loaded: a load of a column would be repeated for each column of the product.
        left_scale, right_scale = tl.load(left_scale_ptr + k // 128 + place_scale), tl.load(right_scale_ptr + k // 128)
        total = dot_scaled(left, left_scale[:, None], right, right_scale, total, WAY)
        left_at += BLOCK_K
        right_at += BLOCK_K
    out_ptr += row.to(tl.int64) * N
    in_out = (at_m < end - row)[:, None] & (at_n < N)[None, :]
    tl.store(out_ptr + at_m[:, None] * N + at_n[None, :], total.to(out_ptr.dtype.element_ty), mask=in_out)


@triton.jit
def multiply_int8_kernel(
    left_ptr,
    left_scale_ptr,
    right_ptr,
    right_scale_ptr,
    ends_ptr,
    out_ptr,
    N,
    K,
    slots,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply each slice of int8 rows by its int8 matrix transposed: whole numbers in int32, scaled once."""
    slot, column = order(tl.program_id(0), slots, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = _find_tile(ends_ptr, slot, FIRST, COUNT, EXPERTS, BLOCK_M)
    if row >= end:
        return
    at_m, at_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    at_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    place_m, place_n = tl.minimum(at_m, end - 1 - row), tl.minimum(at_n, N - 1)
    left_at = left_ptr + row.to(tl.int64) * K + place_m[:, None] * K + at_k[None, :]
    right_at = right_ptr + expert.to(tl.int64) * N * K + place_n[None, :] * K + at_k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        if HAS_WHOLE_K:
            left, right = tl.load(left_at), tl.load(right_at)
        else:
            in_k = at_k < K - k
            left = tl.load(left_at, mask=in_k[None, :], other=0)
            right = tl.load(right_at, mask=in_k[:, None], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        left_at += BLOCK_K
        right_at += BLOCK_K
    left_scale = tl.load(left_scale_ptr + row + place_m)
    right_scale = tl.load(right_scale_ptr + expert * N + place_n)
    value = total.to(tl.float32) * left_scale[:, None] * right_scale[None, :]
    out_ptr += row.to(tl.int64) * N
    in_out = (at_m < end - row)[:, None] & (at_n < N)[None, :]
    tl.store(out_ptr + at_m[:, None] * N + at_n[None, :], value.to(out_ptr.dtype.element_ty), mask=in_out)
