"""Triton kernels of RMSNorm: a program holds whole rows, so each number is read once and written once.

bf16 is read and written natively where a pointer is of that type, and as its bits where it is int16: Triton's
interpreter casts to bf16 wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.random.stochastic_rounding_triton import from_bf16, nearest_bf16


@triton.jit
def load_fp32(ptr, inside):
    """Return numbers in fp32, 0 where the mask is false."""
    value = tl.load(ptr, mask=inside, other=0)
    return from_bf16(value) if ptr.dtype.element_ty == tl.int16 else value.to(tl.float32)


@triton.jit
def store_nearest(ptr, value, inside):
    """Round fp32 to the pointer's type and store it."""
    if ptr.dtype.element_ty == tl.int16:
        tl.store(ptr, nearest_bf16(value), mask=inside)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def rounded_as(ptr, value):
    """Round fp32 as `store_nearest` does, in fp32."""
    if ptr.dtype.element_ty == tl.int16:
        return from_bf16(nearest_bf16(value))
    return value.to(ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    rstd_ptr,
    stream_ptr,
    y_ptr,
    N,
    D,
    stride,
    stride_added,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KNOWS_RSTD: tl.constexpr,
):
    """y = x · r · weight; r [N] is read where it is known, else computed and written.

    stride, stride_added: of the rows of x and added.  Unless added_ptr is None, x + added is rounded to stream's type,
    stored there, and normalised in the place of x.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < D)[None, :]
    x = load_fp32(x_ptr + row[:, None] * stride + column[None, :], inside)
    if added_ptr is not None:
        x += load_fp32(added_ptr + row[:, None] * stride_added + column[None, :], inside)
        stream_at = stream_ptr + row[:, None] * D + column[None, :]
        store_nearest(stream_at, x, inside)
        x = rounded_as(stream_ptr, x)
    if KNOWS_RSTD:
        rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)
    else:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        tl.store(rstd_ptr + row, rstd, mask=row < N)
    weight = load_fp32(weight_ptr + column, column < D)
    store_nearest(y_ptr + row[:, None] * D + column[None, :], x * rstd[:, None] * weight[None, :], inside)


@triton.jit
def rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    d_stream_ptr,
    dx_ptr,
    normed_ptr,
    partial_ptr,
    N,
    D,
    stride_dy,
    stride_x,
    stride_d_stream,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx, and each program's sum over its `share` of the rows for dweight: [programs, D].  None: it is not wanted.

    Unless d_stream_ptr is None, dx is that gradient too: x goes on beside the norm.
    Unless normed_ptr is None, what forward returned is stored there once more, perhaps in the place of dy.
    """
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, N)
    column = tl.arange(0, COLUMNS)
    is_column = column < D
    weight = load_fp32(weight_ptr + column, is_column)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & is_column[None, :]
        x = load_fp32(x_ptr + row[:, None] * stride_x + column[None, :], inside)
        dy = load_fp32(dy_ptr + row[:, None] * stride_dy + column[None, :], inside)
        rstd = tl.load(rstd_ptr + row, mask=row < last, other=0.0)[:, None]
        normed = x * rstd
        if normed_ptr is not None:
            tl.debug_barrier()  # all of dy is read before another thread may write in its place
            store_nearest(normed_ptr + row[:, None] * D + column[None, :], normed * weight[None, :], inside)
        if partial_ptr is not None:
            total += tl.sum(dy * normed, 0)
        if dx_ptr is not None:
            slope = dy * weight[None, :]
            mean = tl.sum(slope * normed, 1)[:, None] / D
            dx = (slope - normed * mean) * rstd
            if d_stream_ptr is not None:
                dx += load_fp32(d_stream_ptr + row[:, None] * stride_d_stream + column[None, :], inside)
            store_nearest(dx_ptr + row[:, None] * D + column[None, :], dx, inside)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + column, total, mask=is_column)


@triton.jit
def sum_parts_kernel(part_ptr, total_ptr, P, D, ADDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum the parts [P, D] over P, in their order; ADDS: to what total [D] holds."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, P, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < P)[:, None] & is_column[None, :]
        total += tl.load(part_ptr + row[:, None] * D + column[None, :], mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if ADDS:
        result += tl.load(total_ptr + column, mask=is_column, other=0.0)
    store_nearest(total_ptr + column, result, is_column)
