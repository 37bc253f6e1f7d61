"""Keeps the keys and values of beginnings that several texts share, for one pass over what follows; knows no text.

Legend: N beginnings, B texts that go on after one of them, G key/value heads, P tokens of a beginning, T new tokens,
S = P + T, K width of a head, L width of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.model.kv_cache import CacheSlot


class PrefixCache(CacheSlot):
    """What the forward pass stores of N beginnings of equal length, in the interface of a slot of the KV cache.

    Unlike a slot it holds several texts, and what is read after `fork` is not kept.
    """

    def __init__(self, length: int = 0, layers: dict[int, tuple[Tensor, ...]] | None = None) -> None:
        self._length, self._row_B = length, None if layers is None else torch.empty(0)
        self._layers: dict[int, tuple[Tensor, ...]] = {} if layers is None else layers

    def fork(self, row_B: Tensor) -> PrefixCache:
        """Return the cache for texts of which number b goes on after beginning row_B[b]."""
        forked = PrefixCache(self._length, self._layers)
        forked._row_B = row_B
        return forked

    @property
    def length(self) -> int:
        """How many tokens each beginning has."""
        return self._length

    def store_latent(self, layer: int, new_1TL: Tensor) -> Tensor:
        """Return the latents of the beginnings and of the new tokens, [B, S, L]."""
        return self._extend(layer, (new_1TL,), dim=1)[0]

    def store_keys(self, layer: int, k_1TGK: Tensor, v_1TGK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the beginnings and of the new tokens, [B, G, S, K] each."""
        k_BGSK, v_BGSK = self._extend(layer, (k_1TGK.transpose(1, 2), v_1TGK.transpose(1, 2)), dim=2)
        return k_BGSK, v_BGSK

    def _extend(self, layer: int, new: tuple[Tensor, ...], dim: int) -> tuple[Tensor, ...]:
        if self._row_B is None:
            self._layers[layer] = new
            return new
        held = self._layers[layer]
        return tuple(torch.cat([old[self._row_B], late], dim) for old, late in zip(held, new, strict=True))

    def advance(self, count: int) -> None:
        """Count the tokens of the beginnings as read."""
        if self._row_B is None:
            self._length += count
