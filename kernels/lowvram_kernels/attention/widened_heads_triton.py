"""Triton kernels that widen queries, keys and values, and narrow their gradients: copies, a program for each token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x_ptr, column_ptr, y_ptr, heads, K, C, stride, stride_column, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """y [heads, K + C] = [x | its columns], zeros where column_ptr is None; stride, stride_column: of their heads."""
    column = tl.arange(0, COLUMNS)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        is_head = (head < heads)[:, None]
        value = tl.load(x_ptr + (head * stride)[:, None] + column, mask=is_head & (column < K), other=0)
        is_beside = is_head & (column >= K) & (column < K + C)
        if column_ptr is not None:
            beside = tl.load(column_ptr + (head * stride_column)[:, None] + column - K, mask=is_beside, other=0)
            value = tl.where(column < K, value, beside)
        tl.store(y_ptr + (head * (K + C))[:, None] + column, value, mask=is_head & (column < K + C))


@triton.jit
def narrow(x_ptr, y_ptr, heads, K, stride, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """y [heads, K]: the first columns of x, whose heads are `stride` apart."""
    column = tl.arange(0, COLUMNS)[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (column < K)
        value = tl.load(x_ptr + (head * stride)[:, None] + column, mask=inside)
        tl.store(y_ptr + (head * K)[:, None] + column, value, mask=inside)


@triton.jit
def widened_heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_column_ptr,
    k_column_ptr,
    wide_q_ptr,
    wide_k_ptr,
    wide_v_ptr,
    T,
    H,
    G,
    K,
    C,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Widen one token's H queries by their head's columns, its G keys by its position's, and its values by zeros."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // T, token % T
    q_ptr += batch * stride_q_batch + place * stride_q_token
    k_ptr += batch * stride_k_batch + place * stride_k_token
    v_ptr += batch * stride_v_batch + place * stride_v_token
    W = K + C
    widen(q_ptr, q_column_ptr, wide_q_ptr + token * H * W, H, K, C, stride_q_head, C, HEADS, COLUMNS)
    widen(k_ptr, k_column_ptr + place * C, wide_k_ptr + token * G * W, G, K, C, stride_k_head, 0, HEADS, COLUMNS)
    widen(v_ptr, None, wide_v_ptr + token * G * W, G, K, C, stride_v_head, 0, HEADS, COLUMNS)


@triton.jit
def narrowed_heads_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    whole_ptr,
    T,
    H,
    G,
    K,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """whole [tokens, H + 2G, K]: the first K columns of dq, dk and dv."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // T, token % T
    dq_ptr += batch * stride_q_batch + place * stride_q_token
    dk_ptr += batch * stride_k_batch + place * stride_k_token
    dv_ptr += batch * stride_v_batch + place * stride_v_token
    whole_ptr += token * (H + 2 * G) * K
    narrow(dq_ptr, whole_ptr, H, K, stride_q_head, HEADS, COLUMNS)
    narrow(dk_ptr, whole_ptr + H * K, G, K, stride_k_head, HEADS, COLUMNS)
    narrow(dv_ptr, whole_ptr + (H + G) * K, G, K, stride_v_head, HEADS, COLUMNS)
