"""Parameters and logits equal those of transformers' own Llama, Qwen3 and DeepseekV3 classes."""

from __future__ import annotations

import pytest
import torch

from lowvram.config.architecture import Gqa, Mla, Moe, Rope, SwiGlu, Yarn
from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset, preset_names
from lowvram.model.transformer import Transformer
from tests.model.outside import outside_class, outside_twin, randomise

LENGTH = 200
ABSOLUTE = 1e-4

YARN = Rope(yarn=Yarn(factor=8.0, original_len=64))
DENSE = SwiGlu(hidden=172)
MOE = Moe(hidden=172, dense_layers=1, experts=5, top_k=2, shared=1, expert_hidden=44, route_scale=1.5)


def gqa(qk_norm: bool = False) -> Gqa:
    return Gqa(heads=6, kv_heads=2, head_dim=16, qk_norm=qk_norm)


def mla(q_lora_rank: int | None = None) -> Mla:
    return Mla(heads=3, kv_lora_rank=40, q_lora_rank=q_lora_rank, nope_dim=24, rope_dim=16, value_dim=20)


FORMS = {
    "llama": (gqa(), Rope(), DENSE),
    "llama-yarn": (gqa(), YARN, DENSE),
    "qwen3": (gqa(qk_norm=True), Rope(theta=5e5), DENSE),
    "qwen3-yarn": (gqa(qk_norm=True), YARN, DENSE),
    "deepseek": (mla(), Rope(), MOE),
    "deepseek-yarn": (mla(), YARN, MOE),
    "deepseek-q_lora": (mla(q_lora_rank=36), Rope(), MOE),
    "deepseek-q_lora-yarn": (mla(q_lora_rank=36), YARN, MOE),
    "deepseek-dense": (mla(), Rope(), DENSE),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_agree_with_transformers_over_200_positions(form: str, tied: bool) -> None:
    attention, positions, ffn = FORMS[form]
    config = ModelConfig(
        layers=3, dim=108, vocabulary=211, attention=attention, positions=positions, ffn=ffn, tied=tied
    )
    model = randomise(Transformer(config))
    twin = outside_twin(model)
    token_BT = torch.randint(0, 211, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(token_BT), twin(token_BT).logits
    assert ours.std() > 0.3, "logits that hardly vary would agree with anything"
    torch.testing.assert_close(ours, theirs, atol=ABSOLUTE, rtol=0)


@pytest.mark.parametrize("name", [n for n in preset_names() if not n.startswith("tiny-llm")])
def test_a_preset_counts_its_parameters_as_transformers_does(name: str) -> None:
    config, _ = load_preset(name)
    kind, settings = outside_class(config)
    with torch.device("meta"):
        twin = kind(settings)
    assert config.num_parameters() == sum(weight.numel() for weight in twin.parameters())


@pytest.mark.parametrize("name, parameters", [("tiny-llm-v1", 24_697_088), ("tiny-llm-v2", 67_580_416)])
def test_the_seed_reports_models_have_exactly_their_parameters(name: str, parameters: int) -> None:
    config, _ = load_preset(name)
    assert config.num_parameters() == parameters
    assert sum(weight.numel() for weight in Transformer(config).parameters()) == parameters
