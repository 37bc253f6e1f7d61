"""A model whose products are of 8 bits by a card's kernels: codes kept or made at use, and against the plain form."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.matmul.fp32_sums import adding_to_grads
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.model.transformer import Transformer
from tests.kernels.cards import DEVICE, running_on
from tests.kernels.measures import relative_error
from tests.model.outside import randomise

GQA = {"kind": "gqa", "heads": 2, "kv_heads": 2, "head_dim": 64}
MLA = {"kind": "mla", "heads": 2, "kv_lora_rank": 48, "nope_dim": 32, "rope_dim": 32, "value_dim": 64}
DENSE = {"kind": "swiglu", "hidden": 128}
MOE = {"kind": "moe", "hidden": 128, "dense_layers": 0, "experts": 3, "top_k": 2, "expert_hidden": 32, "shared": 1}
MODELS = {
    "normed heads": ({**GQA, "qk_norm": True}, DENSE),
    "bare heads": ({**GQA, "qk_norm": False}, DENSE),
    "latents and experts": (MLA, MOE),
}


def model_of(name: str, matmul_format: Any) -> Transformer:
    attention, ffn = MODELS[name]
    given = {"layers": 1, "dim": 128, "vocabulary": 60, "attention": attention, "ffn": ffn}
    config = ModelConfig.model_validate(given)
    return randomise(Transformer(config, matmul_format=matmul_format)).to(DEVICE)


def learn(model: Transformer, dtype: torch.dtype, keeps: bool = False) -> list[Tensor]:
    """Return the hidden states and the gradients; with kept codes their means over two equal micro-batches."""
    for weight in model.parameters():
        weight.grad = None
    model.kept_casts = None
    if keeps:
        model.keep_casts(dtype)
        assert model.kept_casts is not None
        model.kept_casts.refresh()
    token_BT = torch.arange(2 * 13, device=DEVICE).view(2, 13) * 7 % 60
    for _ in range(2 if keeps else 1):
        with model.kept_casts.in_use() if model.kept_casts is not None else nullcontext():
            hidden_BTD, _ = model(token_BT, dtype)
            with adding_to_grads():
                hidden_BTD.backward(torch.linspace(-1e-2, 1e-2, 128, device=DEVICE).to(dtype).expand_as(hidden_BTD))
    grads = [weight.grad for weight in model.parameters()]
    share = 0.5 if keeps else 1.0
    return [hidden_BTD.detach(), *(grad * share for grad in grads if grad is not None)]


@pytest.mark.default_cases("normed heads-e4m3")
@pytest.mark.parametrize("matmul_format", ["e4m3", "int8"])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_card_is_as_near_to_the_truth_as_the_plain_form(name: str, matmul_format: str) -> None:
    # Numbers that are rounded another way move codes to their neighbours, so two ways differ as much as each from fp32.
    with override_card(Card(DEVICE)):
        truth = learn(model_of(name, "plain"), torch.float32)
        model = model_of(name, matmul_format)
        plain = learn(model, torch.float16)
    with running_on("sm86"):
        own = learn(model, torch.float16, keeps=True)
    for right, other, one in zip(truth, plain, own, strict=True):
        usual = relative_error(other, right)
        assert usual < 0.5
        assert one.dtype == other.dtype
        assert relative_error(one, right) < 1.5 * usual + 0.01
