"""Quantisation of a matrix along its rows and along its columns from one read; no autograd.

    rows = quantise_rows(x)        columns = quantise_columns(x)        bit for bit, in either format

A gradient dy of rows is needed both ways: along its rows for dx = dy W, along its columns for dW = dyᵀ x.
Bytes moved on a card: x once (int8: twice, and 4 for each row and column of each block of 128), 1 for each number and
way, 4 for each scale.  Elsewhere two calls quantise.
Alive inside: the results; for int8 on a card those 4 bytes too.

Shapes: N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Launch, card_of, choose, converts_e4m3, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.opaque import opaque
from lowvram_kernels.quant.quantise import (
    BLOCK,
    FLOATING,
    FORMATS,
    ROUNDED_PRODUCTS,
    QuantTensor,
    launch_e4m3_blocks,
    new_rows,
    quantise_columns,
    quantise_rows,
    quantise_weight_both,
)

WARPS = 16


def reference(x: Tensor, format: str) -> tuple[QuantTensor, QuantTensor]:
    """Quantise along rows, then along columns, each from x."""
    return quantise_rows(x, format), quantise_columns(x, format)


def quantise_both_ways(x: Tensor, format: str) -> tuple[QuantTensor, QuantTensor]:
    """Round a matrix along its rows, and along its columns, turned.

    x: [N, K] fp32|bf16|fp16, of any strides.  format: "e4m3" or "int8".  Returns what `quantise_rows` and
    `quantise_columns` return: code [N, K] and [K, N] with their scales.
    Raises ShapeError if x, its dtype or the format is another.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    if format not in FORMATS or x.dim() != 2 or x.numel() == 0 or x.dtype not in FLOATING:
        found = f"{list(x.shape)} {x.dtype}, format {format!r}"
        raise ShapeError(f"quantise_both_ways: got {found}; needs [N, K], not empty, fp32, bf16 or fp16, e4m3 or int8.")
    if choose("quantise", card_of(x.device)).backend != "triton":
        return reference(x, format)
    x = x.detach()
    rows, columns = new_rows(x, format), new_rows(x.mT, format)
    if format == "e4m3":
        _launch_e4m3(x, *rows, *columns)
    else:
        _fill_int8(x, *rows, *columns)
    return rows, columns


def quantise_beside(xs: Sequence[Tensor]) -> tuple[QuantTensor, list[QuantTensor]]:
    """Round matrices of E4M3 both ways, and lay their rows beside each other.

    xs: [N, K_i] each, fp32|bf16|fp16 of any strides; every K_i but the last one is a multiple of 128.  Returns what
    `quantise_rows` returns of all of them side by side, [N, Σ K_i], and what `quantise_columns` returns of each.
    Raises ShapeError if widths or rows do not fit together.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    widths, rows = [x.shape[1] for x in xs], xs[0].shape[0]
    if any(width % BLOCK for width in widths[:-1]) or any(x.shape[0] != rows for x in xs):
        shapes = [list(x.shape) for x in xs]
        raise ShapeError(f"quantise_beside: got {shapes}; needs [N, K_i], all but the last of whole blocks of {BLOCK}.")
    if choose("quantise", card_of(xs[0].device)).backend != "triton":
        found = [quantise_both_ways(x, "e4m3") for x in xs]
        code, scale = (torch.cat(parts, 1) for parts in zip(*(rows for rows, _ in found), strict=True))
        return QuantTensor(code, scale), [columns for _, columns in found]
    code = torch.empty(rows, sum(widths), dtype=torch.uint8, device=xs[0].device)
    scale = torch.empty(rows, -(-sum(widths) // BLOCK), dtype=torch.float32, device=xs[0].device)
    columns, start = [], 0
    for x, width in zip(xs, widths, strict=True):
        columns.append(new_rows(x.mT, "e4m3"))
        first = start // BLOCK
        beside = code[:, start : start + width], scale[:, first : first - (-width // BLOCK)]
        _launch_e4m3(x.detach(), *beside, *columns[-1])
        start += width
    return QuantTensor(code, scale), columns


def quantise_weight_both_(w: Tensor, format: str, plain: QuantTensor, turned: QuantTensor) -> None:
    """Round a weight or a stack of them into memory that exists, as it lies and turned.

    w: [O, I] or [E, O, I] fp32|bf16|fp16.  plain, turned: of the shapes that `quantise_weight` returns without and with
    `transposed`; the turned ones may be columns of a larger matrix.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    if choose("quantise", card_of(w.device)).backend != "triton":
        for result, found in zip((plain, turned), quantise_weight_both(w, format), strict=True):
            result.code.copy_(found.code)
            result.scale.copy_(found.scale)
    elif format == "e4m3":
        launch_e4m3_blocks(w.detach(), *plain, *turned, False)
    else:
        for parts in zip(
            *(each if w.dim() == 3 else each[None] for each in (w.detach(), *plain, *turned)), strict=True
        ):
            _fill_int8(*parts)


def _fill_int8(x: Tensor, code: Tensor, scale: Tensor, turned_code: Tensor, turned_scale: Tensor) -> None:
    of_rows = torch.empty(-(-x.shape[1] // BLOCK), x.shape[0], dtype=torch.int32, device=x.device)
    of_columns = torch.empty(-(-x.shape[0] // BLOCK), x.shape[1], dtype=torch.int32, device=x.device)
    _launch_absmax(x, of_rows, of_columns)
    _launch_int8(x, of_rows, of_columns, code, scale, turned_code, turned_scale)


def _blocks_of(
    kernel: str, x: Tensor, tensors: tuple[Tensor, ...], constants: Mapping[str, object], strides: tuple[int, ...] = ()
) -> Launch:
    """Return a launch with a program for each block of x."""
    grid = (-(-x.shape[0] // BLOCK), -(-x.shape[1] // BLOCK))
    arguments = (x, *tensors, *x.shape, *x.stride(), *strides)
    return Launch("quant.both_ways_triton", kernel, grid, arguments, constants, WARPS)


def _run_e4m3(x: Tensor, code: Tensor, scale: Tensor, turned_code: Tensor, turned_scale: Tensor) -> None:
    results = (code, scale, turned_code, turned_scale)
    constants, strides = {"NATIVE": converts_e4m3(x.device)}, (code.stride(0), scale.stride(0))
    what = _blocks_of("e4m3_both_ways_kernel", x, results, constants, strides)
    launch(what, moved=(x, *results))


def _run_absmax(x: Tensor, of_rows: Tensor, of_columns: Tensor) -> None:
    what = _blocks_of("absmax_both_ways_kernel", x, (of_rows, of_columns), {})
    launch(what, moved=(x, of_rows, of_columns))


def _run_int8(
    x: Tensor,
    of_rows: Tensor,
    of_columns: Tensor,
    code: Tensor,
    scale: Tensor,
    turned_code: Tensor,
    turned_scale: Tensor,
) -> None:
    tensors = (of_rows, of_columns, code, scale, turned_code, turned_scale)
    what = _blocks_of("int8_both_ways_kernel", x, tensors, ROUNDED_PRODUCTS)
    launch(what, moved=(x, *tensors))


_CODES = ("code", "scale", "turned_code", "turned_scale")
_launch_e4m3 = opaque("quantise_e4m3_both_ways", _run_e4m3, _CODES)
_launch_absmax = opaque("quantise_absmax_both_ways", _run_absmax, ("of_rows", "of_columns"))
_launch_int8 = opaque("quantise_int8_both_ways", _run_int8, _CODES)
