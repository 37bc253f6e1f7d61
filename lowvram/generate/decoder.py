"""Runs a model with a KV cache for several texts, each at its own length; knows neither text nor sampling.

Many tokens of one text are read in chunks, so that the memory for activations is bounded.  One token each of several
texts is one batch; on a CUDA card it is one replayed graph.

Legend: T tokens of one text, N texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lowvram_kernels.dispatch import card_of
from torch import Tensor

from lowvram.generate.graphs import Graphs
from lowvram.model.decode import decode_one_token, read_out
from lowvram.model.kv_cache import CacheFormat, CacheSlot, KvCache
from lowvram.model.linear import is_slow_in_half
from lowvram.model.slot_attention import JoinedAttention, PerSlotAttention
from lowvram.model.transformer import Transformer


class Decoder:
    """Reads tokens into slots, one text each, and returns the logits after them.

    dtype: of the computation and of the cache (the weights' own if None).  cache: "e4m3" keeps MLA's latents in 8 bits.
    chunk: how many tokens of a text are read at once.  captures: whether steps on a card are captured as CUDA graphs,
    which take memory and pay off after a text or two.
    """

    def __init__(
        self,
        model: Transformer,
        max_context: int,
        slots: int = 1,
        dtype: torch.dtype | None = None,
        cache: CacheFormat = "plain",
        chunk: int = 512,
        captures: bool = True,
    ) -> None:
        self.model, self.max_context, self.slots = model, max_context, slots
        self.dtype, device = dtype or model.embedding.dtype, model.embedding.device
        self.cache = KvCache(model.config, slots, max_context, self.dtype, device, cache, chunk)
        self._graphs = Graphs(model, self.cache, captures) if card_of(device).platform == "cuda" else None

    @property
    def cache_bytes(self) -> int:
        """How many bytes it takes besides the model."""
        return self.cache.bytes

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self.cache.lengths[slot]

    @torch.inference_mode()
    def rewind(self, slot: int, length: int) -> int:
        """Drop the slot's tokens from number `length` on, perhaps earlier ones too; returns how many it still holds."""
        return self.cache.rewind(slot, length)

    @torch.inference_mode()
    def prefill(self, slot: int, token_T: Sequence[int]) -> Tensor:
        """Read tokens that follow what the slot holds; returns the logits [V] after the last of them."""
        if len(token_T) == 1:
            return self.decode_one_token([slot], token_T)[0]
        token_BT = torch.tensor([list(token_T)], device=self.model.embedding.device)
        for part_BT in token_BT.split(self.cache.chunk, dim=1):
            last_D = self._read(slot, part_BT)
        return read_out(self.model, last_D[None])[0]

    def _read(self, slot: int, token_BT: Tensor) -> Tensor:
        """Read one chunk; returns the hidden state [D] of its last token."""
        self.cache.make_room(slot, token_BT.shape[1])
        # A processor without instructions for 16-bit numbers reads many tokens several times as fast in fp32.
        is_slow = is_slow_in_half(torch.empty(0, dtype=self.dtype, device=token_BT.device))
        dtype = torch.float32 if is_slow else self.dtype
        hidden_BTD, _ = self.model(token_BT, dtype, cache=CacheSlot(self.cache, slot))
        return hidden_BTD[0, -1].to(self.dtype)

    @torch.inference_mode()
    def decode_one_token(self, slot_N: Sequence[int], token_N: Sequence[int]) -> Tensor:
        """Read one token into each of the given slots, all different; returns the logits [N, V] after them."""
        for slot in slot_N:
            self.cache.make_room(slot, 1)
        if self._graphs is None:
            token = torch.tensor(list(token_N), device=self.model.embedding.device)
            attention = PerSlotAttention if len(slot_N) == 1 else JoinedAttention
            logit_NV = decode_one_token(self.model, token, attention(self.cache, slot_N), self.dtype)
        else:
            logit_NV = self._graphs.read(slot_N, token_N)
        for slot in slot_N:
            self.cache.lengths[slot] += 1
        return logit_NV
