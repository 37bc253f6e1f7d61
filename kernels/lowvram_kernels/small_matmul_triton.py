"""Products of a few rows with an 8-bit weight: each program reads a band of the weight's rows, once, and adds in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.e4m3_triton import decode_256th


@triton.jit
def number_of(code, IS_E4M3: tl.constexpr, NATIVE: tl.constexpr):
    """Return codes as fp32; E4M3 comes divided by 256 where the card does not convert by itself."""
    if not IS_E4M3:
        return code.to(tl.float32)
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return decode_256th(code).to(tl.float32)


@triton.jit
def few_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    y_ptr,
    N,
    O,
    I,
    SPLIT_BLOCKS,
    SCALE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    IS_E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """y[split, n, o] = the part of Σᵢ x[n, i] · weight[o, i] that lies in the split's blocks of 128.

    Programs: bands of BAND outputs × splits × groups of ROWS rows.  SCALE_ROWS: 1 or 128 for E4M3's blocks.
    """
    split, group = tl.program_id(1), tl.program_id(2)
    output = tl.program_id(0) * BAND + tl.arange(0, BAND)
    row = group * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, 128)
    read_o, read_n = tl.minimum(output, O - 1), tl.minimum(row, N - 1)
    code_at = code_ptr + read_o.to(tl.int64)[:, None] * I + inner[None, :]
    x_at = x_ptr + read_n[:, None] * I + inner[None, :]
    blocks = tl.cdiv(I, 128)
    scale_at = scale_ptr + (read_o // SCALE_ROWS).to(tl.int64) * (blocks if IS_E4M3 else 1)
    sums = tl.zeros((ROWS, BAND, 128), tl.float32)
    for block in range(split * SPLIT_BLOCKS, tl.minimum(blocks, (split + 1) * SPLIT_BLOCKS)):
        is_inside = inner[None, :] < I - block * 128
        weight = number_of(tl.load(code_at + block * 128, mask=is_inside, other=0), IS_E4M3, NATIVE)
        if IS_E4M3:
            weight *= tl.load(scale_at + block)[:, None]
        x = tl.load(x_at + block * 128, mask=is_inside, other=0.0).to(tl.float32)
        sums += x[:, None, :] * weight[None, :, :]
    y = tl.sum(sums, 2)
    if not IS_E4M3:
        y *= tl.load(scale_at)[None, :]
    elif not NATIVE:
        y *= 256.0
    at = y_ptr + (split * N + row)[:, None] * O + output[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(row[:, None] < N) & (output[None, :] < O))


@triton.jit
def sixteen_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    y_ptr,
    N,
    O,
    I,
    SPLIT_BLOCKS,
    SCALE_ROWS: tl.constexpr,
    BAND: tl.constexpr,
    IS_E4M3: tl.constexpr,
):
    """The same for up to 16 rows of 16-bit numbers, on tensor cores; E4M3 becomes x's dtype, divided by 256."""
    split = tl.program_id(1)
    output = tl.program_id(0) * BAND + tl.arange(0, BAND)
    row = tl.arange(0, 16)
    inner = tl.arange(0, 128)
    read_o, read_n = tl.minimum(output, O - 1), tl.minimum(row, N - 1)
    code_at = code_ptr + read_o.to(tl.int64)[None, :] * I + inner[:, None]
    x_at = x_ptr + read_n[:, None] * I + inner[None, :]
    blocks = tl.cdiv(I, 128)
    scale_at = scale_ptr + (read_o // SCALE_ROWS).to(tl.int64) * (blocks if IS_E4M3 else 1)
    y = tl.zeros((16, BAND), tl.float32)
    for block in range(split * SPLIT_BLOCKS, tl.minimum(blocks, (split + 1) * SPLIT_BLOCKS)):
        x = tl.load(x_at + block * 128, mask=inner[None, :] < I - block * 128, other=0.0)
        code = tl.load(code_at + block * 128, mask=inner[:, None] < I - block * 128, other=0)
        if IS_E4M3:
            product = tl.dot(x, decode_256th(code).to(x.dtype))
            y += product * tl.load(scale_at + block)[None, :]
        else:
            y = tl.dot(x, code.to(x.dtype), y)
    if IS_E4M3:
        y *= 256.0
    else:
        y *= tl.load(scale_at)[None, :]
    at = y_ptr + (split * N + row)[:, None] * O + output[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(row[:, None] < N) & (output[None, :] < O))


@triton.jit
def add_splits_kernel(part_ptr, y_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of the parts [SPLITS, count], always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        y += tl.load(part_ptr + split * count + at, mask=at < count, other=0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < count)
