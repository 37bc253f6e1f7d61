"""Triton kernels of MLA's queries, keys and values: one program takes all heads of one token, some at a time.

What no angle turns is copied as it is.  A pair that is turned is held by one thread, so queries turn in their memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest


@triton.jit
def turn(x, cos, sin, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Turn neighbours of x [rows, 2 · pairs] by the angles of cos and sin [pairs]."""
    a, b = tl.split(tl.reshape(x, [ROWS, PAIRS, 2]))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), [ROWS, 2 * PAIRS])


@triton.jit
def mla_heads_kernel(
    q_ptr,
    kv_ptr,
    rope_ptr,
    cos_ptr,
    sin_ptr,
    k_ptr,
    v_ptr,
    T,
    H,
    N,
    R,
    V,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_kv_batch,
    stride_kv_token,
    stride_kv_head,
    stride_rope_batch,
    stride_rope_token,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """k = [kv's first N | turned rope] and v = [kv's next V | 0] of each head; the last 2R of q are turned in place."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // T, token % T
    pair, turned, column = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS), tl.arange(0, COLUMNS)
    cos = tl.load(cos_ptr + place * R + pair, mask=pair < R, other=0.0)
    sin = tl.load(sin_ptr + place * R + pair, mask=pair < R, other=0.0)
    rope_at = rope_ptr + batch * stride_rope_batch + place * stride_rope_token + turned
    rope = turn(load_fp32(rope_at, turned < 2 * R)[None, :], cos, sin, 1, PAIRS)
    q_ptr += batch * stride_q_batch + place * stride_q_token + N
    kv_ptr += batch * stride_kv_batch + place * stride_kv_token
    K = N + 2 * R
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)
        is_head, row = (head < H)[:, None], ((token * H + head) * K)[:, None]
        kv_at = kv_ptr + (head * stride_kv_head)[:, None] + column[None, :]
        is_key, is_value = is_head & (column < N)[None, :], is_head & (column < V)[None, :]
        tl.store(k_ptr + row + column[None, :], tl.load(kv_at, mask=is_key), mask=is_key)
        value = tl.load(kv_at + N, mask=is_value, other=0)
        tl.store(v_ptr + row + column[None, :], value, mask=is_head & (column < K)[None, :])
        is_turned = is_head & (turned < 2 * R)[None, :]
        store_nearest(k_ptr + row + N + turned[None, :], tl.broadcast_to(rope, [HEADS, 2 * PAIRS]), is_turned)
        q_at = q_ptr + (head * stride_q_head)[:, None] + turned[None, :]
        store_nearest(q_at, turn(load_fp32(q_at, is_turned), cos, sin, HEADS, PAIRS), is_turned)


@triton.jit
def mla_heads_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    cos_ptr,
    sin_ptr,
    d_query_ptr,
    d_kv_ptr,
    d_rope_ptr,
    T,
    H,
    N,
    R,
    V,
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
    PAIRS: tl.constexpr,
):
    """d_query: dq, its last 2R turned back.  d_kv = [dk's first N | dv's first V].  d_rope: the sum of dk's rest."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // T, token % T
    pair, turned, column = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS), tl.arange(0, COLUMNS)
    cos = tl.load(cos_ptr + place * R + pair, mask=pair < R, other=0.0)
    sin = -tl.load(sin_ptr + place * R + pair, mask=pair < R, other=0.0)
    dq_ptr += batch * stride_q_batch + place * stride_q_token
    dk_ptr += batch * stride_k_batch + place * stride_k_token
    dv_ptr += batch * stride_v_batch + place * stride_v_token
    K, L = N + 2 * R, N + V
    total = tl.zeros([2 * PAIRS], tl.float32)
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)
        is_head, row = (head < H)[:, None], (token * H + head)[:, None]
        is_key, is_value = is_head & (column < N)[None, :], is_head & (column < V)[None, :]
        is_turned = is_head & (turned < 2 * R)[None, :]
        dq_at = dq_ptr + (head * stride_q_head)[:, None]
        dk_at = dk_ptr + (head * stride_k_head)[:, None]
        dv_at = dv_ptr + (head * stride_v_head)[:, None] + column[None, :]
        query_at, kv_at = d_query_ptr + row * K, d_kv_ptr + row * L + column[None, :]
        tl.store(query_at + column[None, :], tl.load(dq_at + column[None, :], mask=is_key), mask=is_key)
        tl.store(kv_at, tl.load(dk_at + column[None, :], mask=is_key), mask=is_key)
        tl.store(kv_at + N, tl.load(dv_at, mask=is_value), mask=is_value)
        dq = turn(load_fp32(dq_at + N + turned[None, :], is_turned), cos, sin, HEADS, PAIRS)
        store_nearest(query_at + N + turned[None, :], dq, is_turned)
        total += tl.sum(load_fp32(dk_at + N + turned[None, :], is_turned), 0)
    rope_at = d_rope_ptr + token * 2 * R + turned[None, :]
    store_nearest(rope_at, turn(total[None, :], cos, sin, 1, PAIRS), (turned < 2 * R)[None, :])
