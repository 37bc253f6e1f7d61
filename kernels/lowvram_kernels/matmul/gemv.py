"""The product of a few rows with an 8-bit weight, as decoding needs it.

    y[n, o] = Σᵢ x[n, i] · code[o, i] · scale[o, i]        scale by 128×128 or 1×128 blocks (E4M3) or by row (INT8)

With so few rows the time is that of reading the weight's bytes once.  A program reads a
band of the weight's rows, 16 bytes a thread, and adds in fp32.  Up to 4 rows are multiplied one by one; more rows of
16-bit numbers are padded to 16 and go to tensor cores, from capability 8.0 on, else in groups of 4, whose bands come
from the L2 cache again.  Where a weight has too few rows to keep a card busy, its columns are split: the splits'
sums lie in fp32 [splits, N, O] and are added in one order, so that the result is deterministic.

Alive inside: y, the splits' sums.  Operations: 2·N·O·I.  Bytes moved: O·I of codes; the rest is small.
Source: the definition; splitting what is summed ("split-K") is common practice.

Shapes: N rows, at most 16, O outputs, I inputs, S splits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.dispatch import Card, Launch, Tile, bytes_of, card_of, choose, converts_e4m3, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.scaled_matmul import rows_of_scale
from lowvram_kernels.opaque import opaque
from lowvram_kernels.quant.quantise import BLOCK, FLOATING, QuantTensor, dequantise
from lowvram_kernels.remembered import remembered

MOST_ROWS = 16
# Rows of a program without tensor cores.
_MOST_FEW = 4
# Warps that a multiprocessor needs to keep enough loads in flight; the fewest blocks of 128 inputs of a split.
_WARPS, _LEAST_BLOCKS = 8, 4
_ADDED = 256  # elements that a program adds over the splits


# Largest first; columns are outputs, a band of the weight.  A thread always reads 16 bytes of each block of 128 inputs.
_TILES = {
    "few_rows_kernel": (Tile(_MOST_FEW, 16, BLOCK, 4, 1), Tile(_MOST_FEW, 4, BLOCK, 1, 1)),
    "sixteen_rows_kernel": (Tile(MOST_ROWS, 64, BLOCK, 4, 4), Tile(MOST_ROWS, 32, BLOCK, 2, 4)),
}


def reference(x: Tensor, weight: QuantTensor) -> Tensor:
    """Decode the weight to x's dtype and multiply."""
    return F.linear(x, dequantise(weight, x.dtype))


def kernel_of(card: Card, rows: int, dtype: torch.dtype) -> str:
    """Return the kernel for so many rows: a key of the tables here."""
    has_tensor_cores = card.features.has_triton_dot and dtype != torch.float32
    # On an H200 four rows by few_rows took 54 µs, sixteen by tensor cores 13 (4,096 × 4,096, E4M3, 2026-11-27).
    return "sixteen_rows_kernel" if rows > 1 and has_tensor_cores else "few_rows_kernel"


def gemv_tiles(kernel: str) -> list[Tile]:
    """Return every tile that may be chosen for a kernel, largest first."""
    return list(_TILES[kernel])


@remembered
def choose_gemv_tile(card: Card, kernel: str, outputs: int) -> Tile:
    """Choose the largest tile whose programs keep every multiprocessor busy, else the smallest."""
    for tile in _TILES[kernel]:
        if -(-outputs // tile.columns) * tile.warps >= _WARPS * card.multiprocessors:
            return tile
    return _TILES[kernel][-1]


@remembered
def choose_splits(card: Card, tile: Tile, outputs: int, inputs: int) -> int:
    """Choose into how many parts the inputs are cut: no more than fill the card, nor shorter than is worth it."""
    warps, blocks = -(-outputs // tile.columns) * tile.warps, -(-inputs // BLOCK)
    wanted = max(1, min(_WARPS * card.multiprocessors // warps, blocks // _LEAST_BLOCKS))
    return -(-blocks // -(-blocks // wanted))


def gemv(x: Tensor, weight: QuantTensor) -> Tensor:
    """Multiply up to 16 rows by the transposed weight, in x's dtype.

    x: [N, I] fp32|bf16|fp16, N ≤ 16.  weight: code [O, I], scale [⌈O/128⌉, ⌈I/128⌉] or [O, ⌈I/128⌉] for E4M3, [O, 1]
    for INT8.  Returns [N, O].  Sums are fp32 and rounded once; the result is deterministic.  No node of autograd.
    Raises ShapeError if shapes, dtypes or devices do not fit, the code is not contiguous, or N is more than 16.
    Source: the definition.
    """
    rows_of_scale(weight, "gemv: weight")
    if x.dim() != 2 or x.shape[1] != weight.code.shape[1] or x.dtype not in FLOATING or x.device != weight.code.device:
        found = (
            f"x is {list(x.shape)} {x.dtype} on {x.device}, weight {list(weight.code.shape)} on {weight.code.device}"
        )
        raise ShapeError(f"gemv: {found}; needs [N, I] fp32, bf16 or fp16 on the weight's device.")
    if x.shape[0] > MOST_ROWS:
        raise ShapeError(f"gemv: x has {x.shape[0]} rows; takes {MOST_ROWS} at most, scaled_matmul takes more.")
    card = card_of(x.device)
    if not (x.numel() and weight.code.numel()):
        return x.new_empty(x.shape[0], weight.code.shape[0])
    weight = QuantTensor(weight.code, weight.scale.contiguous())
    if choose("small_matmul", card).backend == "reference":
        return reference(x, weight)
    kernel = kernel_of(card, x.shape[0], x.dtype)
    tile = choose_gemv_tile(card, kernel, weight.code.shape[0])
    return multiply_bands(x, weight, kernel, tile, choose_splits(card, tile, *weight.code.shape))


def multiply_bands(x: Tensor, weight: QuantTensor, kernel: str, tile: Tile, splits: int) -> Tensor:
    """Multiply by a kernel, band by band; `gemv` has checked the arguments.

    kernel: a key of `gemv_tiles`.  splits: parts of at least one block of 128 inputs, none empty; for the gate and the
    tests, which force each one.
    """
    rows, outputs = x.shape[0], weight.code.shape[0]
    y_NO = x.new_empty(rows, outputs)
    part_SNO = y_NO if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    _launch_bands(x.contiguous(), weight.code, weight.scale, part_SNO, kernel, list(tile), splits)
    if splits > 1:
        _launch_adding(part_SNO, y_NO)
    return y_NO


def _launch_kernel(
    x_NI: Tensor, code_OI: Tensor, scale: Tensor, part: Tensor, kernel: str, tile: list[int], splits: int
) -> None:
    (N, I), O, chosen = x_NI.shape, code_OI.shape[0], Tile(*tile)  # noqa: E741
    is_e4m3 = code_OI.dtype == torch.uint8
    constants: dict[str, Any] = {
        "SCALE_ROWS": rows_of_scale(QuantTensor(code_OI, scale), "weight"),
        "BAND": chosen.columns,
    }
    constants |= {"IS_E4M3": is_e4m3, "NATIVE": is_e4m3 and converts_e4m3(x_NI.device)}
    groups, expected_mma = 1, "bf16" if x_NI.dtype == torch.bfloat16 else "f16"
    if kernel == "few_rows_kernel":
        constants["ROWS"] = 1 if N == 1 else 2 if N == 2 else _MOST_FEW
        # As many blocks at once as registers can hold; rows of odd lengths are read byte by byte, which takes more.
        constants["UNROLL"] = 1 if I % 16 else min(4, 16 // (constants["ROWS"] * x_NI.element_size()))
        groups, expected_mma = -(-N // constants["ROWS"]), ""
    grid = (-(-O // chosen.columns), splits, groups)
    blocks = -(-I // BLOCK)
    arguments = (x_NI, code_OI, scale, part, N, O, I, -(-blocks // splits))
    what = Launch("matmul.gemv_triton", kernel, grid, arguments, constants, chosen.warps, chosen.stages, expected_mma)
    read = bytes_of(x_NI, code_OI, scale)
    launch(what, flops=2.0 * N * O * I, moved_bytes=read + bytes_of(part), operand_bytes=read)


_launch_bands = opaque("small_matmul", _launch_kernel, ("part",))


def _launch_adding_kernel(part_SNO: Tensor, y_NO: Tensor) -> None:
    count = y_NO.numel()
    constants = {"SPLITS": part_SNO.shape[0], "BLOCK": _ADDED}
    grid = (-(-count // _ADDED),)
    moved = 4.0 * part_SNO.numel() + y_NO.element_size() * count
    launch(Launch("matmul.gemv_triton", "add_splits_kernel", grid, (part_SNO, y_NO, count), constants), 0.0, moved)


_launch_adding = opaque("add_splits", _launch_adding_kernel, ("y_NO",))
