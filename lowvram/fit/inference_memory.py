"""The decoder's own reading on paper: what it holds at its peak beside the model's weights; knows no limit."""

from __future__ import annotations

import torch
from lowvram_kernels.dispatch import Card, simulate_card
from torch import nn

from lowvram.fit.rehearse import BLOCK_BYTES, LiveStorage
from lowvram.generate.decoder import Decoder
from lowvram.model.kv_cache import CacheForm
from lowvram.model.transformer import Transformer


@torch.no_grad()
def rehearse_inference(
    model: Transformer, dtype: torch.dtype, slots: int, max_context: int, card: Card, cache: CacheForm = "plain"
) -> int:
    """Fill a slot's context on paper and read one more token into every slot; returns the peak's bytes.

    The model's own weights, which lie there already, are left out.  Decoding's peak is affine in max_context.
    cache: in which numbers the decoder keeps what it has read.
    """
    counter = LiveStorage(BLOCK_BYTES[card.platform])
    with simulate_card(card, counter.add_hidden), counter:
        paper = _without_numbers(model)
        weights, begin = counter.alive_bytes(), counter.moment
        decoder = Decoder(paper, max_context, slots, dtype, cache)
        decoder.prefill(0, [0] * (max_context - 1))
        decoder.decode_one_token(range(slots), [0] * slots)
    return counter.find_peak(begin)[0] - weights


def _without_numbers(model: Transformer) -> Transformer:
    """Return a model of the same tensors on paper, codes and scales included."""
    paper = Transformer(model.config, seed=None, device="meta", is_hollow=True).eval().requires_grad_(False)
    for there, here in zip(model.modules(), paper.modules(), strict=True):
        for name, weight in there._parameters.items():
            here._parameters[name] = None if weight is None else nn.Parameter(_on_paper(weight), requires_grad=False)
        for name, buffer in there._buffers.items():
            here._buffers[name] = None if buffer is None else _on_paper(buffer)
    return paper


def _on_paper(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
