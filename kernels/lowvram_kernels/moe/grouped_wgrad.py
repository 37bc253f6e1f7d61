"""Weight gradients of a grouped product, each from one slice of rows, in one launch; no autograd.

    out[e] = Σ_m left[m]ᵀ right[m]        ends[e − 1] ≤ m < ends[e]

One program computes one tile of one expert and loops over its rows, so that every element is written, zeros for an
expert without rows, and nothing is added atomically: sums are fp32 and in one fixed order.  The ends lie on the device.

E4M3 and int8 come from `quantise.quantise_columns`.  E4M3 has blocks of 128 rows at multiples of 128, wherever slices
end: one that straddles two slices has one scale for both, and a NaN in it is both experts' NaN.  Int8 has one scale for
a column of all rows: a NaN in it is the NaN of every expert that has rows.  Its sums are int32, which is exact.

Alive: the result alone; copies of both codes where M is no multiple of 16.  Bytes moved: both sides and the result,
once.  Operations: 2·M·O·I.
Source: the chain rule of `grouped_matmul`.

Shapes: M rows, sorted by expert; E experts, W of them resident; each result is [O, I].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Launch, Tile, bytes_of, card_of, choose, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe.grouped_matmul import (
    EXPECTED_MMA,
    GROUP,
    Gathered,
    check_ends,
    choose_grouped_tile,
    collected,
    dequantise_operand,
    describe,
    kind_of,
    mask_M,
    operand_of,
)
from lowvram_kernels.opaque import opaque
from lowvram_kernels.quant.quantise import BLOCK, FLOATING, QuantTensor, fill_lines

# Rows of int8 whose sums int32 holds, in whole tiles: at most quantise.MOST_INT8.
_TERMS = 2**17


def reference(
    left: Tensor | QuantTensor, right: Tensor | QuantTensor, ends: Tensor, resident: int, dtype: torch.dtype
) -> Tensor:
    """Sum the outer products of each expert's rows, of all rows with the others' made zero."""
    left_MO, right_MI = (
        side if isinstance(side, Tensor) else dequantise_operand(*side, torch.float32, 1).mT for side in (left, right)
    )
    sums = []
    for expert in range(resident):
        mask_M1 = mask_M(ends, len(left_MO), expert)[:, None]
        left_O, right_I = (torch.where(mask_M1, side, 0.0) for side in (left_MO, right_MI))
        sums.append((left_O.mT @ right_I).to(dtype))
    return torch.stack(sums)


def _launch_outer(
    left: Tensor,
    left_scale: Tensor | None,
    right: Tensor,
    right_scale: Tensor | None,
    ends_E: Tensor,
    left_order_M: Tensor | None,
    right_order_M: Tensor | None,
    choices: int,
    adds: bool,
    out_WOI: Tensor,
    tile: list[int],
) -> None:
    (count, outputs, inputs), it = out_WOI.shape, Tile(*tile)
    grid = (count * -(-outputs // it.rows) * -(-inputs // it.columns),)
    kind = kind_of(left, right, left_scale is not None)
    constants: dict[str, Any] = {"BLOCK_O": it.rows, "BLOCK_I": it.columns, "BLOCK_M": it.depth, "GROUP": GROUP}
    arguments: tuple[Any, ...]
    if left_scale is not None:
        rows = left.shape[1]
        if kind == "int8":
            kernel = "outer_int8_kernel"
            constants |= {"TERMS": _TERMS, "IS_LONG": rows > _TERMS}
        else:
            kernel, constants["WAY"] = "outer_fp8_kernel", kind
        arguments = (left, left_scale, right, right_scale, ends_E, out_WOI, rows, outputs, inputs)
    else:
        kernel, rows = "outer_kernel", (left if left_order_M is None else left_order_M).shape[0]
        constants |= {"CHOICES": choices, "ADDS": adds}
        arguments = (left, right, ends_E, left_order_M, right_order_M, out_WOI, outputs, inputs)
        arguments += (*left.stride(), *right.stride())
    expected_mma = EXPECTED_MMA.get(kind if left_scale is not None else left.dtype, "")
    what = Launch("moe.grouped_wgrad_triton", kernel, grid, arguments, constants, it.warps, it.stages, expected_mma)
    share = count / ends_E.shape[0]
    read = rows * (outputs + inputs) * left.element_size() + bytes_of(left_scale, right_scale)
    moved = share * (read + bytes_of(left_order_M, right_order_M)) + (2 if adds else 1) * bytes_of(out_WOI)
    launch(what, 2.0 * share * rows * outputs * inputs, moved, share * read)


_outer_op = opaque("grouped_outer", _launch_outer, ("out_WOI",))


def grouped_wgrad(
    left: Tensor | QuantTensor | Gathered,
    right: Tensor | QuantTensor | Gathered,
    ends: Tensor,
    resident: int,
    dtype: torch.dtype,
    tile: Tile | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Sum left[m]ᵀ right[m] over each expert's rows: the gradients of a stack's matrices, in one launch.

    left: [M, O], right: [M, I], fp32|bf16|fp16 of one dtype, also gathered; or columns [O, M] and [I, M], both
    E4M3 in blocks of 1×128 or both int8 with scales [O, 1] and [I, 1].
    ends: [E] int64|int32, where each expert's rows end, never falling, at most M.  resident: how many experts, from
    the first.  dtype: of the result, rounded once from fp32.  tile: one of `grouped_tiles`, chosen without it.
    total: [resident, O, I] in dtype, contiguous, to which the sums of sides without scales are added, in its place.
    Returns [resident, O, I], zeros for an expert without rows.  Has no gradient of its own.
    Raises ShapeError if shapes, dtypes or devices do not fit together.
    """
    left_code, left_scale, left_order_M, left_choices = operand_of(left)
    right_code, right_scale, right_order_M, right_choices = operand_of(right)
    is_plain = left_scale is None
    lengths = [_length(left_code, is_plain, left_order_M), _length(right_code, is_plain, right_order_M)]
    _check_outer(left_code, left_scale, right_code, right_scale, lengths, ends, resident, dtype)
    card = card_of(left_code.device)
    if choose("grouped_matmul", card).backend != "triton":
        sums = reference(collected(left), collected(right), ends, resident, dtype)
        return sums if total is None else total.add_(sums)
    side = 1 if left_scale is None else 0
    shape = resident, left_code.shape[side], right_code.shape[side]
    if total is not None and (
        total.shape != shape or total.dtype != dtype or not total.is_contiguous() or left_scale is not None
    ):
        raise ShapeError(
            f"grouped_wgrad: total is {describe(total)}; needs {list(shape)} {dtype}, and sides without scales."
        )
    out = torch.empty(shape, dtype=dtype, device=left_code.device) if total is None else total
    if tile is None:
        kind = kind_of(left_code, right_code, left_scale is not None)
        if kind == "half" and (left_order_M is not None or right_order_M is not None):
            kind = "gathered"  # whose pointers take registers
        tile = choose_grouped_tile(card, kind, shape[1], shape[2], resident, is_outer=True)
    if left_scale is not None:
        left_code, right_code = fill_lines(left_code), fill_lines(right_code)
    orders = left_order_M, right_order_M, max(left_choices, right_choices)
    _outer_op(left_code, left_scale, right_code, right_scale, ends, *orders, total is not None, out, list(tile))
    return out


def _length(code: Tensor, is_plain: bool, order_M: Tensor | None) -> int:
    if order_M is not None:
        return order_M.shape[0]
    return -1 if code.dim() != 2 else code.shape[0 if is_plain else 1]


def _check_outer(
    left: Tensor,
    left_scale: Tensor | None,
    right: Tensor,
    right_scale: Tensor | None,
    lengths: list[int],
    ends: Tensor,
    resident: int,
    dtype: torch.dtype,
) -> None:
    what = f"grouped_wgrad: left is {describe(left)}, scale {describe(left_scale)}"
    what += f"; right {describe(right)}, scale {describe(right_scale)}"
    if left.dim() != 2 or right.dim() != 2 or lengths[0] != lengths[1] or left.dtype != right.dtype:
        raise ShapeError(f"{what}; needs [M, O] and [M, I] of one dtype, or scaled [O, M] and [I, M].")
    if left_scale is None and right_scale is None:
        is_right = left.dtype in FLOATING
    else:
        blocks = 1 if left.dtype == torch.int8 else -(-left.shape[1] // BLOCK)
        pairs = ((left, left_scale), (right, right_scale))
        is_right = left.dtype in (torch.uint8, torch.int8) and all(
            scale is not None
            and list(scale.shape) == [code.shape[0], blocks]
            and scale.dtype == torch.float32
            and code.is_contiguous()
            and scale.is_contiguous()
            for code, scale in pairs
        )
    if not is_right:
        rule = "needs fp32, bf16 or fp16 without scales, or contiguous with fp32 scales, uint8 of 1×128 or int8 of rows"
        raise ShapeError(f"{what}; {rule}.")
    if resident < 1 or dtype not in FLOATING:
        raise ShapeError(f"grouped_wgrad: resident is {resident}, dtype {dtype}; needs 1 or more, fp32, bf16 or fp16.")
    check_ends("grouped_wgrad", ends, resident, left.device)
    if right.device != left.device:
        raise ShapeError(f"{what}; they lie on {left.device} and {right.device}.")
