"""Decodes one token of several texts as one replayed CUDA graph, so that a small model does not wait for launches.

A graph has fixed shapes: the first B slots, of which those without a token are inactive, and the first S cache
positions, which attention reads.  B and S are powers of two (or all there are), so there are few graphs; each is
captured when it is first needed.  Where no graph can be captured (`can_capture`), the same step runs eagerly.

Legend: N texts that get a token, B slots of a graph, S cache positions (`places`), V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lowvram_kernels.dispatch import card_of, choose, is_simulated
from torch import Tensor

from lowvram.model.decode import decode_one_token
from lowvram.model.kv_cache import KvCache
from lowvram.model.slot_attention import BatchedAttention
from lowvram.model.transformer import Transformer

# Cache positions that the smallest graph reads: fewer would cost the same.
_LEAST_PLACES = 256
# Runs before a capture, in which libraries choose kernels and allocate workspaces (torch.cuda.graph recommends them).
_WARM_UPS = 2


class Captured(NamedTuple):
    """A graph and the tensor that it writes its logits to, [B, V]."""

    graph: torch.cuda.CUDAGraph
    logit_BV: Tensor


class Graphs:
    """Reads one token each into slots of a cache by steps of fixed shapes, which a card captures and replays."""

    def __init__(self, model: Transformer, cache: KvCache, captures: bool = True) -> None:
        self.model, self.cache, self.captured = model, cache, dict[tuple[int, int], Captured]()
        # Token, position, start and whether it is active, of each slot: one copy to the card for each step.
        self._input_4B = torch.zeros(4, cache.slots, dtype=torch.int64, device=model.embedding.device)
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self.is_captured = captures and can_capture(model)

    def read(self, slot_N: Sequence[int], token_N: Sequence[int]) -> Tensor:
        """Read one token into each of the given slots; returns the logits [N, V] after them."""
        batch, places = self.shape_of(slot_N)
        self._input_4B.copy_(self._build_input(slot_N, token_N))
        logit_BV = self._replay(batch, places) if self.is_captured else self.step(batch, places)
        return logit_BV[torch.tensor(list(slot_N), device=logit_BV.device)]

    def _replay(self, batch: int, places: int) -> Tensor:
        if (batch, places) not in self.captured:
            self.captured[batch, places] = self._capture(batch, places)
        captured = self.captured[batch, places]
        captured.graph.replay()
        return captured.logit_BV

    def shape_of(self, slot_N: Sequence[int]) -> tuple[int, int]:
        """Return how many slots and cache positions the smallest graph for these slots has."""
        longest = max(self.cache.lengths[slot] for slot in slot_N) + 1
        places = max(_LEAST_PLACES, 1 << (longest - 1).bit_length())
        return min(self.cache.slots, 1 << max(slot_N).bit_length()), min(self.cache.max_context, places)

    def _build_input(self, slot_N: Sequence[int], token_N: Sequence[int]) -> Tensor:
        """Return each slot's input, [4, B], as `_input_4B`; inactive slots attend to their first token alone."""
        input_4B = torch.zeros(4, self.cache.slots, dtype=torch.int64)
        for slot, token in zip(slot_N, token_N, strict=True):
            column = [token, self.cache.lengths[slot], self.cache.starts[slot], 1]
            input_4B[:, slot] = torch.tensor(column)
        return input_4B

    def step(self, batch: int, places: int) -> Tensor:
        """Run the step that a graph captures: no reads on the host; returns the logits of the first slots, [B, V]."""
        token_B, position_B, start_B, active_B = self._input_4B[:, :batch]
        attention = BatchedAttention(self.cache, position_B, start_B, active_B.bool(), places)
        return decode_one_token(self.model, token_B, attention, self.cache.dtype)

    def _capture(self, batch: int, places: int) -> Captured:
        """Run the step until its libraries are warm, which writes the same numbers each time, and capture it."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = _side_stream(self._input_4B.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.step(batch, places)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logit_BV = self.step(batch, places)
        return Captured(graph, logit_BV)


def can_capture(model: Transformer) -> bool:
    """Say whether a step of the model can be captured: on a card, and where its experts need nothing on the host."""
    device = model.embedding.device
    if device.type != "cuda" or is_simulated():
        return False
    return not model.moe_layers() or choose("grouped_matmul", card_of(device)).backend == "triton"


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream on which graphs are captured: cuBLAS keeps a workspace for every stream that is used."""
    return torch.cuda.Stream(device)
