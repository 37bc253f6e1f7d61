"""The routed experts of a mixture-of-experts layer, dropless; takes the router's choices and weights as arguments.

    y_n = Σ_k weights[n, k] · down[e] @ (silu(g) · u),   [g | u] = gate_up[e] @ x_n,   e = ids[n, k]

The N·K choices are sorted by expert, so that an expert's rows are one slice.  The routing weight multiplies the
product before `down`, so down's output is not needed again: with h = w·p, p = silu(g)·u,
    dh = dy @ down[e]    dweights = Σ_i dh·p    dp = w·dh    ddown[e] = Σ dyᵀ h    dgate_up[e] = Σ d[g|u]ᵀ x
Rows return to their tokens by the inverse permutation and a sum over K, which adds in one fixed order.

Of the E experts W may be resident and E − W idle.  Resident experts are masters and learn.  Idle experts are frozen
copies in low precision (`idle.py`): they take part in the forward pass and in dx, and get no gradient.  Slots 0 … W−1
are the resident ones.

Where Triton runs, one launch multiplies all slices of a stack (`grouped_matmul.py`, `grouped_wgrad.py`): the host never
waits for the device, and idle matrices are decoded in registers.  Elsewhere a loop over the experts calls the library,
the slices' ends lie on the host, and an idle matrix whose numbers no product takes is decoded, at each use, into a
scratch buffer of one matrix.  On a processor that loop cuts 16-bit slices into shapes that come back (`slices.py`).

Saved for backward: x, weights, the sort order [N·K], the slices' ends [E], [g | u] [N·K, 2I], the masters and the idle
copies (as stored, not decoded); everything else is computed again.
Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.1.2; the gradient is the chain rule.

Shapes: N tokens, K choices of each, M = N·K rows, E experts, W of them resident, D width, I inner width, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.dispatch import bytes_of, card_of, choose, is_simulated, note_work, uncounted
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.fp32_sums import leaves_of, sum_of
from lowvram_kernels.matmul.kept_casts import cast
from lowvram_kernels.matmul.kept_codes import codes_of
from lowvram_kernels.matmul.quant_linear import MatmulFormat, check_matmul_format
from lowvram_kernels.matmul.slices import multiply_slice_, outer_slice_, takes_parts
from lowvram_kernels.moe.grouped_matmul import Gathered, grouped_matmul, operand_of
from lowvram_kernels.moe.grouped_wgrad import grouped_wgrad
from lowvram_kernels.moe.idle import Stack, check_stack, needs_decoding, read_copy
from lowvram_kernels.moe.sorting import Sorted, combine, inverse_of, sort_choices
from lowvram_kernels.moe.weighted_swiglu import weighted_product, weighted_product_backward
from lowvram_kernels.quant.both_ways import quantise_both_ways
from lowvram_kernels.quant.quantise import (
    QuantTensor,
    dequantise,
    join_parts,
    parts_of,
    quantise_columns,
    quantise_rows,
)


def reference(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    idle: tuple[Stack, Stack] | None = None,
) -> Tensor:
    """Run every expert on every token and select; autograd of it is the gradient's truth."""
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    if idle is not None:
        gate_up, down = (
            torch.stack([*master, *(read_copy(stack, index, x.dtype) for index in range(len(parts_of(stack)[0])))])
            for master, stack in zip((gate_up, down), idle, strict=True)
        )
    gate, up = torch.einsum("nd,eid->nei", x, gate_up).chunk(2, dim=-1)
    out_NED = torch.einsum("nei,edi->ned", F.silu(gate) * up, down)
    chosen_NKD = out_NED.gather(1, ids[..., None].expand(-1, -1, x.shape[1]))
    return (weights[..., None].to(x.dtype) * chosen_NKD).sum(1)


# Why not torch.nn.functional.grouped_mm: it refuses widths that are not multiples of 16 bytes, has no meta form
# in fp32 and fp16, and outside sm_90/100 is itself a loop that waits for the device at each call.  On CPU the two
# are equally fast.  These two are ops of their own, so that in meta mode their host loop does not run; the ends come
# on the host, so that a layer waits once and not six times.
@torch.library.custom_op("lowvram_kernels::multiply_slices", mutates_args=("scratch",))
def _multiply_slices(
    rows_MI: Tensor,
    stack_WIO: Tensor,
    ends_E: Tensor,
    code: Tensor | None,
    scale: Tensor | None,
    scratch: Tensor | None,
    is_transposed: bool,
) -> Tensor:
    """Multiply the rows of each expert's slice by its matrix: [M, O].  No argument has a default: torch 2.11 trips.

    code, scale: the idle stack of the slots from W on.  is_transposed: its matrices are [O, I].  scratch: one of them
    in rows' dtype, needed where the code must be decoded; what is left in it means nothing.
    """
    out_MO = rows_MI.new_empty(rows_MI.shape[0], stack_WIO.shape[2])
    resident, start, in_parts = stack_WIO.shape[0], 0, takes_parts(rows_MI)
    for expert, end in enumerate(ends_E.tolist()):
        if expert < resident:
            multiply_slice_(out_MO[start:end], rows_MI[start:end], stack_WIO[expert], in_parts)
        elif start < end and code is not None:
            matrix = read_copy(join_parts(code, scale), expert - resident, rows_MI.dtype, scratch)
            matrix = matrix.mT if is_transposed else matrix
            multiply_slice_(out_MO[start:end], rows_MI[start:end], matrix, in_parts)
        start = end
    return out_MO


@_multiply_slices.register_fake
def _(rows_MI: Tensor, stack_WIO: Tensor, *_: Any) -> Tensor:
    return rows_MI.new_empty(rows_MI.shape[0], stack_WIO.shape[2])


@torch.library.custom_op("lowvram_kernels::sum_outer_slices", mutates_args=())
def _sum_outer_slices(left_MO: Tensor, right_MI: Tensor, ends_E: Tensor, dtype: torch.dtype, resident: int) -> Tensor:
    """Sum leftᵀ @ right over each resident expert's slice, zero where it is empty: [W, O, I] in dtype."""
    out_WOI = left_MO.new_empty(resident, left_MO.shape[1], right_MI.shape[1], dtype=dtype)
    start, in_parts = 0, takes_parts(left_MO)
    for expert, end in enumerate(ends_E[:resident].tolist()):
        outer_slice_(out_WOI[expert], left_MO[start:end], right_MI[start:end], in_parts)
        start = end
    return out_WOI


@_sum_outer_slices.register_fake
def _(left_MO: Tensor, right_MI: Tensor, ends_E: Tensor, dtype: torch.dtype, resident: int) -> Tensor:
    return left_MO.new_empty(resident, left_MO.shape[1], right_MI.shape[1], dtype=dtype)


def _rows_of_tokens(x_NI: Tensor, order_M: Tensor, choices: int, matmul_format: MatmulFormat) -> Tensor | Gathered:
    """Return the tokens' rows, repeated and sorted, [M, I]: on a card read where they lie, unless they are rounded."""
    if order_M.dtype == torch.int32 and matmul_format == "plain":
        return Gathered(x_NI, order_M, choices)
    return x_NI.index_select(0, order_M // choices)


def _multiply_tokens(
    x_NI: Tensor,
    order_M: Tensor,
    choices: int,
    master_WOI: Tensor,
    idle: tuple[Tensor | None, Tensor | None],
    ends_E: Tensor,
    is_transposed: bool,
    matmul_format: MatmulFormat,
) -> Tensor:
    """Multiply the tokens' rows, repeated and sorted, by their experts' matrices [O, I]: [M, O].

    x is rounded before it is repeated, if nothing reads its own numbers: the same bits for a K-th of the work.
    """
    has_copies = idle[0] is not None and idle[0].shape[0] > 0
    if matmul_format == "plain" or has_copies or not _is_one_launch(x_NI.device):
        rows = _rows_of_tokens(x_NI, order_M, choices, matmul_format)
        return _multiply(rows, master_WOI, idle, ends_E, is_transposed, matmul_format)
    code, scale = quantise_rows(x_NI, matmul_format)
    token_M = order_M // choices
    weight = codes_of(master_WOI, matmul_format, transposed=not is_transposed)
    return grouped_matmul(QuantTensor(code[token_M], scale[token_M]), weight, ends_E, dtype=x_NI.dtype)


def _multiply(
    rows: Tensor | Gathered,
    master: Tensor,
    idle: tuple[Tensor | None, Tensor | None],
    ends_E: Tensor,
    is_transposed: bool,
    matmul_format: MatmulFormat,
) -> Tensor:
    """Multiply each slice by its expert's matrix, of both stacks: [M, O].  is_transposed: matrices are [O, I].

    Rows that idle copies read are never rounded: of a copy the weight is low already.
    """
    code, scale = idle
    if isinstance(rows, Gathered) or _is_one_launch(rows.device):
        out_MO = None
        if master.shape[0]:
            out_MO = _multiply_residents(rows, master, ends_E, is_transposed, matmul_format)
        if code is not None and code.shape[0]:
            copies = join_parts(code, scale)
            if not is_transposed:
                copies = join_parts(code.mT, None if scale is None else scale.mT)
            out_MO = grouped_matmul(rows, copies, ends_E, first=master.shape[0], out=out_MO)
        assert out_MO is not None, "there is an expert of one kind or the other"
        return out_MO
    rows_MI = rows
    if matmul_format == "plain":
        stack = cast(master, rows_MI.dtype)
        stack = stack.mT if is_transposed else stack
    else:
        stack = dequantise(codes_of(master, matmul_format, transposed=not is_transposed), rows_MI.dtype).mT
        rows_MI = _round_residents_rows(rows_MI, ends_E, master.shape[0], matmul_format)
    scratch = None
    if code is not None and needs_decoding(code, rows_MI.dtype):
        # Made here and not inside the op, which a rehearsal cannot look into.
        scratch = rows_MI.new_empty(code.shape[1:])
    out_MO = _multiply_slices(rows_MI, stack, ends_E, code, scale, scratch, is_transposed)
    if code is not None and scratch is not None and is_simulated():
        _show_decoding(join_parts(code, scale), scratch)
    return out_MO


def _multiply_residents(
    rows: Tensor | Gathered, master: Tensor, ends_E: Tensor, is_transposed: bool, matmul_format: MatmulFormat
) -> Tensor:
    if isinstance(rows, Gathered) or matmul_format == "plain":
        stack = cast(master, operand_of(rows)[0].dtype)
        return grouped_matmul(rows, stack if is_transposed else stack.mT, ends_E)
    weight = codes_of(master, matmul_format, transposed=not is_transposed)
    return grouped_matmul(quantise_rows(rows, matmul_format), weight, ends_E, dtype=rows.dtype)


def _round_residents_rows(rows_MI: Tensor, ends_E: Tensor, resident: int, matmul_format: MatmulFormat) -> Tensor:
    """Return the rows rounded to a low format, for a product of the library; rows of idle experts stay as they are."""
    rounded_MI = dequantise(quantise_rows(rows_MI, matmul_format), rows_MI.dtype)
    if resident == ends_E.shape[0]:
        return rounded_MI
    is_residents_M = torch.arange(rows_MI.shape[0], device=rows_MI.device) < ends_E[resident - 1].to(rows_MI.device)
    return torch.where(is_residents_M[:, None], rounded_MI, rows_MI)


def _sum_outer(
    left: Tensor | Gathered | QuantTensor,
    right: Tensor | Gathered,
    ends_E: Tensor,
    master: Tensor,
    matmul_format: MatmulFormat,
) -> Tensor | None:
    """Sum leftᵀ @ right over each resident expert's slice: the master's gradient, [W, O, I] in its dtype.

    left: its columns' codes where they exist.

    None where it has been added to the master's `.grad`: see `fp32_sums.py`.
    """
    resident, dtype = master.shape[0], master.dtype
    if isinstance(left, QuantTensor):
        assert isinstance(right, Tensor), "tokens' rows are gathered where they are not rounded"
        return grouped_wgrad(left, quantise_columns(right, matmul_format), ends_E, resident, dtype)
    if isinstance(left, Gathered) or isinstance(right, Gathered):
        total = sum_of(master)
        sums = grouped_wgrad(left, right, ends_E, resident, dtype if total is None else torch.float32, total=total)
        return sums if total is None else None
    if matmul_format == "plain":
        if _is_one_launch(left.device):
            return grouped_wgrad(left, right, ends_E, resident, dtype)
        return _sum_outer_slices(left, right, ends_E, dtype, resident)
    columns = quantise_columns(left, matmul_format), quantise_columns(right, matmul_format)
    if _is_one_launch(left.device):
        return grouped_wgrad(*columns, ends_E, resident, dtype)
    rounded = [dequantise(side, left.dtype).mT for side in columns]
    return _sum_outer_slices(*rounded, ends_E, dtype, resident)


def _is_one_launch(device: torch.device) -> bool:
    return choose("grouped_matmul", card_of(device)).backend == "triton"


def _show_decoding(copies: Stack, scratch: Tensor) -> None:
    """In meta mode, allocate what decoding a copy allocates, and report the bytes that decoding all of them moves.

    That is besides the codes and one scratch buffer, which a rehearsal sees: each scratch is written and read.
    """
    with uncounted():
        read_copy(copies, 0, scratch.dtype, scratch)
    code, scale = parts_of(copies)
    count, passes = code.shape[0], 2 if scale is None else 4
    note_work(moved_bytes=(count * passes - 1) * bytes_of(scratch), ops=count * passes // 2)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        added: Tensor | None,
        order_M: Tensor,
        place_M: Tensor,
        ends_E: Tensor,
        gate_up_code: Tensor | None,
        gate_up_scale: Tensor | None,
        down_code: Tensor | None,
        down_scale: Tensor | None,
        matmul_format: MatmulFormat,
    ) -> Tensor:
        ctx.matmul_format = matmul_format
        idle_gate_up, idle_down = (gate_up_code, gate_up_scale), (down_code, down_scale)
        choices = weights.shape[1]
        gate_up_MI = _multiply_tokens(x, order_M, choices, gate_up, idle_gate_up, ends_E, True, matmul_format)
        # Places of 8 bytes are made again in backward, as cheap as they are.
        kept_place_M = place_M if place_M.dtype == torch.int32 else None
        kept = x, gate_up, down, weights, order_M, kept_place_M, ends_E, gate_up_MI
        ctx.save_for_backward(*kept, *idle_gate_up, *idle_down)
        ctx.leaves = leaves_of(gate_up, down)
        h_MI = weighted_product(gate_up_MI, weights, order_M)
        out_MD = _multiply(h_MI, down, idle_down, ends_E, True, matmul_format)
        return combine(out_MD, place_M, choices, added)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, order_M, place_M, ends_E, gate_up_MI, *idle = ctx.saved_tensors
        if ctx.leaves is not None:
            gate_up, down = ctx.leaves
        idle_gate_up, idle_down = (idle[0], idle[1]), (idle[2], idle[3])
        needs_dx, needs_dgate_up, needs_ddown, needs_dweights, needs_added = ctx.needs_input_grad[:5]
        choices, matmul_format = weights.shape[1], ctx.matmul_format
        dx = dgate_up = ddown = None
        dh_MI = _multiply_tokens(dy, order_M, choices, down, idle_down, ends_E, False, matmul_format)
        d_gate_up_MI, h_MI, dweights = weighted_product_backward(dh_MI, gate_up_MI, weights, order_M, needs_dweights)
        del dh_MI
        if needs_ddown:
            dy_MD = _rows_of_tokens(dy, order_M, choices, matmul_format)
            ddown = _sum_outer(dy_MD, h_MI, ends_E, down, matmul_format)
            del dy_MD
        del h_MI
        rows: Tensor | QuantTensor = d_gate_up_MI
        columns: Tensor | QuantTensor = d_gate_up_MI
        if needs_dgate_up and needs_dx and matmul_format != "plain" and idle[0] is None and _is_one_launch(x.device):
            rows, columns = quantise_both_ways(d_gate_up_MI, matmul_format)
        del d_gate_up_MI
        if needs_dgate_up:
            x_MD = _rows_of_tokens(x, order_M, choices, matmul_format)
            dgate_up = _sum_outer(columns, x_MD, ends_E, gate_up, matmul_format)
            del x_MD
        del columns
        if needs_dx:
            place_M = inverse_of(order_M) if place_M is None else place_M
            if isinstance(rows, QuantTensor):
                dx_MD = grouped_matmul(rows, codes_of(gate_up, matmul_format, True), ends_E, dtype=x.dtype)
            else:
                dx_MD = _multiply(rows, gate_up, idle_gate_up, ends_E, False, matmul_format)
            dx = combine(dx_MD, place_M, choices)
        return dx, dgate_up, ddown, dweights, dy if needs_added else None, *(None,) * 8


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor | Sorted,
    idle: tuple[Stack, Stack] | None = None,
    matmul_format: MatmulFormat = "plain",
    added: Tensor | None = None,
) -> Tensor:
    """Send each token through its chosen experts and sum their outputs by routing weight.

    x: [N, D] fp32|bf16|fp16.  gate_up: [W, 2I, D], gate first; down: [W, D, I]: masters of any floating dtype,
    each stack cast once per use.  weights: [N, K] fp32.  ids: [N, K] int64, slots in [0, E), or sorted already.
    idle: the copies of gate_up [E − W, 2I, D] and of down [E − W, D, I], slots W … E − 1, decoded at use, never whole;
    without it E = W, with it W may be 0, where experts are only read.  added: [N, D] in x's dtype, which is added to
    the outputs.  Returns [N, D] in x's dtype.
    matmul_format: the numbers that resident experts multiply, see `quant_linear.py`; where a loop calls the library,
    operands are rounded to them and multiplied in x's dtype.
    Gradients come in their arguments' dtypes; a resident expert that nobody chose gets zeros, idle ones get none.
    Saved for backward: x, weights, [N·K] int64, [E] int64, [N·K, 2I] in x's dtype, the masters, idle.
    The result and its gradients are deterministic.  The device is waited for once, where Triton runs never.
    Raises ShapeError if shapes or dtypes do not fit together.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.1.2.
    """
    count, twice_inner, width = gate_up.shape if gate_up.dim() == 3 else (-1, 0, 0)
    fits = count >= (0 if idle is not None else 1) and x.dim() == 2 and x.shape[1] == width
    fits = fits and down.shape == (count, width, twice_inner // 2) and 2 * down.shape[-1] == twice_inner
    if isinstance(ids, Sorted):
        chosen, is_whole = list(ids.order.shape), ids.order.shape == (weights.numel(),)
    else:
        chosen, is_whole = list(ids.shape), ids.dtype == torch.int64 and ids.shape == weights.shape
    if not fits or weights.dim() != 2 or weights.shape[0] != x.shape[0] or not is_whole:
        shapes = [*(list(t.shape) for t in (x, gate_up, down, weights)), chosen]
        raise ShapeError(
            f"experts: got {shapes}; needs [N, D], [W, 2I, D], [W, D, I], [N, K] and [N, K] of int64, or them sorted."
        )
    if added is not None and (added.shape != x.shape or added.dtype != x.dtype):
        raise ShapeError(f"experts: added is {list(added.shape)} {added.dtype}; needs {list(x.shape)} {x.dtype}.")
    if not all(t.dtype.is_floating_point for t in (x, gate_up, down, weights)):
        raise ShapeError(f"experts: x is {x.dtype}, gate_up {gate_up.dtype}, weights {weights.dtype}; needs floating.")
    check_matmul_format(matmul_format, "experts")
    if idle is not None:
        _check_idle(gate_up, down, *idle)
    copies = (None, None, None, None) if idle is None else (*parts_of(idle[0]), *parts_of(idle[1]))
    if not isinstance(ids, Sorted):
        ids = sort_choices(ids, count + (0 if copies[0] is None else copies[0].shape[0]))
    order = ids.order, ids.place, ids.ends
    return _Experts.apply(x, gate_up, down, weights, added, *order, *copies, matmul_format)  # type: ignore[no-untyped-call]


def _check_idle(gate_up: Tensor, down: Tensor, idle_gate_up: Stack, idle_down: Stack) -> None:
    check_stack(idle_gate_up, "experts: idle gate_up")
    check_stack(idle_down, "experts: idle down")
    found = [list(parts_of(stack)[0].shape) for stack in (idle_gate_up, idle_down)]
    needed = [[found[0][0], *master.shape[1:]] for master in (gate_up, down)]
    if found != needed:
        raise ShapeError(f"experts: idle copies are {found}; beside these masters they need to be {needed}.")
