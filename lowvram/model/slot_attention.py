"""How one new token of each of several texts finds what its text holds; knows the cache, no weights.

`PerSlotAttention` attends row by row: exact lengths, known on the host, views of the memory.
`BatchedAttention` treats the first slots as one batch of fixed shapes, with lengths as tensors, as a CUDA graph needs.

Legend: N rows, B slots, H heads, G key/value heads, P = H/G, S places, K width of a head, C kv_lora_rank,
L latent rank + rotated width.
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
    """One new token of each of N texts: where it stands, and what it sees."""

    position_N: Tensor

    def attend(
        self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, scale: float, slope_H: Tensor | None
    ) -> Tensor:
        """Keep the new keys and values and attend to all that are seen.  Returns [N, H·K]."""

    def attend_latent(self, layer: int, q_NHL: Tensor, new_NL: Tensor, rank: int, scale: float) -> Tensor:
        """Keep the new latents and return the weighted sums of all that are seen, [N, H, C].  rank: C."""


class PerSlotAttention:
    """Rows that attend one by one, so that none depends on another's length."""

    def __init__(self, cache: KvCache, slot_N: Sequence[int]) -> None:
        self.cache, self.slot_N = cache, slot_N
        lengths = [cache.lengths[slot] for slot in slot_N]
        device = cache.layers[0][0].device
        self.position_N = torch.tensor(lengths, device=device)
        self._distance_S: Tensor | None = None

    def _places(self, slot: int, layer: int) -> tuple[int, int]:
        """Return the first place that is seen and the one behind the new token's."""
        end = self.cache.lengths[slot] - self.cache.first(slot, layer) + 1
        window = self.cache.windows[layer]
        return (0 if window is None else max(0, end - window)), end

    def attend(
        self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, scale: float, slope_H: Tensor | None
    ) -> Tensor:
        """Keep the new keys and values and attend to all that are seen.  Returns [N, H·K]."""
        k_BGSK, v_BGSK = self.cache.layers[layer]
        groups, width = k_NGK.shape[1:]
        outs = []
        for row, slot in enumerate(self.slot_N):
            first, end = self._places(slot, layer)
            k_1GSK, v_1GSK = k_BGSK.narrow(0, slot, 1), v_BGSK.narrow(0, slot, 1)
            k_1GSK.select(2, end - 1).copy_(k_NGK[row])
            v_1GSK.select(2, end - 1).copy_(v_NGK[row])
            k_1GSK, v_1GSK = k_1GSK.narrow(2, first, end - first), v_1GSK.narrow(2, first, end - first)
            # The heads of a group are rows of one product: their keys are read once, and nothing is repeated.
            q_1GPK = q_NHK[row].view(1, groups, -1, width)
            bias = None if slope_H is None else self._bias(slope_H, end - first).view(1, groups, -1, end - first)
            out = scaled_dot_product_attention(q_1GPK, k_1GSK, v_1GSK, attn_mask=bias, scale=scale)
            outs.append(out.reshape(1, -1))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def attend_latent(self, layer: int, q_NHL: Tensor, new_NL: Tensor, rank: int, scale: float) -> Tensor:
        """Keep the new latents and return the weighted sums of all that are seen, [N, H, C].  rank: C."""
        outs = []
        parts = list(zip(self.cache.layers[layer], self.cache.parts_of_latent(new_NL), strict=True))
        for row, slot in enumerate(self.slot_N):
            first, end = self._places(slot, layer)
            for memory, new in parts:
                memory[slot, end - 1] = new[row]
            # Keys and values are the same rows: what the rotated part of a value comes to is not looked at.
            seen_11SL = self.cache.latent(layer, slot, slice(first, end), q_NHL.dtype)[:, None]
            out = scaled_dot_product_attention(q_NHL[row][None, None], seen_11SL, seen_11SL, scale=scale)
            outs.append(out[0, :, :, :rank])
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _bias(self, slope_H: Tensor, count: int) -> Tensor:
        """Return ALiBi's −slope · distance of the last `count` tokens, [H, count] fp32; made once for all layers."""
        if self._distance_S is None:
            most = max(self.cache.lengths[slot] for slot in self.slot_N) + 1
            self._distance_S = torch.arange(1 - most, 1, device=slope_H.device, dtype=torch.float32)
        return slope_H[:, None] * self._distance_S[-count:]


class BatchedAttention:
    """The first B slots as rows of one batch: shapes depend on B and on how many places are looked at, on nothing else.

    position_N: how many tokens each slot holds, int64; start_N: which position lies first where a window slides.
    active_N: bool; a row that is not keeps what its slot has, and its result means nothing.  places: at least the
    longest active text and its new token.
    """

    def __init__(self, cache: KvCache, position_N: Tensor, start_N: Tensor, active_N: Tensor, places: int) -> None:
        self.cache, self.position_N, self.start_N, self.active_N = cache, position_N, start_N, active_N
        self.places = places
        self._masks: dict[int | None, Tensor] = {}

    def _place_N(self, layer: int) -> Tensor:
        return self.position_N if self.cache.windows[layer] is None else self.position_N - self.start_N

    def _keep(self, layer: int, new: tuple[Tensor, ...]) -> list[Tensor]:
        """Write the new token of each active row; returns the places that are looked at, [N, …, S, width] each."""
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
        """Keep the new keys and values and attend to all that are seen.  Returns [N, H·K]."""
        k_NGSK, v_NGSK = self._keep(layer, (k_NGK, v_NGK))
        q_NGPK = q_NHK.unflatten(1, (k_NGK.shape[1], -1))
        mask = self._mask(layer, k_NGSK.shape[2], slope_H, q_NGPK)
        return scaled_dot_product_attention(q_NGPK, k_NGSK, v_NGSK, attn_mask=mask, scale=scale).flatten(1)

    def _mask(self, layer: int, places: int, slope_H: Tensor | None, q_NGPK: Tensor) -> Tensor:
        """Return what is seen, [N, 1, 1, S] bool, or ALiBi's bias of that, [N, G, P, S]; layers of a kind share it."""
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
        """Keep the new latents and return the weighted sums of all that are seen, [N, H, C].  rank: C."""
        parts = self._keep(layer, self.cache.parts_of_latent(new_NL))
        latent, codes_scale, rope = (
            (parts[0][..., :rank], None, parts[0][..., rank:]) if len(parts) == 1 else (parts[0], parts[1], parts[2])
        )
        length_N = (self._place_N(layer) + 1).int()
        q_latent, q_rope = q_NHL[..., :rank], q_NHL[..., rank:]
        window = self.cache.windows[layer]
        return latent_attention(q_latent, q_rope, latent, rope, length_N, scale, codes_scale, window)
