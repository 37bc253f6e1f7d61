"""Triton kernels that round matrices to E4M3 or INT8 with their scales, and read them back; they choose no tile.

Every matrix is one of a stack: program axis 2 counts them.  x has a stride for each axis, so a transposed matrix is
read as it lies, along whichever axis is contiguous, and turned on its way to the code, which is contiguous along K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.quant.e4m3_triton import decode_256th, encode

BLOCK: tl.constexpr = tl.constexpr(128)
# All bits of a magnitude but NaN's and infinity's lie below those of infinity.
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def magnitude_bits(x):
    """Return the bits of |x|: as integers they are in the order of the numbers, infinity and then NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def e4m3_scale(bits, HAS_FP32_SCALES: tl.constexpr):
    """Return the scale of each absmax, given as bits, and the factor that undoes it, or the scale again for fp32."""
    if HAS_FP32_SCALES:
        scale = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), 448.0), 1.1754943508222875e-38)
        factor = scale
    else:
        # 448 is 2⁸·1.75: the addition carries where the mantissa is above 1.75.
        exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    is_bad = bits >= INFINITY
    return tl.where(is_bad, float("nan"), scale), tl.where(is_bad, float("nan"), factor)


@triton.jit
def e4m3_code(x, factor, HAS_FP32_SCALES: tl.constexpr, NATIVE: tl.constexpr):
    """Return the bytes of x over its scale; a power of two divides exactly, by a product."""
    return encode(tl.div_rn(x, factor) if HAS_FP32_SCALES else x * factor, NATIVE)


@triton.jit
def int8_scale(bits):
    """Return the scale of each absmax, given as bits, and its reciprocal: one division a row and none a number."""
    scale = tl.maximum(bits.to(tl.float32, bitcast=True) * (1.0 / 127.0), 1.1754943508222875e-38)
    scale = tl.where(bits >= INFINITY, float("nan"), scale)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def int8_code(x, factor):
    """Round x times factor to the nearest, ties to even: beside 1.5·2²³ an addition keeps no bit below 1."""
    # Compiled without fused additions: the product must be rounded as plain PyTorch rounds it, or ties differ.
    return ((x * factor + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def e4m3_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_FP32_SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Encode blocks of 1×128: some rows × some whole blocks a program, read once."""
    BLOCKS: tl.constexpr = COLUMNS // BLOCK
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = (row < N)[:, None] & (column < K)[None, :]
    x_at = matrix * stride_e + row[:, None] * stride_n + column[None, :] * stride_k
    x = tl.load(x_ptr + x_at, mask=is_inside, other=0.0).to(tl.float32)
    x = tl.reshape(x, (ROWS, BLOCKS, BLOCK))
    scale, factor = e4m3_scale(tl.max(magnitude_bits(x), axis=2), HAS_FP32_SCALES)
    code = tl.reshape(e4m3_code(x, factor[:, :, None], HAS_FP32_SCALES, NATIVE), (ROWS, COLUMNS))
    tl.store(code_ptr + matrix * N * K + row[:, None] * K + column[None, :], code, mask=is_inside)
    width = tl.cdiv(K, BLOCK)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    scale_at = matrix * N * width + row[:, None] * width + block[None, :]
    tl.store(scale_ptr + scale_at, scale, mask=(row < N)[:, None] & (block < width)[None, :])


@triton.jit
def e4m3_blocks_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    turned_code_ptr,
    turned_scale_ptr,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    stride_turned_code,
    stride_turned_scale,
    HAS_FP32_SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Encode one block of 128×128 and write it as it lies, turned, or both; None stands for what is not wanted.

    stride_turned_code, stride_turned_scale: of the turned results' rows, N and their blocks unless they lie in a whole.
    """
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = (row < N)[:, None] & (column < K)[None, :]
    x_at = matrix * stride_e + row[:, None] * stride_n + column[None, :] * stride_k
    x = tl.load(x_ptr + x_at, mask=is_inside, other=0.0).to(tl.float32)
    scale, factor = e4m3_scale(tl.max(tl.max(magnitude_bits(x), axis=1), axis=0), HAS_FP32_SCALES)
    code = e4m3_code(x, factor, HAS_FP32_SCALES, NATIVE)
    height, width = tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK)
    start = matrix * height * width
    if code_ptr is not None:
        tl.store(code_ptr + matrix * N * K + row[:, None] * K + column[None, :], code, mask=is_inside)
        tl.store(scale_ptr + start + tl.program_id(0) * width + tl.program_id(1), scale)
    if turned_code_ptr is not None:
        turned_at = matrix * N * K + column[:, None] * stride_turned_code + row[None, :]
        tl.store(turned_code_ptr + turned_at, tl.trans(code), mask=(column < K)[:, None] & (row < N)[None, :])
        tl.store(turned_scale_ptr + start + tl.program_id(1) * stride_turned_scale + tl.program_id(0), scale)


@triton.jit
def int8_rows_kernel(
    x_ptr, code_ptr, scale_ptr, N, K, stride_e, stride_n, stride_k, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Encode rows that one program holds whole: read once."""
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_inside = (row < N)[:, None] & (column < K)[None, :]
    x_at = matrix * stride_e + row[:, None] * stride_n + column[None, :] * stride_k
    x = tl.load(x_ptr + x_at, mask=is_inside, other=0.0).to(tl.float32)
    scale, factor = int8_scale(tl.max(magnitude_bits(x), axis=1))
    code = int8_code(x, factor[:, None])
    tl.store(code_ptr + matrix * N * K + row[:, None] * K + column[None, :], code, mask=is_inside)
    tl.store(scale_ptr + matrix * N + row, scale, mask=row < N)


@triton.jit
def absmax_kernel(
    x_ptr,
    absmax_ptr,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Write the bits of the absmax of each row's slice of TURNS · COLUMNS numbers: [E, slices, N]."""
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1).to(tl.int64) * (TURNS * COLUMNS) + tl.arange(0, COLUMNS)
    x_at = matrix * stride_e + row[:, None] * stride_n
    most = tl.zeros((ROWS, COLUMNS), dtype=tl.int32)
    for turn in range(TURNS):
        column = first + turn * COLUMNS
        is_inside = (row < N)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + x_at + column[None, :] * stride_k, mask=is_inside, other=0.0).to(tl.float32)
        most = tl.maximum(most, magnitude_bits(x))
    at = (matrix * tl.num_programs(1) + tl.program_id(1)) * N + row
    tl.store(absmax_ptr + at, tl.max(most, axis=1), mask=row < N)


@triton.jit
def int8_slices_kernel(
    x_ptr,
    absmax_ptr,
    code_ptr,
    scale_ptr,
    N,
    K,
    stride_e,
    stride_n,
    stride_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Encode the slices whose absmax `absmax_kernel` wrote; a row's scale comes from all its slices."""
    matrix = tl.program_id(2).to(tl.int64)
    slices = tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    bits = tl.zeros((ROWS,), dtype=tl.int32)
    for index in range(slices):
        at = (matrix * slices + index) * N + row
        bits = tl.maximum(bits, tl.load(absmax_ptr + at, mask=row < N, other=0))
    scale, factor = int8_scale(bits)
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + matrix * N + row, scale, mask=row < N)
    first = tl.program_id(1).to(tl.int64) * (TURNS * COLUMNS) + tl.arange(0, COLUMNS)
    x_at = matrix * stride_e + row[:, None] * stride_n
    code_at = matrix * N * K + row[:, None] * K
    for turn in range(TURNS):
        column = first + turn * COLUMNS
        is_inside = (row < N)[:, None] & (column < K)[None, :]
        x = tl.load(x_ptr + x_at + column[None, :] * stride_k, mask=is_inside, other=0.0).to(tl.float32)
        tl.store(code_ptr + code_at + column[None, :], int8_code(x, factor[:, None]), mask=is_inside)


@triton.jit
def dequantise_kernel(
    code_ptr,
    scale_ptr,
    x_ptr,
    N,
    K,
    height,
    width,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    """Multiply codes by their scales, [E, height, width]: one for BLOCK_ROWS rows and 128 columns, or for a row."""
    matrix = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_inside = (row < N)[:, None] & (column < K)[None, :]
    at = matrix * N * K + row[:, None] * K + column[None, :]
    code = tl.load(code_ptr + at, mask=is_inside, other=0)
    scale_at = matrix * height * width + row // BLOCK_ROWS * width
    if IS_E4M3:
        number = decode_256th(code).to(tl.float32) * 256.0
        number = tl.where((code & 0x7F) == 0x7F, float("nan"), number)
        # One column of blocks a program.
        tl.static_assert(COLUMNS == BLOCK)
        scale_at += tl.program_id(1)
    else:
        number = code.to(tl.float32)
    scale = tl.load(scale_ptr + scale_at, mask=row < N, other=0.0)
    tl.store(x_ptr + at, (number * scale[:, None]).to(x_ptr.dtype.element_ty), mask=is_inside)
