"""Products of scaled 8-bit matrices on tensor cores: tiles of rows and columns, one block of K at a time.

Rows beyond the edge are read as the last row and never stored, so that no load needs a mask along rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.quant.e4m3_triton import decode_256th


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return which tile a program computes: neighbours in time share rows and columns, which then come from L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def rows_of(tile, count, BLOCK: tl.constexpr):
    """Return a tile's rows; beyond the edge, the last one."""
    return tl.minimum(tile * BLOCK + tl.arange(0, BLOCK), count - 1)


@triton.jit
def exponent_of(scale):
    """Return the ue8m0 byte of powers of two in fp32: their exponent's bits; NaN has 0xFF in both."""
    return ((scale.to(tl.int32, bitcast=True) >> 23) & 0xFF).to(tl.uint8)


@triton.jit
def groups_of(scale, ROWS: tl.constexpr):
    """Return the ue8m0 bytes [ROWS, 4] of 1×32 groups: a block of 128 has the same scale in its four."""
    return tl.broadcast_to(exponent_of(scale)[:, None], [ROWS, 4])


@triton.jit
def store_tile(y_ptr, y, tile_m, tile_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADDS: tl.constexpr):
    """Store a tile of y [M, N], in y's dtype; ADDS: added in fp32 to what is there."""
    row_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = y_ptr + row_m.to(tl.int64)[:, None] * N + row_n[None, :]
    inside = (row_m[:, None] < M) & (row_n[None, :] < N)
    if ADDS:
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def e4m3_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    y_ptr,
    M,
    N,
    K,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
    DECODES: tl.constexpr,
):
    """y = deq(a) · deq(b)ᵀ: each block's product is scaled in fp32 and added.

    A_ROWS, B_ROWS: rows of one scale, 1 or 128.  BLOCK_N and BLOCK_K divide 128.  DECODES: bytes become fp16 in
    registers.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    row_m, row_n = rows_of(tile_m, M, BLOCK_M), rows_of(tile_n, N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + row_m.to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + row_n.to(tl.int64)[None, :] * K + k[:, None]
    blocks = tl.cdiv(K, 128)
    a_scale_at = a_scale_ptr + (row_m // A_ROWS).to(tl.int64) * blocks
    if B_ROWS == 128:
        b_scale_at = b_scale_ptr + tile_n * BLOCK_N // 128 * blocks
    else:
        b_scale_at = b_scale_ptr + row_n.to(tl.int64) * blocks
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_at + start, mask=k[None, :] < K - start, other=0.0)
        b = tl.load(b_at + start, mask=k[:, None] < K - start, other=0.0)
        a_scale = tl.load(a_scale_at + start // 128)
        b_scale = tl.load(b_scale_at + start // 128)
        product = tl.dot(decode_256th(a), decode_256th(b)) if DECODES else tl.dot(a, b)
        if B_ROWS == 128:
            y += product * (a_scale * b_scale)[:, None]
        else:
            # In this order, because two scales may overflow where their product with small numbers does not.
            y += product * a_scale[:, None] * b_scale[None, :]
    if DECODES:
        y *= 65536.0
    store_tile(y_ptr, y, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N, ADDS)


@triton.jit
def mxfp8_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    y_ptr,
    M,
    N,
    K,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
):
    """y = deq(a) · deq(b)ᵀ by the instruction that scales groups of 32: scales must be powers of two.  BLOCK_K: 128."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    row_m, row_n = rows_of(tile_m, M, BLOCK_M), rows_of(tile_n, N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + row_m.to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + row_n.to(tl.int64)[None, :] * K + k[:, None]
    blocks = tl.cdiv(K, 128)
    a_scale_at = a_scale_ptr + (row_m // A_ROWS).to(tl.int64) * blocks
    b_scale_at = b_scale_ptr + (row_n // B_ROWS).to(tl.int64) * blocks
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(blocks):
        left = K - block * BLOCK_K
        a = tl.load(a_at + block * BLOCK_K, mask=k[None, :] < left, other=0.0)
        b = tl.load(b_at + block * BLOCK_K, mask=k[:, None] < left, other=0.0)
        a_scale = groups_of(tl.load(a_scale_at + block), BLOCK_M)
        b_scale = groups_of(tl.load(b_scale_at + block), BLOCK_N)
        y = tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3", acc=y)
    store_tile(y_ptr, y, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N, ADDS)


@triton.jit
def int8_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    y_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ADDS: tl.constexpr,
):
    """y = (a · bᵀ) scaled by row and by column, once: the sums are whole numbers in int32."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    row_m, row_n = rows_of(tile_m, M, BLOCK_M), rows_of(tile_n, N, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + row_m.to(tl.int64)[:, None] * K + k[None, :]
    b_at = b_ptr + row_n.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_at + start, mask=k[None, :] < K - start, other=0.0)
        b = tl.load(b_at + start, mask=k[:, None] < K - start, other=0.0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    y = total.to(tl.float32) * tl.load(a_scale_ptr + row_m)[:, None] * tl.load(b_scale_ptr + row_n)[None, :]
    store_tile(y_ptr, y, tile_m, tile_n, M, N, BLOCK_M, BLOCK_N, ADDS)
