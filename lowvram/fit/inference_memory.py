"""Replays inference on meta tensors to find its peak memory beside the model's weights; knows no limit."""

from __future__ import annotations

import torch
from lowvram_kernels.dispatch import Card, simulate_card
from torch import nn

from lowvram.fit.rehearse import BLOCK_BYTES, LiveStorage
from lowvram.generate.decoder import Decoder
from lowvram.generate.sampling import Sampler, Wish, launch_draws
from lowvram.model.kv_cache import CacheFormat
from lowvram.model.transformer import Transformer

# What takes most: a penalty, a filter of all tokens, and log-probabilities.
_COSTLIEST = Wish(Sampler(top_k=0, top_p=0.5, repetition_penalty=1.5), 0, top=20)


@torch.no_grad()
def rehearse_inference(
    model: Transformer, dtype: torch.dtype, slots: int, max_context: int, card: Card, cache: CacheFormat = "plain"
) -> int:
    """Fill one slot's context on meta tensors, draw one more token in every slot, and return the peak in bytes.

    The model's weights, which are in memory already, are not counted.  The peak is affine in max_context.
    cache: the number format of the decoder's KV cache.
    """
    counter = LiveStorage(BLOCK_BYTES[card.platform])
    with simulate_card(card, counter.add_hidden), counter:
        meta_model = _meta_copy(model)
        weights, begin = counter.alive_bytes(), counter.moment
        decoder = Decoder(meta_model, max_context, slots, dtype, cache)
        decoder.prefill(0, [0] * (max_context - 1))
        logit_NV = decoder.decode_one_token(range(slots), [0] * slots)
        seen_SV = torch.zeros(slots, logit_NV.shape[1], dtype=torch.bool, device="meta")
        launch_draws(logit_NV, [_COSTLIEST] * slots, seen_SV[list(range(slots))])
    return counter.find_peak(begin)[0] - weights


def _meta_copy(model: Transformer) -> Transformer:
    """Return a model whose tensors are meta tensors of the same shapes and dtypes, codes and scales included."""
    copy = Transformer(model.config, seed=None, device="meta", is_hollow=True).eval().requires_grad_(False)
    for source, target in zip(model.modules(), copy.modules(), strict=True):
        for name, weight in source._parameters.items():
            target._parameters[name] = None if weight is None else nn.Parameter(_to_meta(weight), requires_grad=False)
        for name, buffer in source._buffers.items():
            target._buffers[name] = None if buffer is None else _to_meta(buffer)
    return copy


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
