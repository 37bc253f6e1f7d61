"""Quantisation of matrices to 8 bits with scales, for products that sum along their rows; no autograd.

    e4m3    x ≈ code · scale     scale = the least normal power of two with absmax ≤ 448 · scale, of each block:
                                 1 × 128 numbers (rows) or 128 × 128 (weights)
    int8    x ≈ code · scale     scale = absmax / 127 of each row; code = x · (1 / scale) to the nearest, ties to even

Every operand of a product is contiguous along the summed dimension, so that one kernel serves a layer's three products:
    y = x Wᵀ: rows of x, weight    dx = dy W: rows of dy, transposed weight    dW = dyᵀ x: columns of dy, columns of x
A block of 128 × 128 is the same block transposed: dx sees the very weight that y saw.
One round trip errs by at most 2⁻⁴·|x| (e4m3; 2⁻¹⁰·scale where |x| < 2⁻⁶·scale) or absmax / 254 (int8).
NaN or infinity makes the scale of its block (int8: of its row) NaN, so that all of it decodes to NaN.
A block of zeros has codes 0.  The two backends agree bit for bit.

Bytes moved on a card: x once, 1 for each number and 4 for each scale; x twice for int8 of rows and columns that one
program cannot hold.  Some twenty integer operations for each number: bound by memory.
Alive inside: on a card the results, and for those int8 rows 4 bytes for each slice of 512 or 2,048 numbers; else the
results, for transposed ones a byte more for each number, and what `blocks.py` has at work.

Sources: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3; Open Compute Project 2023, "Microscaling Formats (MX)", section 5.

Shapes: N rows, K numbers that a product sums, A × B blocks of R × C numbers; E matrices of a stack, O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.dispatch import Launch, Tile, card_of, choose, converts_e4m3, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.opaque import opaque
from lowvram_kernels.quant import blocks, e4m3
from lowvram_kernels.remembered import remembered

FORMATS = ("e4m3", "int8")
BLOCK = 128
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
# Products of two numbers up to 127 whose sum int32 holds.
MOST_INT8 = (2**31 - 1) // 127**2


class QuantTensor(NamedTuple):
    """A matrix in 8 bits, or a stack of them: code · scale.

    code: [N, K] or [E, N, K], uint8 (the bytes of E4M3) | int8.  scale: fp32, [N, ⌈K/128⌉] (rows of E4M3),
    [⌈N/128⌉, ⌈K/128⌉] (weights of E4M3) or [N, 1] (int8), after E.  Both contiguous, save in views of a transposed
    stack, which `grouped_matmul` takes.
    """

    code: Tensor
    scale: Tensor


def parts_of(operand: Tensor | QuantTensor) -> tuple[Tensor, Tensor | None]:
    """Return the codes and scales of a quantised tensor; of a plain one itself and None."""
    return (operand, None) if isinstance(operand, Tensor) else operand


def join_parts(code: Tensor, scale: Tensor | None) -> Tensor | QuantTensor:
    """Return what `parts_of` takes apart."""
    return code if scale is None else QuantTensor(code, scale)


# Codes leave a program 16 bytes a thread; 4,096 numbers are 32 for each thread.
_E4M3_ROWS = (Tile(8, 512, 512), Tile(32, 128, 128))
_E4M3_COLUMNS = (Tile(64, 128, 128, warps=8),)
_INT8_ROWS = (Tile(4, 1024, 1024), Tile(2, 2048, 2048), Tile(1, 4096, 4096), Tile(1, 8192, 8192, warps=8))
# Columns that a program holds whole: 16 of them are 32 bytes of bf16, what memory gives at once.
_INT8_COLUMNS = (Tile(16, 512, 512, 8), Tile(16, 1024, 1024, 16), Tile(16, 2048, 2048, 32))
# Rows too long for a program, and columns (32 of them are 64 bytes of bf16), in slices of four steps.
_INT8_SLICES = (Tile(8, 2048, 512), Tile(32, 512, 128))
# Of INT8's kernels: the product with the reciprocal is rounded before it is rounded to a code.
ROUNDED_PRODUCTS = {"enable_fp_fusion": False}
_DEQUANTISE = Tile(32, 128, 128)


def quantise_tiles(format: str, is_transposed: bool) -> list[Tile]:
    """Return every tile that may be chosen to quantise rows or, is_transposed, columns: the same on every card."""
    if format == "e4m3":
        return list(_E4M3_COLUMNS if is_transposed else _E4M3_ROWS)
    return [*_INT8_COLUMNS, _INT8_SLICES[1]] if is_transposed else [*_INT8_ROWS, _INT8_SLICES[0]]


@remembered
def choose_quantise_tile(format: str, width: int, is_transposed: bool) -> Tile:
    """Choose the tile for rows of `width` numbers, or is_transposed for columns."""
    found = quantise_tiles(format, is_transposed)
    if format == "e4m3":
        return found[0] if width >= found[0].columns else found[-1]
    return next((tile for tile in found if not _is_slice(tile) and width <= tile.columns), found[-1])


def _is_slice(tile: Tile) -> bool:
    """Say whether rows are cut into slices, whose largest magnitudes another kernel finds first."""
    return tile.depth < tile.columns


def reference(x: Tensor, format: str, block: tuple[int, int] = (1, BLOCK)) -> Tensor:
    """Return what a matrix is after its round trip, by the formulas above and without any 8-bit dtype: fp64 [N, K].

    block: rows and columns that share a scale of E4M3.
    """
    x_NK, found_NK = x.double(), torch.zeros_like(x, dtype=torch.float64)
    height, width = block if format == "e4m3" else (1, x.shape[1])
    for row in range(0, x.shape[0], height):
        for column in range(0, x.shape[1], width):
            place = slice(row, row + height), slice(column, column + width)
            part = x_NK[place]
            absmax = part.abs().max()
            if not absmax.isfinite():
                found_NK[place] = torch.nan
            elif format == "int8" and absmax > 0:
                found_NK[place] = (part / (absmax / blocks.INT8_MAX)).round() * (absmax / blocks.INT8_MAX)
            elif absmax > 0:
                scale = torch.exp2((absmax / e4m3.MAX).log2().ceil())
                # Three bits behind the leading one; numbers below 2⁻⁶ share its spacing.
                spacing = scale * torch.exp2((part / scale).abs().log2().floor().clamp_min(-6.0) - 3.0)
                found_NK[place] = (part / spacing).round() * spacing
    return found_NK


def quantise_rows(x: Tensor, format: str, fp32_scales: bool = False) -> QuantTensor:
    """Round a matrix that a product will sum along its rows.

    x: [N, K] fp32|bf16|fp16, of any strides.  format: one of `FORMATS`.  fp32_scales: scale = absmax / 448 in fp32, as
    DeepSeek's older files have it.  Returns code [N, K]; scale [N, ⌈K/128⌉] (e4m3) or [N, 1] (int8).
    Raises ShapeError if x, its dtype or the format is another.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    _check("quantise_rows", x, format, fp32_scales, (2,))
    return _quantise_rows(x.detach(), format, fp32_scales)


def quantise_columns(x: Tensor, format: str, fp32_scales: bool = False) -> QuantTensor:
    """Round a matrix that a product will sum along its columns, and turn it: as `quantise_rows` of x transposed.

    x: [N, K] fp32|bf16|fp16, of any strides.  Returns code [K, N]; scale [K, ⌈N/128⌉] (e4m3) or [K, 1] (int8).
    Raises ShapeError if x, its dtype or the format is another.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    _check("quantise_columns", x, format, fp32_scales, (2,))
    return _quantise_rows(x.detach().mT, format, fp32_scales)


def quantise_weight(w: Tensor, format: str, transposed: bool = False, fp32_scales: bool = False) -> QuantTensor:
    """Round a weight or a stack of them, as they lie or each one transposed.

    w: [O, I] or [E, O, I] fp32|bf16|fp16, of any strides.  Returns code [O, I] or, transposed, [I, O], after E; scale
    [⌈O/128⌉, ⌈I/128⌉] or transposed (e4m3: the same numbers), [O, 1] or [I, 1] (int8: of the rows of what is returned).
    Raises ShapeError if w, its dtype or the format is another.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    _check("quantise_weight", w, format, fp32_scales, (2, 3))
    if format == "int8":
        w = w.detach()
        return _quantise_rows(w.mT if transposed else w, format, False)
    found = _quantise_blocks(w.detach(), fp32_scales, not transposed, transposed)[int(transposed)]
    assert found is not None
    return found


def quantise_weight_both(w: Tensor, format: str, fp32_scales: bool = False) -> tuple[QuantTensor, QuantTensor]:
    """Round a weight or a stack of them and return it as it lies and transposed; E4M3 reads it once for both.

    w and what is returned: as in `quantise_weight`.
    Raises ShapeError if w, its dtype or the format is another.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 3.3.
    """
    if format != "e4m3":
        return quantise_weight(w, format), quantise_weight(w, format, transposed=True)
    _check("quantise_weight_both", w, format, fp32_scales, (2, 3))
    plain, flipped = _quantise_blocks(w.detach(), fp32_scales, True, True)
    assert plain is not None
    assert flipped is not None
    return plain, flipped


def dequantise(scaled: QuantTensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers of codes: code · scale in fp32, rounded once to dtype.

    scaled: of any format and shape above.  dtype: fp32|bf16|fp16.  Returns [N, K] or [E, N, K].
    Raises ShapeError if code, scale and dtype do not fit together.
    """
    code, scale = scaled
    block = _block_of(code, scale)
    if dtype not in FLOATING:
        raise ShapeError(f"dequantise: dtype is {dtype}; needs fp32, bf16 or fp16.")
    x = torch.empty(code.shape, dtype=dtype, device=code.device)
    if choose("quantise", card_of(code.device)).backend == "triton":
        _launch_dequantise(code, scale, x, block[0])
        return x
    for x_NK, code_NK, scale_AB in zip(*map(_matrices, (x, code, scale)), strict=True):
        blocks.decode_(x_NK, code_NK, scale_AB, block)
    return x


def fill_lines(code: Tensor) -> Tensor:
    """Return codes whose rows are padded with zeros to whole 16 bytes, the same tensor where they are.

    Other rows could only be read byte by byte, and addresses would fill the registers.
    """
    missing = -code.shape[-1] % 16
    return F.pad(code, (0, missing)) if missing else code


def _check(what: str, x: Tensor, format: str, fp32_scales: bool, dimensions: tuple[int, ...]) -> None:
    if format not in FORMATS or (fp32_scales and format != "e4m3"):
        raise ShapeError(f"{what}: format is {format!r}; needs one of {', '.join(FORMATS)}, for fp32_scales e4m3.")
    if x.dim() not in dimensions or x.numel() == 0 or x.dtype not in FLOATING:
        needed = " or ".join(("[N, K]", "[E, O, I]")[: len(dimensions)])
        raise ShapeError(f"{what}: got {list(x.shape)} {x.dtype}; needs {needed}, not empty, fp32, bf16 or fp16.")


def _block_of(code: Tensor, scale: Tensor) -> tuple[int, int]:
    """Return the rows and columns of code that share a scale."""
    if code.dim() not in (2, 3) or code.numel() == 0 or code.dtype not in (torch.uint8, torch.int8):
        raise ShapeError(f"dequantise: code is {list(code.shape)} {code.dtype}; needs [N, K], uint8 or int8.")
    rows, width = code.shape[-2:]
    blocks_of_code = [(1, BLOCK), (BLOCK, BLOCK)] if code.dtype == torch.uint8 else [(1, width)]
    shapes = [[*code.shape[:-2], -(-rows // height), -(-width // columns)] for height, columns in blocks_of_code]
    if list(scale.shape) not in shapes or scale.dtype != torch.float32:
        needed = " or ".join(map(str, shapes))
        raise ShapeError(f"dequantise: scale is {list(scale.shape)} {scale.dtype}; this code needs {needed}, fp32.")
    if not (code.is_contiguous() and scale.is_contiguous()) or code.device != scale.device:
        raise ShapeError("dequantise: code and scale need to be contiguous, on one device.")
    return blocks_of_code[shapes.index(list(scale.shape))]


def _new(x: Tensor, format: str, block: tuple[int, int]) -> QuantTensor:
    """Allocate the result for x."""
    return new_codes(x.shape, format, block, x.device)


def new_codes(shape: Sequence[int], format: str, block: tuple[int, int], device: torch.device) -> QuantTensor:
    """Allocate codes of this shape, and scales for blocks of so many rows and columns."""
    *stack, rows, width = shape
    code = torch.empty(*stack, rows, width, dtype=torch.uint8 if format == "e4m3" else torch.int8, device=device)
    blocks_of_code = (*stack, -(-rows // block[0]), -(-width // block[1]))
    return QuantTensor(code, torch.empty(blocks_of_code, dtype=torch.float32, device=device))


def new_rows(x: Tensor, format: str) -> QuantTensor:
    """Allocate the codes and scales of x's rows."""
    return _new(x, format, (1, BLOCK if format == "e4m3" else x.shape[-1]))


def new_weight(shape: Sequence[int], format: str, device: torch.device) -> QuantTensor:
    """Allocate the codes and scales of a weight or a stack of them.  shape: of the codes."""
    return new_codes(shape, format, (BLOCK, BLOCK) if format == "e4m3" else (1, shape[-1]), device)


def _quantise_rows(x: Tensor, format: str, fp32_scales: bool, tile: Tile | None = None) -> QuantTensor:
    """Round the rows of [N, K] or [E, N, K]."""
    block = (1, BLOCK if format == "e4m3" else x.shape[-1])
    # A view that is contiguous along N is read along N.
    is_transposed = x.stride(-1) != 1 and x.stride(-2) == 1
    if choose("quantise", card_of(x.device)).backend != "triton":
        return (
            _transpose(_encode(x.mT, format, fp32_scales, block[::-1]))
            if is_transposed
            else _encode(x, format, fp32_scales, block)
        )
    tile = tile or choose_quantise_tile(format, x.shape[-1], is_transposed)
    result = _new(x, format, block)
    if format == "e4m3":
        _launch_e4m3_rows(x, *result, fp32_scales, [*tile])
    elif not _is_slice(tile):
        _launch_int8_rows(x, *result, [*tile])
    else:
        slices = -(-x.shape[-1] // tile.columns)
        absmax = torch.empty(*x.shape[:-2], slices, x.shape[-2], dtype=torch.int32, device=x.device)
        _launch_absmax(x, absmax, [*tile])
        _launch_int8_slices(x, absmax, *result, [*tile])
    return result


def _quantise_blocks(
    w: Tensor, fp32_scales: bool, plain: bool, transposed: bool
) -> tuple[QuantTensor | None, QuantTensor | None]:
    """Round the 128 × 128 blocks of [O, I] or [E, O, I], as it lies and transposed."""
    block = (BLOCK, BLOCK)
    if choose("quantise", card_of(w.device)).backend != "triton":
        found = _encode(w, "e4m3", fp32_scales, block)
        return found, _transpose(found) if transposed else None
    results = _new(w, "e4m3", block) if plain else None, _new(w.mT, "e4m3", block) if transposed else None
    launch_e4m3_blocks(w, *(results[0] or (None, None)), *(results[1] or (None, None)), fp32_scales)
    return results


def _encode(x: Tensor, format: str, fp32_scales: bool, block: tuple[int, int]) -> QuantTensor:
    result = _new(x, format, block)
    for x_NK, code_NK, scale_AB in zip(*map(_matrices, (x, *result)), strict=True):
        blocks.encode_(code_NK, scale_AB, x_NK, block, fp32_scales)
    return result


def _transpose(scaled: QuantTensor) -> QuantTensor:
    return QuantTensor(scaled.code.mT.contiguous(), scaled.scale.mT.contiguous())


def _matrices(x: Tensor) -> list[Tensor]:
    return [x] if x.dim() == 2 else list(x.unbind(0))


def _opaque(name: str, *outputs: str) -> Callable[[Callable[..., None]], Any]:
    """Make a launch one op, which a compiler does not look into."""
    return lambda run: opaque(name, run, outputs)


def _axes(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """Return E, N, K and the three strides."""
    count, stride = (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)
    return count, x.shape[-2], x.shape[-1], stride, x.stride(-2), x.stride(-1)


@_opaque("quantise_e4m3_rows", "code", "scale")
def _launch_e4m3_rows(x: Tensor, code: Tensor, scale: Tensor, fp32_scales: bool, tile: list[int]) -> None:
    count, *axes = _axes(x)
    rows, columns, _, warps, _ = tile
    constants = {"ROWS": rows, "COLUMNS": columns, "HAS_FP32_SCALES": fp32_scales, "NATIVE": converts_e4m3(x.device)}
    grid = (-(-axes[0] // rows), -(-axes[1] // columns), count)
    what = Launch("quant.quantise_triton", "e4m3_rows_kernel", grid, (x, code, scale, *axes), constants, warps)
    launch(what, moved=(x, code, scale))


@_opaque("quantise_e4m3_blocks", "code", "scale", "transposed_code", "transposed_scale")
def launch_e4m3_blocks(
    w: Tensor,
    code: Tensor | None,
    scale: Tensor | None,
    transposed_code: Tensor | None,
    transposed_scale: Tensor | None,
    fp32_scales: bool,
) -> None:
    """Round the blocks of [O, I] or [E, O, I] into memory that exists; turned codes may be columns of a whole."""
    count, *axes = _axes(w)
    results = (code, scale, transposed_code, transposed_scale)
    constants = {"HAS_FP32_SCALES": fp32_scales, "NATIVE": converts_e4m3(w.device)}
    grid = (-(-axes[0] // BLOCK), -(-axes[1] // BLOCK), count)
    strides = [0 if part is None else part.stride(-2) for part in (transposed_code, transposed_scale)]
    arguments = (w, *results, *axes, *strides)
    what = Launch("quant.quantise_triton", "e4m3_blocks_kernel", grid, arguments, constants, warps=16)
    launch(what, moved=(w, *results))


@_opaque("quantise_int8_rows", "code", "scale")
def _launch_int8_rows(x: Tensor, code: Tensor, scale: Tensor, tile: list[int]) -> None:
    count, *axes = _axes(x)
    rows, columns, _, warps, _ = tile
    constants = {"ROWS": rows, "COLUMNS": columns, **ROUNDED_PRODUCTS}
    grid = (-(-axes[0] // rows), 1, count)
    what = Launch("quant.quantise_triton", "int8_rows_kernel", grid, (x, code, scale, *axes), constants, warps)
    launch(what, moved=(x, code, scale))


@_opaque("quantise_absmax", "absmax")
def _launch_absmax(x: Tensor, absmax: Tensor, tile: list[int]) -> None:
    what = _sliced("absmax_kernel", x, (x, absmax), tile)
    launch(what, moved=(x, absmax))


@_opaque("quantise_int8_slices", "code", "scale")
def _launch_int8_slices(x: Tensor, absmax: Tensor, code: Tensor, scale: Tensor, tile: list[int]) -> None:
    what = _sliced("int8_slices_kernel", x, (x, absmax, code, scale), tile)
    launch(what, moved=(x, absmax, code, scale))


def _sliced(kernel: str, x: Tensor, tensors: tuple[Tensor, ...], tile: list[int]) -> Launch:
    count, *axes = _axes(x)
    rows, columns, depth, warps, _ = tile
    constants = {"ROWS": rows, "COLUMNS": depth, "TURNS": columns // depth, **ROUNDED_PRODUCTS}
    grid = (-(-axes[0] // rows), -(-axes[1] // columns), count)
    return Launch("quant.quantise_triton", kernel, grid, (*tensors, *axes), constants, warps)


@_opaque("dequantise", "x")
def _launch_dequantise(code: Tensor, scale: Tensor, x: Tensor, block_rows: int) -> None:
    count, rows, width = _axes(code)[:3]
    sizes = (rows, width, scale.shape[-2], scale.shape[-1])
    tile, is_e4m3 = _DEQUANTISE, code.dtype == torch.uint8
    constants = {"BLOCK_ROWS": block_rows, "ROWS": tile.rows, "COLUMNS": tile.columns, "IS_E4M3": is_e4m3}
    grid = (-(-rows // tile.rows), -(-width // tile.columns), count)
    what = Launch("quant.quantise_triton", "dequantise_kernel", grid, (code, scale, x, *sizes), constants, tile.warps)
    launch(what, moved=(code, scale, x))
