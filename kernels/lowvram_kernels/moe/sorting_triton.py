"""Triton kernels that sort choices by expert, and that bring experts' rows back to their tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest


@triton.jit
def count_kernel(ids_ptr, count_ptr, M, SHARE: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """Count how often each expert is among a program's SHARE of M choices: [programs, EXPERTS] int32."""
    first = tl.program_id(0) * SHARE
    expert = tl.arange(0, EXPERTS)
    count = tl.zeros([EXPERTS], tl.int32)
    for start in range(first, first + SHARE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        choice = tl.load(ids_ptr + at, mask=at < M, other=-1).to(tl.int32)
        count += tl.sum((choice[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(count_ptr + tl.program_id(0) * EXPERTS + expert, count)


@triton.jit
def place_kernel(
    ids_ptr,
    slots_ptr,
    count_ptr,
    order_ptr,
    place_ptr,
    ends_ptr,
    load_ptr,
    M,
    P,
    E,
    SHARE: tl.constexpr,
    BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Give each choice its place among all, by expert and then as they come; the counts are of P programs.

    order: the choice at each place.  ends: where each slot's choices end.  load: how often each expert is chosen.
    slots [E]: of the experts; None where they are in their own order.
    """
    expert = tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    for program in range(0, P):
        part = tl.load(count_ptr + program * EXPERTS + expert)
        total += part
        before += tl.where(program < tl.program_id(0), part, 0)
    slot = expert
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + expert, mask=expert < E, other=EXPERTS).to(tl.int32)
    is_lower = slot[None, :] < slot[:, None]
    start_of = tl.sum(tl.where(is_lower, total[None, :], 0), 1)
    if tl.program_id(0) == 0:
        tl.store(ends_ptr + slot, (start_of + total).to(tl.int64), mask=expert < E)
        tl.store(load_ptr + expert, total.to(tl.float32), mask=expert < E)
    base = start_of + before
    first = tl.program_id(0) * SHARE
    for start in range(first, first + SHARE, BLOCK):
        at = start + tl.arange(0, BLOCK)
        choice = tl.load(ids_ptr + at, mask=at < M, other=-1).to(tl.int32)
        is_chosen = (choice[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(is_chosen, 0) - is_chosen
        place = tl.sum(is_chosen * (rank + base[None, :]), 1)
        tl.store(place_ptr + at, place, mask=at < M)
        tl.store(order_ptr + place, at, mask=at < M)
        base += tl.sum(is_chosen, 0)


@triton.jit
def combine_kernel(
    sorted_ptr, place_ptr, added_ptr, out_ptr, N, D, CHOICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Sum the sorted rows of each token's choices, and added [N, D] unless that is None: out [N, D]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < D)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in tl.static_range(CHOICES):
        place = tl.load(place_ptr + row * CHOICES + k, mask=row < N, other=0).to(tl.int64)
        total += load_fp32(sorted_ptr + place[:, None] * D + column[None, :], inside)
    at = row[:, None] * D + column[None, :]
    if added_ptr is not None:
        total += load_fp32(added_ptr + at, inside)
    store_nearest(out_ptr + at, total, inside)
