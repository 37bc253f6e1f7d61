"""Grouped matrix product: many matrices times one slice of rows each, in one launch; no autograd.

    y[m] = stack[e] @ rows[m]        ends[e − 1] ≤ m < ends[e]

It is what a dropless mixture of experts computes: y forward, and dx with the stack transposed.  The slices' ends lie
on the device and stay there: M // block + C rows of tiles are launched, as many as any loads can need, and each program
finds its expert and its rows; those without rows end at once.  Sums are fp32 and in one fixed order.

Rows and stack are of one dtype; or both are E4M3 or both int8 (`quantise.py`), whose sums are int32 and scaled once; or
the stack is a low-precision copy (`idle.py`) that is decoded in registers and rounded to the rows' dtype, as
`idle.read_copy` rounds: the numbers are those of a product with the decoded copy, which never exists.  Scales of E4M3
must be powers of two where the card applies them itself ("mxfp8"), as `quantise.py` makes them unless told otherwise.

Alive: the result alone; copies of codes on both sides where K is no multiple of 16.  Bytes moved: rows, stack and
result, once.  Operations: 2·M·N·K.
Sources: the equation; Gale et al. 2022, "MegaBlocks", section 5 (one launch for all experts).

Shapes: M rows, sorted by expert; E experts, C of them in the stack; N outputs, K inputs of a matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Card, Launch, Tile, bytes_of, card_of, choose, is_interpreted, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.opaque import opaque
from lowvram_kernels.quant import e4m3
from lowvram_kernels.quant.quantise import BLOCK, FLOATING, MOST_INT8, QuantTensor, fill_lines, parts_of
from lowvram_kernels.remembered import remembered

# Tiles down before one across, so that the tiles of rows and of matrices are still in L2 when they are read again.
GROUP = 8
EXPECTED_MMA = {
    "mxfp8": "mxf8",
    "tensor": "e4m3",
    "storage": "f16",
    "int8": "s8",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


# For much work first, for little last: (of a slice's product, of an outer product).
_WIDE, _HIGH = Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)
_LOW, _FEW = Tile(64, 128, 64, 4, 3), Tile(16, 128, 64, 4, 3)
_HIGH_FP8 = Tile(128, 128, 128, 8, 3)
_LOW_INT8, _FEW_INT8 = Tile(64, 128, 128, 4, 3), Tile(16, 128, 128, 4, 3)
# Eight warps: four spill where a slice's sums pass int32.
_HIGH_INT8, _SQUARE_INT8 = Tile(128, 128, 64, 8, 4), Tile(64, 64, 128, 4, 3)
_SMALL, _SMALL_FEW = Tile(64, 64, 16, 4, 3), Tile(16, 64, 32, 4, 3)
_TILES: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    # Two of the first fit a multiprocessor of a GeForce: one computes while the other begins or ends.
    "half": ((Tile(128, 128, 32, 4, 4), _LOW, _FEW), (Tile(128, 128, 32, 4, 4), Tile(64, 64, 64, 4, 3))),
    "gathered": ((), (Tile(128, 128, 32, 8, 4), Tile(64, 64, 64, 4, 3))),
    "decode": ((Tile(128, 128, 32, 4, 4), _LOW, _FEW), ()),
    "single": ((_SMALL, _SMALL_FEW), (_SMALL,)),
    "storage": ((_HIGH_FP8, _LOW, _FEW), (_HIGH, _LOW)),
    "tensor": ((_HIGH_FP8, _LOW, _FEW), (_HIGH, _LOW)),
    "mxfp8": ((_HIGH_FP8, _LOW, _FEW), (_HIGH_FP8, _LOW)),
    "int8": ((Tile(128, 128, 64, 4, 4), _LOW_INT8, _FEW_INT8), (_HIGH_INT8, _SQUARE_INT8)),
}
# Its FP8 product takes 64 rows at least, and two sums of 128×128 spill where both sides have a scale for each row.
_HOPPER_TILES: dict[str, tuple[tuple[Tile, ...], tuple[Tile, ...]]] = {
    "half": ((_WIDE, _HIGH, _LOW, _FEW), (_WIDE, _HIGH, Tile(64, 64, 64, 4, 3))),
    "gathered": ((), (_HIGH, Tile(64, 64, 64, 4, 3))),
    "decode": ((_HIGH, _LOW, _FEW), ()),
    "tensor": ((_HIGH_FP8, _LOW), (Tile(64, 128, 128, 4, 3), _LOW)),
    "int8": ((Tile(128, 256, 128, 8, 3), _HIGH_FP8, _LOW_INT8, _FEW_INT8), (_HIGH_FP8, _SQUARE_INT8)),
}


class Gathered(NamedTuple):
    """Rows that are read where they lie: row m is rows[order[m] // choices].

    rows: [N, K] fp32|bf16|fp16.  order: [M] int32, as `sorting.sort_choices` returns it on a card.
    """

    rows: Tensor
    order: Tensor
    choices: int


def collected(side: Tensor | QuantTensor | Gathered) -> Tensor | QuantTensor:
    """Return gathered rows as a tensor of their own, others as they are."""
    return side.rows[side.order // side.choices] if isinstance(side, Gathered) else side


def operand_of(side: Tensor | QuantTensor | Gathered) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
    """Return numbers or codes, scales, order and choices.  Raises ShapeError if an order is not [M] int32."""
    if not isinstance(side, Gathered):
        return *parts_of(side), None, 1
    if side.order.dim() != 1 or side.order.dtype != torch.int32 or side.choices < 1:
        raise ShapeError(f"Gathered: order is {describe(side.order)}, choices {side.choices}; needs [M] int32, ≥ 1.")
    return side.rows, None, side.order, side.choices


def mask_M(ends_E: Tensor, count: int, expert: int) -> Tensor:
    """Return which of `count` rows are the expert's: bool [M]."""
    at_M = torch.arange(count, device=ends_E.device)
    is_before_end = at_M < ends_E[expert]
    return is_before_end if expert == 0 else is_before_end & (at_M >= ends_E[expert - 1])


def dequantise_operand(code: Tensor, scale: Tensor | None, dtype: torch.dtype, height: int) -> Tensor:
    """Return the numbers of a code [..., R, K]; E4M3's scales are of blocks height × 128, int8's of rows or columns."""
    if scale is None:
        return code.to(dtype)
    if code.dtype == torch.int8:
        return (code.float() * scale).to(dtype)
    whole = scale.repeat_interleave(height, -2)[..., : code.shape[-2], :]
    whole = whole.repeat_interleave(BLOCK, -1)[..., : code.shape[-1]]
    return (e4m3.decode(code, torch.float32) * whole).to(dtype)


def reference(
    rows: Tensor | QuantTensor,
    stack: Tensor | QuantTensor,
    ends: Tensor,
    first: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply all rows by every matrix and select, zeros where no expert of the stack has the row."""
    rows_MK, scale = parts_of(rows)
    if scale is not None:
        rows_MK = dequantise_operand(rows_MK, scale, torch.float32, 1)
    stack_CNK = dequantise_operand(*parts_of(stack), rows_MK.dtype, BLOCK)
    y_MN = rows_MK.new_zeros(rows_MK.shape[0], stack_CNK.shape[1])
    for index, matrix_NK in enumerate(stack_CNK):
        mask_M1 = mask_M(ends, len(rows_MK), first + index)[:, None]
        y_MN = torch.where(mask_M1, rows_MK @ matrix_NK.mT, y_MN)
    return y_MN.to(dtype or rows_MK.dtype)


def grouped_tiles(card: Card, kind: str, is_outer: bool = False) -> list[Tile]:
    """Return every tile that a product may take on a card.

    kind: "half" (16-bit numbers), "gathered" (such, one side of an outer product gathered), "decode" (a stack in other
    numbers than the rows), "single" (fp32), "int8" (on both
    sides), or for E4M3 on both sides "mxfp8", "tensor" or "storage".
    """
    is_hopper = card.capability is not None and card.capability[0] in (9, 10)
    # An int, because Dynamo of torch 2.11 takes no truth for an index.
    found = (_HOPPER_TILES.get(kind, _TILES[kind]) if is_hopper else _TILES[kind])[int(is_outer)]
    bytes_of_both = {"half": 4, "gathered": 4, "decode": 4, "single": 8}.get(kind, 2)
    return [
        tile
        for tile in found
        if (tile.rows + tile.columns) * tile.depth * tile.stages * bytes_of_both // 2 <= card.shared_bytes
    ]


@remembered
def choose_grouped_tile(card: Card, kind: str, rows: float, columns: int, count: int, is_outer: bool = False) -> Tile:
    """Choose the tile for `count` products of rows × columns numbers; rows: of one expert, in the mean.

    The largest that is no more than a third empty and gives each multiprocessor something to do.
    """
    found = grouped_tiles(card, kind, is_outer)
    filled = [tile for tile in found if tile.rows <= 1.5 * rows] or found[-1:]
    for tile in filled:
        if count * -(-rows // tile.rows) * -(-columns // tile.columns) >= card.multiprocessors:
            return tile
    return filled[-1]


def kind_of(left: Tensor, right: Tensor, is_scaled: bool) -> str:
    """Return how two operands are multiplied, in the words of `grouped_tiles`.  is_scaled: both are, with scales."""
    if left.dtype == torch.int8:
        return "int8"  # of "int8_matmul", which is "tensor" on every card that has these launches
    if is_scaled:
        backend = choose("fp8_matmul", card_of(left.device)).backend
        # The interpreter has no block-scaled product.
        return "tensor" if backend == "mxfp8" and is_interpreted() else backend
    if left.dtype == torch.float32:
        return "single"
    return "half" if left.dtype == right.dtype else "decode"


def _scale_strides(code_CNK: Tensor, scale: Tensor | None) -> tuple[str, tuple[int, int, int]]:
    """Return what a stack's scales belong to, in the kernel's word, and their strides along C, N and K."""
    if scale is None:
        return "none", (0, 0, 0)
    expert, row, column = scale.stride()
    if code_CNK.dtype == torch.uint8:
        return "block", (expert, row, column)
    return ("n", (expert, row, 0)) if scale.shape[2] == 1 else ("k", (expert, 0, column))


def _launch_multiply(
    rows_MK: Tensor,
    rows_scale: Tensor | None,
    code_CNK: Tensor,
    scale: Tensor | None,
    ends_E: Tensor,
    order_M: Tensor | None,
    choices: int,
    first: int,
    out_MN: Tensor,
    tile: list[int],
) -> None:
    rows, (count, outputs, inputs), it = out_MN.shape[0], code_CNK.shape, Tile(*tile)
    slots = rows // it.rows + count
    grid = (slots * -(-outputs // it.columns),)
    kind = kind_of(rows_MK, code_CNK, rows_scale is not None)
    constants: dict[str, Any] = {
        "FIRST": first,
        "COUNT": count,
        "EXPERTS": 1 << (count - 1).bit_length(),
        "HAS_WHOLE_K": inputs % it.depth == 0,
        "BLOCK_M": it.rows,
        "BLOCK_N": it.columns,
        "BLOCK_K": it.depth,
        "GROUP": GROUP,
    }
    sizes = (outputs, inputs, slots)
    arguments: tuple[Any, ...]
    if rows_scale is not None:
        kernel = "multiply_int8_kernel" if kind == "int8" else "multiply_fp8_kernel"
        if kind != "int8":
            constants["WAY"] = kind
        arguments = (rows_MK, rows_scale, code_CNK, scale, ends_E, out_MN, *sizes)
    else:
        kernel, (constants["SCALE"], scale_strides) = "multiply_kernel", _scale_strides(code_CNK, scale)
        constants["IS_TURNED"] = code_CNK.stride(1) == 1 and code_CNK.stride(2) != 1
        constants["CHOICES"] = choices
        arguments = (rows_MK, code_CNK, scale, ends_E, order_M, out_MN, *sizes)
        arguments += (*rows_MK.stride(), *code_CNK.stride(), *scale_strides)
    expected_mma = EXPECTED_MMA.get(kind if rows_scale is not None else rows_MK.dtype, "")
    what = Launch("moe.grouped_matmul_triton", kernel, grid, arguments, constants, it.warps, it.stages, expected_mma)
    # Which experts are chosen is not known in meta mode: all are taken to have as many rows.
    share = count / ends_E.shape[0]
    read = bytes_of(rows_MK, rows_scale) if order_M is None else rows * inputs * rows_MK.element_size()
    moved = share * (read + bytes_of(order_M, out_MN)) + bytes_of(code_CNK, scale)
    operand_bytes = share * read + bytes_of(code_CNK, scale)
    launch(what, 2.0 * share * rows * outputs * inputs, moved, operand_bytes)


_multiply_op = opaque("grouped_matmul", _launch_multiply, ("out_MN",))


def grouped_matmul(
    rows: Tensor | QuantTensor | Gathered,
    stack: Tensor | QuantTensor,
    ends: Tensor,
    first: int = 0,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply each expert's rows by its matrix transposed, in one launch and without waiting for the device.

    rows: [M, K] fp32|bf16|fp16, also gathered; E4M3 in blocks of 1×128, or int8 with scales [M, 1].  stack: of experts
    first … first + C − 1, [C, N, K] fp32|bf16|fp16, E4M3 in blocks of 128×128 or int8 with scales [C, N, 1] or
    [C, 1, K]; any strides, so that a stack [C, K, N] comes as its views' `.mT`.  E4M3 rows need an E4M3 stack, int8
    rows an int8 stack with scales [C, N, 1], and both contiguous.
    ends: [E] int64|int32, where each expert's rows end, never falling, at most M.  dtype: of the result; without it
    rows' dtype, bf16 for E4M3 and int8.  out: [M, N], contiguous: other experts' rows stay as they are there; in a
    result made here they mean nothing.  tile: one of `grouped_tiles`, chosen without it.
    Returns [M, N].  Has no gradient of its own.  Where there is no Triton it is `reference`, C times the work.
    Raises ShapeError if shapes, dtypes or devices do not fit together, or K is over 133,144 for int8 on both sides.
    """
    rows_MK, rows_scale, order_M, choices = operand_of(rows)
    code_CNK, scale = parts_of(stack)
    _check_multiply(rows_MK, rows_scale, code_CNK, scale, ends, first)
    if dtype is None:
        dtype = out.dtype if out is not None else torch.bfloat16 if rows_scale is not None else rows_MK.dtype
    shape = (rows_MK.shape[0] if order_M is None else order_M.shape[0], code_CNK.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=rows_MK.device)
    if out.shape != shape or out.dtype != dtype or dtype not in FLOATING or not out.is_contiguous():
        raise ShapeError(
            f"grouped_matmul: out is {describe(out)}; needs {list(shape)} {dtype}, floating and contiguous."
        )
    card = card_of(rows_MK.device)
    if choose("grouped_matmul", card).backend != "triton":
        is_own_M = mask_M(ends, shape[0], first + code_CNK.shape[0] - 1)
        for index in range(code_CNK.shape[0] - 1):
            is_own_M |= mask_M(ends, shape[0], first + index)
        return out.copy_(torch.where(is_own_M[:, None], reference(collected(rows), stack, ends, first, dtype), out))
    if tile is None:
        kind, rows_of_one = kind_of(rows_MK, code_CNK, rows_scale is not None), shape[0] / ends.shape[0]
        tile = choose_grouped_tile(card, kind, rows_of_one, shape[1], code_CNK.shape[0])
    if rows_scale is not None:
        rows_MK, code_CNK = fill_lines(rows_MK), fill_lines(code_CNK)
    _multiply_op(rows_MK, rows_scale, code_CNK, scale, ends, order_M, choices, first, out, list(tile))
    return out


def describe(tensor: Tensor | None) -> str:
    """Return shape and dtype, for errors."""
    return "None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"


def check_ends(what: str, ends: Tensor, last: int, device: torch.device) -> None:
    """Raise ShapeError, naming `what`, unless ends are of `last` experts or more and lie beside the rows."""
    if ends.dim() != 1 or ends.dtype not in (torch.int64, torch.int32) or ends.device != device or len(ends) < last:
        raise ShapeError(
            f"{what}: ends is {describe(ends)} on {ends.device}; needs [E ≥ {last}], integer, on {device}."
        )


def _check_multiply(
    rows: Tensor, rows_scale: Tensor | None, code: Tensor, scale: Tensor | None, ends: Tensor, first: int
) -> None:
    what = f"grouped_matmul: rows are {describe(rows)}, scale {describe(rows_scale)}"
    what += f"; stack {describe(code)}, scale {describe(scale)}"
    if rows.dim() != 2 or code.dim() != 3 or code.shape[2] != rows.shape[1] or 0 in code.shape or first < 0:
        raise ShapeError(f"{what}; needs [M, K] and [C, N, K], and first ≥ 0.")
    (count, outputs, inputs), blocks = code.shape, -(-rows.shape[1] // BLOCK)
    needed: list[list[int] | None] = [None]
    if code.dtype == torch.uint8:
        needed = [[count, -(-outputs // BLOCK), blocks]]
    elif code.dtype == torch.int8:
        needed = [[count, outputs, 1], [count, 1, inputs]]
    elif code.dtype not in FLOATING:
        raise ShapeError(f"{what}; a stack is fp32, bf16, fp16, uint8 or int8.")
    found = None if scale is None else list(scale.shape)
    if found not in needed or (scale is not None and scale.dtype != torch.float32):
        raise ShapeError(f"{what}; the stack's scale needs {' or '.join(map(str, needed))}, fp32.")
    if rows_scale is None and rows.dtype not in FLOATING:
        raise ShapeError(f"{what}; rows without a scale are fp32, bf16 or fp16.")
    if rows_scale is not None:
        is_int8 = rows.dtype == torch.int8
        is_right = rows.dtype == code.dtype in (torch.uint8, torch.int8) and found == needed[0]
        is_right = is_right and rows_scale.dtype == torch.float32
        is_right = is_right and list(rows_scale.shape) == [rows.shape[0], 1 if is_int8 else blocks]
        if not is_right or not all(t.is_contiguous() for t in (rows, rows_scale, code, scale) if t is not None):
            rule = f"E4M3 rows need scales [M, {blocks}] and an E4M3 stack, int8 rows [M, 1] and one of [C, N, 1]"
            raise ShapeError(f"{what}; {rule}, all contiguous.")
        if is_int8 and rows.shape[1] > MOST_INT8:
            raise ShapeError(f"{what}; int32 holds int8's sums over {MOST_INT8} at most.")
    check_ends("grouped_matmul", ends, first + count, rows.device)
    if code.device != rows.device:
        raise ShapeError(f"{what}; the stack lies on {code.device}, the rows on {rows.device}.")
