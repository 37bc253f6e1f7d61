"""A model and what it has read of some texts at once, each at its own length; knows neither text nor sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowvram.model.cache import Cache
from lowvram.model.transformer import Transformer


class Decoder:
    """Reads tokens into slots, one text each, and returns the logits behind them."""

    def __init__(self, model: Transformer, max_context: int, slots: int = 1, dtype: torch.dtype | None = None) -> None:
        self.model, self.max_context, self.slots = model, max_context, slots
        self.dtype = dtype or model.embedding.dtype
        device = model.embedding.device
        self._caches = [Cache(model.config, 1, max_context, self.dtype, device) for _ in range(slots)]

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self._caches[slot].length

    def rewind(self, slot: int, length: int) -> int:
        """Forget the slot's tokens from number `length` on, or more of them; returns how many it still holds."""
        self._caches[slot].rewind(length)
        return self._caches[slot].length

    def prefill(self, slot: int, token_T: Sequence[int]) -> Tensor:
        """Read tokens behind what the slot holds; returns the logits [V] after the last of them."""
        return self._read(slot, token_T)

    def decode_one_token(self, slot_N: Sequence[int], token_N: Sequence[int]) -> Tensor:
        """Read one token into each of the slots named; returns the logits [N, V] after them."""
        return torch.stack([self._read(slot, [token]) for slot, token in zip(slot_N, token_N, strict=True)])

    @torch.no_grad()
    def _read(self, slot: int, token_T: Sequence[int]) -> Tensor:
        token_BT = torch.tensor([list(token_T)], device=self.model.embedding.device)
        stream_BTD, _ = self.model(token_BT, self.dtype, cache=self._caches[slot])
        return (stream_BTD[0, -1:] @ self.model.head_VD.to(self.dtype).T)[0]
