"""The KV cache: what decoding keeps of the tokens already read, per layer and sequence; knows shapes, not attention.

Every slot holds one sequence.  All slots share preallocated memory, [slots, …, places, width] per layer: the keys and
values of GQA, or the latents of MLA, as plain numbers or as 8-bit codes.  A place holds one token.  A layer with a
sliding window has places for the window and for one chunk; when they are full, the newest tokens are moved to the
front, so that the visible tokens are always contiguous.

Legend: B slots, G key/value heads, M places, K width of a head, C kv_lora_rank, L latent rank + rotated width,
T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from lowvram_kernels.attention.latent_attention import encode_latent
from lowvram_kernels.quant import e4m3
from lowvram_kernels.quant.quantise import BLOCK
from torch import Tensor

from lowvram.config.model import ModelConfig

CacheFormat = Literal["plain", "e4m3"]


class KvCache:
    """Preallocated memory for `slots` sequences of up to `max_context` tokens; at most `chunk` tokens are read at once.

    GQA stores keys and values, two [B, G, M, K] per layer.  MLA stores its latents, [B, M, kv_lora_rank + rope_dim];
    in the format "e4m3" it stores codes [B, M, C], one scale per 128 of them, and the rotated part in dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_context: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        format: CacheFormat = "plain",
        chunk: int = 512,
    ) -> None:
        self.dtype, self.slots, self.max_context = dtype, slots, max_context
        self.chunk = chunk = min(chunk, max_context)
        self.format = format if config.attention.kind == "mla" else "plain"
        self.windows = [config.window_of(layer) for layer in range(config.layers)]
        self.window = next((window for window in self.windows if window is not None), None)
        # The number of places in a layer with a window.
        self.short = max_context if self.window is None else min(max_context, self.window + chunk)
        self.lengths = [0] * slots
        # For each slot, the position that is stored at the first place of a layer with a window.
        self.starts = [0] * slots
        self.layers: list[tuple[Tensor, ...]] = []
        for window in self.windows:
            places = max_context if window is None else self.short
            kinds = _shapes(config, self.format, places, dtype)
            # Zeros, because unwritten memory may hold NaN, and an attention weight of zero does not cancel it.
            self.layers.append(tuple(torch.zeros(slots, *shape, dtype=kind, device=device) for shape, kind in kinds))

    @property
    def bytes(self) -> int:
        """The size of the whole cache in bytes."""
        return sum(part.numel() * part.element_size() for parts in self.layers for part in parts)

    def bytes_per_token(self) -> float:
        """Return the cache's bytes per token of `max_context` and slot, summed over all layers."""
        return self.bytes / (self.slots * self.max_context)

    def first(self, slot: int, layer: int) -> int:
        """Return which position of the slot's sequence is stored at the layer's first place."""
        return 0 if self.windows[layer] is None else self.starts[slot]

    def make_room(self, slot: int, count: int) -> None:
        """Make room for the next `count` tokens, at most a chunk; full layers move their newest tokens to the front."""
        held = self.lengths[slot] - self.starts[slot]
        if held + count <= self.short or self.short == self.max_context:
            return
        # Half a chunk is freed at a time: moves are rare, and half a chunk of the past stays available to `rewind`.
        kept = self.short - max(count, self.chunk // 2)
        for layer, window in enumerate(self.windows):
            if window is not None:
                for part in self.layers[layer]:
                    part[slot, ..., :kept, :] = part[slot, ..., held - kept : held, :].clone()
        self.starts[slot] += held - kept

    def rewind(self, slot: int, length: int) -> int:
        """Drop the slot's tokens from position `length` on; returns how many it still holds.

        That is `length`, or 0 where a window has moved on and tokens that it would need again are lost.
        """
        held = self.lengths[slot]
        if length >= held:
            return held
        start = self.starts[slot]
        if self.window is not None and start and length - self.window + 1 < start:
            length = 0
        for layer in range(len(self.layers)):
            first = self.first(slot, layer)
            for part in self.layers[layer]:
                part[slot, ..., max(0, length - first) : held - first, :] = 0
        self.lengths[slot] = length
        if length == 0:
            self.starts[slot] = 0
        return length

    def latent(self, layer: int, slots: slice, places: slice, dtype: torch.dtype) -> Tensor:
        """Return latents, [slots, places, L] in dtype: a view of the cache if it has that dtype."""
        parts = [part[slots, places] for part in self.layers[layer]]
        if len(parts) == 1:
            return parts[0].to(dtype)
        code, scale, rope = parts
        spread = scale.repeat_interleave(BLOCK, 2)[..., : code.shape[2]]
        return torch.cat([e4m3.decode(code, torch.float32).mul_(spread).to(dtype), rope.to(dtype)], dim=-1)

    def parts_of_latent(self, new_TL: Tensor) -> tuple[Tensor, ...]:
        """Return latents in the format in which they are stored, one tensor for each tensor of a layer."""
        if self.format == "plain":
            return (new_TL,)
        rank = self.layers[0][0].shape[-1]
        return (*encode_latent(new_TL[..., :rank]), new_TL[..., rank:])


class CacheSlot:
    """One slot of the cache, as the forward pass reads and fills it."""

    def __init__(self, cache: KvCache, slot: int) -> None:
        self.cache, self.slot = cache, slot

    @property
    def length(self) -> int:
        """How many tokens the slot holds."""
        return self.cache.lengths[self.slot]

    def store_latent(self, layer: int, new_1TL: Tensor) -> Tensor:
        """Append the latents of new tokens; returns all latents stored so far, [1, S, L] in new's dtype."""
        self._write(layer, self.cache.parts_of_latent(new_1TL[0]))
        end = self.length + new_1TL.shape[1] - self.cache.first(self.slot, layer)
        return self.cache.latent(layer, slice(self.slot, self.slot + 1), slice(end), new_1TL.dtype)

    def store_keys(self, layer: int, k_1TGK: Tensor, v_1TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; returns all stored so far, [1, G, S, K] each, in k's dtype."""
        self._write(layer, (k_1TGK[0].transpose(0, 1), v_1TGK[0].transpose(0, 1)))
        end = self.length + k_1TGK.shape[1] - self.cache.first(self.slot, layer)
        k, v = (part[self.slot : self.slot + 1, :, :end].to(k_1TGK.dtype) for part in self.cache.layers[layer])
        return k, v

    def _write(self, layer: int, new: tuple[Tensor, ...]) -> None:
        start = self.length - self.cache.first(self.slot, layer)
        for part, values in zip(self.cache.layers[layer], new, strict=True):
            part[self.slot, ..., start : start + values.shape[-2], :] = values

    def advance(self, count: int) -> None:
        """Count `count` tokens as read, after every layer has stored them."""
        self.cache.lengths[self.slot] += count


def _shapes(
    config: ModelConfig, format: CacheFormat, places: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    attention = config.attention
    if attention.kind == "gqa":
        return [((attention.kv_heads, places, attention.head_dim), dtype)] * 2
    rank, rotated = attention.kv_lora_rank, attention.rope_dim
    if format == "plain":
        return [((places, rank + rotated), dtype)]
    scales = -(-rank // BLOCK)
    return [((places, rank), torch.uint8), ((places, scales), torch.float32), ((places, rotated), dtype)]
