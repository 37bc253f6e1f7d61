"""Attention of one new token of each of several sequences over the KV cache; knows the cache, but no weights.

`PerSlotAttention` attends row by row; the lengths are exact and known on the host, and the keys are views of the cache.
`JoinedAttention` does so too, but one call attends to all rows that are about equally long.
`BatchedAttention` treats the first slots as one batch of fixed shapes, with lengths as tensors, as a CUDA graph needs.

Legend: N rows, B slots, H heads, G key/value heads, P = H/G, S places, K width of a head, C kv_lora_rank,
L latent rank + rotated width, J joined rows, M slots of a range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from lowvram_kernels.attention.latent_attention import latent_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowvram.model.kv_cache import KvCache


class SlotAttention(Protocol):
    """Attention of one new token of each of N sequences, which are at the positions `position_N`."""

    position_N: Tensor

    def attend(
        self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, scale: float, slope_H: Tensor | None
    ) -> Tensor:
        """Store the new keys and values and attend to all visible ones.  Returns [N, H·K]."""

    def attend_latent(self, layer: int, q_NHL: Tensor, new_NL: Tensor, rank: int, scale: float) -> Tensor:
        """Store the new latents and return the weighted sums of all visible ones, [N, H, C].  rank: C."""


class PerSlotAttention:
    """Attends row by row, so that no row depends on the length of another one."""

    def __init__(self, cache: KvCache, slot_N: Sequence[int]) -> None:
        self.cache, self.slot_N = cache, slot_N
        device = cache.layers[0][0].device
        self.position_N = torch.tensor([cache.lengths[slot] for slot in slot_N], device=device)
        self._distance_S: Tensor | None = None

    def _visible_places(self, slot: int, layer: int) -> tuple[int, int]:
        """Return the first visible place and the place after the new token."""
        end = self.cache.lengths[slot] - self.cache.first(slot, layer) + 1
        window = self.cache.windows[layer]
        return (0 if window is None else max(0, end - window)), end

    def _store(self, layer: int, new: tuple[Tensor, ...]) -> None:
        """Write each row's new token, one tensor [N, …] for each tensor of the layer."""
        for row, slot in enumerate(self.slot_N):
            _, end = self._visible_places(slot, layer)
            for memory, values in zip(self.cache.layers[layer], new, strict=True):
                memory.select(0, slot).select(-2, end - 1).copy_(values[row])

    def attend(
        self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, scale: float, slope_H: Tensor | None
    ) -> Tensor:
        """Store the new keys and values and attend to all visible ones.  Returns [N, H·K]."""
        self._store(layer, (k_NGK, v_NGK))
        outs = [self._attend_row(row, layer, q_NHK[row], scale, slope_H) for row in range(len(self.slot_N))]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_row(self, row: int, layer: int, q_HK: Tensor, scale: float, slope_H: Tensor | None) -> Tensor:
        """Return the attention of one row, [1, H·K]."""
        first, end = self._visible_places(self.slot_N[row], layer)
        k_1GSK, v_1GSK = (
            part.narrow(0, self.slot_N[row], 1).narrow(2, first, end - first) for part in self.cache.layers[layer]
        )
        # The heads of a group are rows of one product, so their keys are read once and never repeated.
        q_1GPK = q_HK.view(1, k_1GSK.shape[1], -1, q_HK.shape[-1])
        bias = None
        if slope_H is not None:
            bias = self._bias(slope_H, end - first).view(*q_1GPK.shape[:3], end - first)
        return scaled_dot_product_attention(q_1GPK, k_1GSK, v_1GSK, attn_mask=bias, scale=scale).reshape(1, -1)

    def attend_latent(self, layer: int, q_NHL: Tensor, new_NL: Tensor, rank: int, scale: float) -> Tensor:
        """Store the new latents and return the weighted sums of all visible ones, [N, H, C].  rank: C."""
        self._store(layer, self.cache.parts_of_latent(new_NL))
        outs = [self._attend_latent_row(row, layer, q_NHL[row], rank, scale) for row in range(len(self.slot_N))]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attend_latent_row(self, row: int, layer: int, q_HL: Tensor, rank: int, scale: float) -> Tensor:
        """Return the weighted sums of one row's latents, [1, H, C]."""
        slot = self.slot_N[row]
        first, end = self._visible_places(slot, layer)
        # Keys and values are the same rows; the result for the rotated part of a value is dropped.
        seen_11SL = self.cache.latent(layer, slice(slot, slot + 1), slice(first, end), q_HL.dtype)[:, None]
        return scaled_dot_product_attention(q_HL[None, None], seen_11SL, seen_11SL, scale=scale)[0, :, :, :rank]

    def _bias(self, slope_H: Tensor, count: int) -> Tensor:
        """Return ALiBi's −slope · distance of the last `count` tokens, [H, count] fp32; layers share the distances."""
        if self._distance_S is None:
            most = max(self.cache.lengths[slot] for slot in self.slot_N) + 1
            self._distance_S = torch.arange(1 - most, 1, device=slope_H.device, dtype=torch.float32)
        return slope_H[:, None] * self._distance_S[-count:]


# What a call for one row costs, in places that attention reads in that time.  Measured: Xeon (AVX-512), torch 2.13, one
# thread, 8 heads of 64: a call takes 20 to 40 µs, and a place of a row 0.06 µs.
_PLACES_OF_A_CALL = 400


def rows_to_join(length_N: Sequence[int], slot_N: Sequence[int]) -> list[int]:
    """Return the rows that are attended to in one call, with which all take the least time; fewer than two: none.

    length: of each row with its new token.  One call reads all slots from the first joined row's to the last one's, up
    to the end of the longest joined row.
    """
    order = sorted(range(len(length_N)), key=lambda row: length_N[row])
    lowest = highest = slot_N[order[0]]
    read = least = count = 0
    for number, row in enumerate(order, start=1):
        lowest, highest = min(lowest, slot_N[row]), max(highest, slot_N[row])
        read += length_N[row]
        # What the call reads more than these rows one by one, less the calls that it spares.
        more = (highest - lowest + 1) * length_N[row] - read - (number - 1) * _PLACES_OF_A_CALL
        if more < least:
            least, count = more, number
    return sorted(order[:count])


class JoinedAttention(PerSlotAttention):
    """Attends in one call to the rows that `rows_to_join` names, and to the others one by one.

    The call reads a range of slots, M of them, each masked by its own row's length; the slots of other rows have
    queries of zeros, and their results are dropped.
    """

    def __init__(self, cache: KvCache, slot_N: Sequence[int]) -> None:
        super().__init__(cache, slot_N)
        self._joined = rows_to_join([cache.lengths[slot] + 1 for slot in slot_N], slot_N)
        self._apart = sorted(set(range(len(slot_N))) - set(self._joined))
        slots, device = [slot_N[row] for row in self._joined], self.position_N.device
        self._first, self._count = min(slots, default=0), max(slots, default=-1) + 1 - min(slots, default=0)
        # Whether the range's slots are the rows, in their order.
        self._is_whole = list(slot_N) == list(range(self._first, self._first + self._count))
        self._slot_N = torch.tensor(list(slot_N), device=device)
        self._start_N = torch.tensor([cache.starts[slot] for slot in slot_N], device=device)
        self._row_J = torch.tensor(self._joined, device=device, dtype=torch.int64)
        self._masks: dict[int | None, tuple[int, Tensor]] = {}

    def _place_N(self, layer: int) -> Tensor:
        return self.position_N if self.cache.windows[layer] is None else self.position_N - self._start_N

    def _store(self, layer: int, new: tuple[Tensor, ...]) -> None:
        place_N = self._place_N(layer)
        for memory, values in zip(self.cache.layers[layer], new, strict=True):
            if memory.dim() == 4:
                memory[self._slot_N, :, place_N] = values
            else:
                memory[self._slot_N, place_N] = values

    def attend(
        self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, scale: float, slope_H: Tensor | None
    ) -> Tensor:
        """Store the new keys and values and attend to all visible ones.  Returns [N, H·K]."""
        if not self._joined:
            return super().attend(layer, q_NHK, k_NGK, v_NGK, scale, slope_H)
        self._store(layer, (k_NGK, v_NGK))
        q_MGPK = self._spread(q_NHK).unflatten(1, (k_NGK.shape[1], -1))
        first, mask = self._mask(layer, slope_H, q_MGPK)
        k_MGSK, v_MGSK = (
            part.narrow(0, self._first, self._count).narrow(2, first, mask.shape[-1])
            for part in self.cache.layers[layer]
        )
        out_MGPK = scaled_dot_product_attention(q_MGPK, k_MGSK, v_MGSK, attn_mask=mask, scale=scale)
        out_ND = self._collect(out_MGPK.flatten(1))
        for row in self._apart:
            out_ND[row] = self._attend_row(row, layer, q_NHK[row], scale, slope_H)[0]
        return out_ND

    def attend_latent(self, layer: int, q_NHL: Tensor, new_NL: Tensor, rank: int, scale: float) -> Tensor:
        """Store the new latents and return the weighted sums of all visible ones, [N, H, C].  rank: C."""
        if not self._joined:
            return super().attend_latent(layer, q_NHL, new_NL, rank, scale)
        self._store(layer, self.cache.parts_of_latent(new_NL))
        q_M1HL = self._spread(q_NHL)[:, None]
        first, mask = self._mask(layer, None, q_M1HL)
        slots, places = slice(self._first, self._first + self._count), slice(first, first + mask.shape[-1])
        seen_M1SL = self.cache.latent(layer, slots, places, q_NHL.dtype)[:, None]
        out_M1HL = scaled_dot_product_attention(q_M1HL, seen_M1SL, seen_M1SL, attn_mask=mask, scale=scale)
        out_NHC = self._collect(out_M1HL[:, 0, :, :rank])
        for row in self._apart:
            out_NHC[row] = self._attend_latent_row(row, layer, q_NHL[row], rank, scale)[0]
        return out_NHC

    def _spread(self, q: Tensor) -> Tensor:
        """Return the queries of the range's slots, [M, …] from [N, …]."""
        if self._is_whole:
            return q
        spread = q.new_zeros(self._count, *q.shape[1:])
        spread[self._slot_N[self._row_J] - self._first] = q[self._row_J]
        return spread

    def _collect(self, out: Tensor) -> Tensor:
        """Return the results of the joined rows in their places, [N, …] from [M, …]."""
        if self._is_whole:
            return out
        collected = out.new_empty(len(self.slot_N), *out.shape[1:])
        collected[self._row_J] = out[self._slot_N[self._row_J] - self._first]
        return collected

    def _mask(self, layer: int, slope_H: Tensor | None, q_MGPK: Tensor) -> tuple[int, Tensor]:
        """Return the first place that is read, and what is added to the scores, [M, 1, 1, S] or [M, G, P, S].

        All layers with the same window share it.
        """
        window = self.cache.windows[layer]
        if window not in self._masks:
            visible = [self._visible_places(self.slot_N[row], layer) for row in self._joined]
            first, end = min(first for first, _ in visible), max(end for _, end in visible)
            # Slots of no joined row see the last place, so that their softmax has something to sum.
            place_M = self.position_N.new_full((self._count,), end - 1)
            place_M[self._slot_N[self._row_J] - self._first] = self._place_N(layer)[self._row_J]
            distance_MS = place_M[:, None] - torch.arange(first, end, device=place_M.device)
            hidden_MS = distance_MS < 0 if window is None else (distance_MS < 0) | (distance_MS >= window)
            mask = torch.zeros(hidden_MS.shape, device=place_M.device, dtype=q_MGPK.dtype)[:, None, None]
            if slope_H is not None:
                mask = -slope_H.view(*q_MGPK.shape[1:3], 1) * distance_MS[:, None, None]
            self._masks[window] = first, mask.masked_fill(hidden_MS[:, None, None], -torch.inf)
        return self._masks[window]


class BatchedAttention:
    """Attends to the first B slots as rows of one batch, whose shapes depend only on B and on `places`.

    position_N: how many tokens each slot holds, int64; start_N: the position at the first place of a window's layers.
    active_N: bool; the slot of an inactive row is not changed, and its result is meaningless.  places: how many places
    are read, at least the length of the longest active sequence with its new token.
    """

    def __init__(self, cache: KvCache, position_N: Tensor, start_N: Tensor, active_N: Tensor, places: int) -> None:
        self.cache, self.position_N, self.start_N, self.active_N = cache, position_N, start_N, active_N
        self.places = places
        self._masks: dict[int | None, Tensor] = {}

    def _place_N(self, layer: int) -> Tensor:
        return self.position_N if self.cache.windows[layer] is None else self.position_N - self.start_N

    def _store(self, layer: int, new: tuple[Tensor, ...]) -> list[Tensor]:
        """Write the new token of each active row; returns the places that are read, [N, …, S, width] each."""
        count = len(self.position_N)
        shape = (count, *(1 for _ in self.cache.layers[layer][0].shape[1:]))
        place, active = self._place_N(layer).view(shape), self.active_N.view(shape)
        seen = []
        for memory, values in zip(self.cache.layers[layer], new, strict=True):
            rows = memory[:count]
            index = place.expand(*rows.shape[:-2], 1, rows.shape[-1])
            rows.scatter_(-2, index, torch.where(active, values.unsqueeze(-2), rows.gather(-2, index)))
            seen.append(rows[..., : self.places, :])
        return seen

    def attend(
        self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, scale: float, slope_H: Tensor | None
    ) -> Tensor:
        """Store the new keys and values and attend to all visible ones.  Returns [N, H·K]."""
        k_NGSK, v_NGSK = self._store(layer, (k_NGK, v_NGK))
        q_NGPK = q_NHK.unflatten(1, (k_NGK.shape[1], -1))
        mask = self._mask(layer, k_NGSK.shape[2], slope_H, q_NGPK)
        return scaled_dot_product_attention(q_NGPK, k_NGSK, v_NGSK, attn_mask=mask, scale=scale).flatten(1)

    def _mask(self, layer: int, places: int, slope_H: Tensor | None, q_NGPK: Tensor) -> Tensor:
        """Return the mask of visible places, [N, 1, 1, S] bool, or ALiBi's bias with that mask, [N, G, P, S].

        All layers with the same window share it.
        """
        window = self.cache.windows[layer]
        if window not in self._masks:
            place_S = torch.arange(places, device=self.position_N.device)
            distance_NS = self._place_N(layer)[:, None] - place_S
            seen_NS = distance_NS >= 0
            if window is not None:
                seen_NS &= distance_NS < window
            mask = seen_NS[:, None, None]
            if slope_H is not None:
                slope_GP1 = slope_H.view(*q_NGPK.shape[1:3], 1)
                bias_NGPS = -slope_GP1 * distance_NS[:, None, None]
                mask = bias_NGPS.masked_fill_(~mask, -torch.inf).to(q_NGPK.dtype)
            self._masks[window] = mask
        return self._masks[window]

    def attend_latent(self, layer: int, q_NHL: Tensor, new_NL: Tensor, rank: int, scale: float) -> Tensor:
        """Store the new latents and return the weighted sums of all visible ones, [N, H, C].  rank: C."""
        parts = self._store(layer, self.cache.parts_of_latent(new_NL))
        latent, codes_scale, rope = (
            (parts[0][..., :rank], None, parts[0][..., rank:]) if len(parts) == 1 else (parts[0], parts[1], parts[2])
        )
        length_N = (self._place_N(layer) + 1).int()
        q_latent, q_rope = q_NHL[..., :rank], q_NHL[..., rank:]
        window = self.cache.windows[layer]
        return latent_attention(q_latent, q_rope, latent, rope, length_N, scale, codes_scale, window)
