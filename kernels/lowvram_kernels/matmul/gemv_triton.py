"""Products of a few rows with an 8-bit weight: each program reads a band of the weight's rows and adds in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.quant.e4m3_triton import decode_256th


@triton.jit
def number_of(code, dtype: tl.constexpr, IS_E4M3: tl.constexpr, NATIVE: tl.constexpr):
    """Return codes in dtype, exactly; E4M3 comes divided by 256 where the card does not convert by itself."""
    if not IS_E4M3:
        return code.to(dtype)
    if NATIVE:
        return code.to(tl.float8e4nv, bitcast=True).to(dtype)
    return decode_256th(code).to(dtype)


@triton.jit
def add_products(sums, x_at, weight, is_inside):
    """Add the products of a row's numbers, which lie for every output as its weights do: so none changes threads."""
    return sums + weight * tl.load(x_at, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def store_row(y_ptr, sums, factor, output, row, rows, outputs, split):
    """Store the sums of one row of y [splits, rows, outputs]."""
    at = y_ptr + (split * rows + row) * outputs + output
    tl.store(at, (tl.sum(sums, 1) * factor).to(y_ptr.dtype.element_ty), mask=(output < outputs) & (row < rows))


@triton.jit
def few_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    SPLIT_BLOCKS,
    SCALE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BAND: tl.constexpr,
    IS_E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """y[split, n, o] = the part of Σᵢ x[n, i] · weight[o, i] that lies in the split's blocks of 128.

    Programs: bands of BAND outputs × splits × groups of ROWS (1, 2, 4) rows.  SCALE_ROWS: 1 or 128 outputs of a scale.
    UNROLL: blocks whose bytes are asked for at once.
    """
    split, first = tl.program_id(1), tl.program_id(2) * ROWS
    output = tl.program_id(0) * BAND + tl.arange(0, BAND)
    inner = tl.arange(0, 128)
    read_o = tl.minimum(output, outputs - 1)
    code_at = code_ptr + read_o.to(tl.int64)[:, None] * inputs + inner[None, :]
    x_at = x_ptr + inner[None, :] + tl.zeros((BAND, 1), tl.int32)
    blocks = tl.cdiv(inputs, 128)
    scale_at = scale_ptr + (read_o // SCALE_ROWS).to(tl.int64) * (blocks if IS_E4M3 else 1)
    sums_0 = tl.zeros((BAND, 128), tl.float32)
    sums_1, sums_2, sums_3 = sums_0, sums_0, sums_0
    end = tl.minimum(blocks, (split + 1) * SPLIT_BLOCKS)
    for block in tl.range(split * SPLIT_BLOCKS, end, loop_unroll_factor=UNROLL):
        is_inside = inner[None, :] < inputs - block * 128
        weight = number_of(tl.load(code_at + block * 128, mask=is_inside, other=0), tl.float32, IS_E4M3, NATIVE)
        if IS_E4M3:
            weight *= tl.load(scale_at + block)[:, None]
        x_block = x_at + block * 128
        sums_0 = add_products(sums_0, x_block + tl.minimum(first, rows - 1) * inputs, weight, is_inside)
        if ROWS > 1:
            sums_1 = add_products(sums_1, x_block + tl.minimum(first + 1, rows - 1) * inputs, weight, is_inside)
        if ROWS > 2:
            sums_2 = add_products(sums_2, x_block + tl.minimum(first + 2, rows - 1) * inputs, weight, is_inside)
            sums_3 = add_products(sums_3, x_block + tl.minimum(first + 3, rows - 1) * inputs, weight, is_inside)
    factor = (1.0 if NATIVE else 256.0) if IS_E4M3 else tl.load(scale_at)
    store_row(y_ptr, sums_0, factor, output, first, rows, outputs, split)
    if ROWS > 1:
        store_row(y_ptr, sums_1, factor, output, first + 1, rows, outputs, split)
    if ROWS > 2:
        store_row(y_ptr, sums_2, factor, output, first + 2, rows, outputs, split)
        store_row(y_ptr, sums_3, factor, output, first + 3, rows, outputs, split)


@triton.jit
def sixteen_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    SPLIT_BLOCKS,
    SCALE_ROWS: tl.constexpr,
    BAND: tl.constexpr,
    IS_E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """The same for up to 16 rows of 16-bit numbers, on tensor cores: each block's product is scaled and added."""
    split = tl.program_id(1)
    output = tl.program_id(0) * BAND + tl.arange(0, BAND)
    row = tl.arange(0, 16)
    inner = tl.arange(0, 128)
    read_o, read_n = tl.minimum(output, outputs - 1), tl.minimum(row, rows - 1)
    code_at = code_ptr + read_o.to(tl.int64)[None, :] * inputs + inner[:, None]
    x_at = x_ptr + read_n[:, None] * inputs + inner[None, :]
    blocks = tl.cdiv(inputs, 128)
    scale_at = scale_ptr + (read_o // SCALE_ROWS).to(tl.int64) * (blocks if IS_E4M3 else 1)
    y = tl.zeros((16, BAND), tl.float32)
    for block in range(split * SPLIT_BLOCKS, tl.minimum(blocks, (split + 1) * SPLIT_BLOCKS)):
        x = tl.load(x_at + block * 128, mask=inner[None, :] < inputs - block * 128, other=0.0)
        code = tl.load(code_at + block * 128, mask=inner[:, None] < inputs - block * 128, other=0)
        weight = number_of(code, x.dtype, IS_E4M3, NATIVE)
        if IS_E4M3:
            y += tl.dot(x, weight) * tl.load(scale_at + block)[None, :]
        else:
            y = tl.dot(x, weight, y)
    if not IS_E4M3:
        y *= tl.load(scale_at)[None, :]
    elif not NATIVE:
        y *= 256.0
    at = y_ptr + (split * rows + row)[:, None] * outputs + output[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(row[:, None] < rows) & (output[None, :] < outputs))


@triton.jit
def add_splits_kernel(part_ptr, y_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of the parts [SPLITS, count], always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        y += tl.load(part_ptr + split * count + at, mask=at < count, other=0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=at < count)
