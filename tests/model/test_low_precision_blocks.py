"""Blocks whose products are of 8 bits go through torch.compile in one graph, on the processor's path and a card's."""

from __future__ import annotations

import pytest
import torch
import torch._inductor.config
from lowvram_kernels.attention import mla_heads
from lowvram_kernels.dispatch import Card, is_interpreted, override_card
from lowvram_kernels.layers import rms_norm, swiglu
from lowvram_kernels.matmul.quant_linear import MatmulFormat
from lowvram_kernels.moe import routing, sorting
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.model.transformer import Transformer
from tests.tiny import KINDS

# Both run the same ops; a compiler may add up in another order.
SAME = 1e-5
# Inductor divides and multiplies in another order, so that a number at a tie may take the neighbouring code of 127.
NEIGHBOUR = 2e-3
AMPERE = Card("cuda", (8, 6))
each_form = pytest.mark.parametrize("form", ["e4m3", "int8"])


def model_of(kind: str, form: MatmulFormat) -> Transformer:
    config = ModelConfig.model_validate({"layers": 2, "dim": 32, "vocabulary": 64, **KINDS[kind]})
    return Transformer(config, seed=1, matmul_format=form)


def step(model: Transformer, backend: str | None) -> list[Tensor]:
    """Return the stream and every gradient, with compiled blocks or without."""
    torch._dynamo.reset()
    if backend is not None:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
    model.zero_grad()
    token_BT = torch.arange(24).view(2, 12) % 64
    stream_BTD, _ = model(token_BT, torch.float32)
    stream_BTD.square().sum().backward()
    return [stream_BTD.detach(), *(w.grad.clone() for w in model.parameters() if w.grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = SAME) -> None:
    assert len(found) == len(expected) > 10
    for own, truth in zip(found, expected, strict=True):
        assert (own - truth).norm() <= tolerance * truth.norm()


@pytest.mark.nightly
@each_form
@pytest.mark.parametrize("kind", ["gqa-rope", "mla-moe"])
def test_a_block_is_one_graph_on_a_processor(kind: str, form: MatmulFormat) -> None:
    assert_same(step(model_of(kind, form), "aot_eager"), step(model_of(kind, form), None))


@pytest.mark.nightly
@each_form
def test_a_block_is_one_graph_on_a_cards_path(form: MatmulFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_interpreted():
        pytest.skip("a real card wants its own tensors: tests/fit/test_on_cuda.py")
    for module in (rms_norm, swiglu, mla_heads):
        monkeypatch.setattr(module, "has_kernels", lambda _: False)  # as in a compiled block, for equal roundings
    for module in (routing, sorting):
        monkeypatch.setattr(module, "runs_kernels", lambda *_: False)
    with override_card(AMPERE):
        found, expected = (step(model_of("mla-moe", form), backend) for backend in ("aot_eager", None))
    assert_same(found, expected)


@pytest.mark.nightly
@each_form
def test_inductor_compiles_a_block_of_8_bits_on_a_processor(form: MatmulFormat) -> None:
    # One width of vectors for every processor: with 512 bits the code of torch 2.13's Inductor damages the heap (malloc
    # aborts a little later).  By itself training compiles on CUDA alone.
    with torch._inductor.config.patch({"cpp.simdlen": 256}):
        found, expected = (step(model_of("gqa-rope", form), backend) for backend in ("inductor", None))
    assert_same(found, expected, NEIGHBOUR)
