"""Triton kernels of rotary positions, with or without the norm of each head before them: one pass over the heads.

A row is one head of one token.  A value's partner in its pair is loaded beside it, from the cache that holds both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest


@triton.jit
def pairs_of(column, K, R, INTERLEAVED: tl.constexpr):
    """Return each column's partner, its angle's index, and the sign of the partner's sine; 0 where nothing rotates."""
    place = column - (K - 2 * R)
    if INTERLEAVED:
        partner, angle, sign = column + 1 - 2 * (place & 1), place // 2, 2.0 * (place & 1) - 1.0
    else:
        is_second = place >= R
        partner = tl.where(is_second, column - R, column + R)
        angle = tl.where(is_second, place - R, place)
        sign = tl.where(is_second, 1.0, -1.0)
    is_rotated = place >= 0
    return tl.where(is_rotated, partner, column), tl.where(is_rotated, angle, 0), tl.where(is_rotated, sign, 0.0)


@triton.jit
def angles_of(cos_ptr, sin_ptr, position, angle, sign, inside, R):
    """Return cosines, 1 where nothing rotates, and signed sines, 0 there: [rows, columns] fp32."""
    rotates = inside & (sign != 0.0)[None, :]
    at = position[:, None] * R + angle[None, :]
    cos = tl.load(cos_ptr + at, mask=rotates, other=1.0)
    return cos, tl.load(sin_ptr + at, mask=rotates, other=0.0) * sign[None, :]


@triton.jit
def rotary_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    rstd_ptr,
    y_ptr,
    N,
    H,
    T,
    K,
    R,
    stride_token,
    stride_head,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TURNS_BACK: tl.constexpr,
):
    """Normalise N = tokens · H rows of K numbers by weight, unless that is None, and rotate the last 2R of each."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row, is_column = row < N, column < K
    inside = is_row[:, None] & is_column[None, :]
    partner, angle, sign = pairs_of(column, K, R, INTERLEAVED)
    x_at = x_ptr + (row // H * stride_token + row % H * stride_head)[:, None]
    x = load_fp32(x_at + column[None, :], inside)
    other = load_fp32(x_at + partner[None, :], inside)
    if weight_ptr is not None:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / K + eps)
        tl.store(rstd_ptr + row, rstd, mask=is_row)
        x *= rstd[:, None] * load_fp32(weight_ptr + column, is_column)[None, :]
        other *= rstd[:, None] * load_fp32(weight_ptr + partner, is_column)[None, :]
    cos, sin = angles_of(cos_ptr, sin_ptr, row // H % T, angle, sign, inside, R)
    y = x * cos - other * sin if TURNS_BACK else x * cos + other * sin
    store_nearest(y_ptr + row[:, None] * K + column[None, :], y, inside)


@triton.jit
def rotary_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    N,
    H,
    T,
    K,
    R,
    stride_dy_token,
    stride_dy_head,
    stride_token,
    stride_head,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn dy back and differentiate the norm: dx, and each program's sum over its `share` of the rows for dweight."""
    first = tl.program_id(0).to(tl.int64) * share
    last = tl.minimum(first + share, N)
    column = tl.arange(0, COLUMNS)
    is_column = column < K
    partner, angle, sign = pairs_of(column, K, R, INTERLEAVED)
    weight = load_fp32(weight_ptr + column, is_column)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        is_row = row < last
        inside = is_row[:, None] & is_column[None, :]
        dy_at = dy_ptr + (row // H * stride_dy_token + row % H * stride_dy_head)[:, None]
        cos, sin = angles_of(cos_ptr, sin_ptr, row // H % T, angle, sign, inside, R)
        dn = load_fp32(dy_at + column[None, :], inside) * cos - load_fp32(dy_at + partner[None, :], inside) * sin
        x_at = x_ptr + (row // H * stride_token + row % H * stride_head)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=is_row, other=0.0)[:, None]
        normed = load_fp32(x_at + column[None, :], inside) * rstd
        total += tl.sum(dn * normed, 0)
        slope = dn * weight[None, :]
        dx = (slope - normed * (tl.sum(slope * normed, 1)[:, None] / K)) * rstd
        store_nearest(dx_ptr + row[:, None] * K + column[None, :], dx, inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * K + column, total, mask=is_column)
