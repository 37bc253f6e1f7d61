"""Products of slices of rows whose number differs from call to call, on a processor; no autograd.

    multiply_slice_:  out = rows @ matrix        outer_slice_:  out = leftᵀ @ right

The library generates a 16-bit product's machine code for each shape that it meets: some 8 ms where the product itself
takes 1, at every call where an expert gets another number of tokens each time.  So a slice is cut into parts whose
shapes come back: one whose rows are a multiple of 128 (for more than 1,024 rows, of an eighth of the least power of two
above), parts of 128, and what is left, in a copy that is filled up to 128.
Alive: where something is left, 128 rows of each operand and result.  An outer product is rounded once for each part.
Source: oneDNN's documentation of its primitive cache.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PART = 128
# Of the rows of all slices together: with fewer, what is alive in a copy would be a large share of them.
LEAST_ROWS = 2048


def multiply_slice_(out_NO: Tensor, rows_NI: Tensor, matrix_IO: Tensor, in_parts: bool) -> None:
    """Write rows @ matrix into out; all of one dtype.  in_parts: cut into shapes that come back."""
    for start, end in _parts(rows_NI.shape[0], in_parts):
        if not in_parts or (end - start) % PART == 0:
            torch.mm(rows_NI[start:end], matrix_IO, out=out_NO[start:end])
        else:
            filled = _filled(rows_NI[start:end])
            out_NO[start:end] = (filled @ matrix_IO)[: end - start]


def outer_slice_(out_OI: Tensor, left_NO: Tensor, right_NI: Tensor, in_parts: bool) -> None:
    """Write leftᵀ @ right into out, which may have another dtype than the two; zeros where they have no rows."""
    if left_NO.shape[0] == 0:
        out_OI.zero_()
    for start, end in _parts(left_NO.shape[0], in_parts):
        left, right = left_NO[start:end], right_NI[start:end]
        if in_parts and (end - start) % PART:
            left, right = _filled(left), _filled(right)
        if out_OI.dtype == left.dtype:
            out_OI.addmm_(left.mT, right, beta=float(start > 0))  # 0 ignores what was in memory
        elif start == 0:
            out_OI.copy_(left.mT @ right)
        else:
            out_OI.add_(left.mT @ right)


def takes_parts(rows: Tensor) -> bool:
    """Say whether products of slices of these rows are to be cut: of 16 bits on a processor, and many."""
    return rows.device.type == "cpu" and rows.element_size() == 2 and rows.shape[0] >= LEAST_ROWS


def _parts(rows: int, in_parts: bool) -> Iterator[tuple[int, int]]:
    if not in_parts:
        yield from [(0, rows)] if rows else []
        return
    step = max(PART, 1 << max(0, (rows - 1).bit_length() - 3))
    whole = rows // step * step
    if whole:
        yield 0, whole
    yield from ((start, min(start + PART, rows)) for start in range(whole, rows, PART))


def _filled(rows: Tensor) -> Tensor:
    """Return a copy of the rows with zeros below them, `PART` in all."""
    filled = rows.new_zeros(PART, rows.shape[1])
    filled[: rows.shape[0]] = rows
    return filled
