"""The decoder's reading on paper against the bytes that a real one takes."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Card

from lowvram.fit.inference_memory import rehearse_inference
from lowvram.generate.decoder import Decoder
from lowvram.generate.sampling import BatchSampler, Sampler, Wish
from lowvram.generate.weights import load_for_inference
from lowvram.model.transformer import Transformer
from tests.generate.test_weights import source_of
from tests.kernels.measures import LiveBytes
from tests.model.variants import VARIANTS

every_kind = pytest.mark.parametrize("kind", ["gqa-rope", "gqa-alibi-window", "mla-moe", "gqa-moe-untied"])


def model_of(kind: str, precision: str) -> Transformer:
    return load_for_inference(source_of(VARIANTS[kind]), precision, compute_dtype=torch.float32)


@every_kind
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_paper_tells_the_bytes_of_a_real_reading(kind: str, precision: str) -> None:
    model, length, slots = model_of(kind, precision), 300, 2
    tensors = [*model.parameters(), *model.buffers()]
    with torch.no_grad(), LiveBytes().ignore(*tensors) as live:
        decoder = Decoder(model, length, slots, torch.float32)
        decoder.prefill(0, [0] * (length - 1))
        logit_NV = decoder.decode_one_token(range(slots), [0] * slots)
        sampler = BatchSampler(slots)
        wish = Wish(Sampler(top_k=0, top_p=0.9, repetition_penalty=1.1), length, top=3)
        for slot in range(slots):
            sampler.begin(slot, wish.sampler, [0])
        sampler.draw(range(slots), [wish] * slots, logit_NV)
    told = rehearse_inference(model, torch.float32, slots, length, Card("cpu"))
    assert told == pytest.approx(live.peak, rel=0.05)


@every_kind
def test_the_bytes_are_affine_in_the_context_and_grow_with_the_slots(kind: str) -> None:
    model = model_of(kind, "fp8")
    one, two, four = (rehearse_inference(model, torch.float32, 1, n, Card("cpu")) for n in (1025, 2049, 4097))
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    more = rehearse_inference(model, torch.float32, 5, 1025, Card("cpu"))
    held = Decoder(model, 1025, 1, torch.float32).cache_bytes
    assert held < one
    assert more >= one + 4 * held


def test_nothing_of_the_model_is_touched_or_counted() -> None:
    model = model_of("mla-moe", "fp8")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rehearse_inference(model, torch.float32, 1, 64, Card("cpu"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
