"""The choices of tokens sorted by expert, and experts' rows summed for their tokens; no autograd.

    order = argsort(slots[ids], stable)        place = order⁻¹        y[n] = Σ_k rows[place[n·K + k]] + added[n]

Each choice n·K + k is one row; an expert's rows are one slice, in the order of their tokens.  On a card three launches:
two that count and place, without a sort, and one that sums, in fp32 and in one fixed order.
Alive: the result; while sorting 4 bytes for each expert and `_SHARE` choices.  Bytes moved: ids twice, the result once.
Sources: the equations; counting sort is Seward 1954.

Shapes: N tokens, K choices of each, M = N·K, E experts, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_kernels.dispatch import (
    Launch,
    Tile,
    as_read,
    bytes_of,
    card_of,
    choose,
    is_simulated,
    launch,
    runs_kernels,
)
from lowvram_kernels.errors import ShapeError

# Choices of one program, and the numbers of its table of choices and experts, which it holds in registers.
_SHARE, _TABLE = 1024, 4096
_COMBINE_TILE = Tile(4, 256, 256)
# Experts that a program compares with each other in registers; with more, plain PyTorch sorts.
_MOST_EXPERTS = 128


class Sorted(NamedTuple):
    """order [M]: the choice of each place.  place [M]: the place of each choice.  ends [E]: of each slot's slice.

    load [E] fp32: how often each expert was chosen.  ends lie on the host where a loop over the experts needs them.
    """

    order: Tensor
    place: Tensor
    ends: Tensor
    load: Tensor


def reference(ids: Tensor, experts: int, slots: Tensor | None = None) -> Sorted:
    """Sort by torch's own stable sort."""
    slot_M = (ids if slots is None else slots[ids]).reshape(-1)
    order_M = torch.argsort(slot_M, stable=True)
    count_E = torch.bincount(ids.reshape(-1), minlength=experts)
    in_slots_E = torch.bincount(slot_M, minlength=experts)
    return Sorted(order_M, torch.argsort(order_M), in_slots_E.cumsum(0), count_E.float())


def sort_choices(ids: Tensor, experts: int, slots: Tensor | None = None) -> Sorted:
    """Sort the choices by the slots of their experts, those of one expert as they come.

    ids: [N, K] int64, in [0, experts).  slots: [E] int64, the place of each expert; None: its own number.
    Returns order and place in int32 on a card, else in int64.  The device is never waited for where Triton runs.
    Raises ShapeError if ids or slots are of another shape or dtype.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ShapeError(f"sort_choices: ids are {list(ids.shape)} {ids.dtype}; they need [N, K] int64.")
    if slots is not None and (slots.shape != (experts,) or slots.dtype != torch.int64):
        raise ShapeError(f"sort_choices: slots are {list(slots.shape)} {slots.dtype}; they need [{experts}] int64.")
    if ids.numel() > 0 and experts <= _MOST_EXPERTS and runs_kernels("grouped_matmul", ids.device):
        return _sort_on_card(ids.contiguous(), experts, slots)
    choice_M = ids.reshape(-1)
    count_E = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    count_E.scatter_add_(0, choice_M, torch.ones_like(choice_M))
    in_slots_E = count_E if slots is None else torch.empty_like(count_E).index_copy_(0, slots, count_E)
    order_M = torch.argsort(choice_M if slots is None else slots[choice_M], stable=True)
    place_M = inverse_of(order_M)
    ends_E = in_slots_E.cumsum(0)
    stays = is_simulated() or choose("grouped_matmul", card_of(ids.device)).backend == "triton"
    return Sorted(order_M, place_M, ends_E if stays else ends_E.to("cpu"), count_E.float())


def inverse_of(order_M: Tensor) -> Tensor:
    """Return the place of each choice, given the choice at each place."""
    place_M = torch.empty_like(order_M)
    place_M[order_M] = torch.arange(order_M.shape[0], dtype=order_M.dtype, device=order_M.device)
    return place_M


def _sort_on_card(ids: Tensor, experts: int, slots: Tensor | None) -> Sorted:
    count = ids.numel()
    programs, columns = -(-count // _SHARE), 1 << (experts - 1).bit_length()
    count_PE = torch.empty(programs, columns, dtype=torch.int32, device=ids.device)
    order_M, place_M = (torch.empty(count, dtype=torch.int32, device=ids.device) for _ in range(2))
    ends_E, load_E = ids.new_empty(experts), ids.new_empty(experts, dtype=torch.float32)
    constants = {"SHARE": _SHARE, "BLOCK": max(16, min(_SHARE, _TABLE // columns)), "EXPERTS": columns}
    warps = 8 if columns > 64 else 4
    what = Launch("moe.sorting_triton", "count_kernel", (programs,), (ids, count_PE, count), constants, warps)
    launch(what, moved=(ids, count_PE))
    arguments = (ids, slots, count_PE, order_M, place_M, ends_E, load_E, count, programs, experts)
    what = Launch("moe.sorting_triton", "place_kernel", (programs,), arguments, constants, warps)
    launch(what, moved_bytes=bytes_of(ids, slots, order_M, place_M, ends_E, load_E) + programs * bytes_of(count_PE))
    return Sorted(order_M, place_M, ends_E, load_E)


def combine(sorted_MD: Tensor, place_M: Tensor, choices: int, added: Tensor | None = None) -> Tensor:
    """Sum the rows of each token's choices, and added: [N, D] in the rows' dtype.

    sorted: [M, D], contiguous.  place: as `sort_choices` returns it.  added: [N, D] of the rows' dtype.
    """
    width = sorted_MD.shape[1]
    if sorted_MD.numel() == 0 or not runs_kernels("grouped_matmul", sorted_MD.device):
        # On CPU indexing by a tensor takes four times as long, and so does torch's sum of two rows.
        rows_NKD = sorted_MD.index_select(0, place_M).view(-1, choices, width)
        total = rows_NKD[:, 0] + rows_NKD[:, 1] if choices == 2 else rows_NKD.sum(1)
        return total if added is None else total + added
    out_ND = sorted_MD.new_empty(place_M.shape[0] // choices, width)
    tile = _COMBINE_TILE
    grid = (-(-out_ND.shape[0] // tile.rows), -(-width // tile.columns))
    beside = None if added is None else as_read(added.contiguous())
    arguments = (as_read(sorted_MD), place_M, beside, as_read(out_ND), *out_ND.shape)
    constants = {"CHOICES": choices, "ROWS": tile.rows, "COLUMNS": tile.columns}
    what = Launch("moe.sorting_triton", "combine_kernel", grid, arguments, constants, tile.warps)
    launch(what, moved=(sorted_MD, place_M, added, out_ND))
    return out_ND
