"""A config.json becomes a form, or the key and the value that stand against it are named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowvram.config.architecture import Gqa, Mla, Moe, SwiGlu, Window
from lowvram.convert.hf.config_in import read_hf_config
from lowvram.convert.hf.config_out import to_hf_config
from lowvram.errors import ExportError
from tests.convert.forms import FORMS

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
DEEPSEEK: dict[str, Any] = LLAMA | {
    "model_type": "deepseek_v3",
    "kv_lora_rank": 20,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
GLM = DEEPSEEK | {"model_type": "glm4_moe", "partial_rotary_factor": 1.0, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LATENT_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize("name", FORMS)
def test_what_is_written_is_read_as_the_same_form(name: str) -> None:
    config, _ = FORMS[name]
    table = json.loads(json.dumps(to_hf_config(config, 512)))
    form = read_hf_config(table)
    assert form.model == config
    assert form.trained_positions == 512


@pytest.mark.parametrize("name", FORMS)
def test_without_our_own_words_only_what_no_computation_needs_is_lost(name: str) -> None:
    config, _ = FORMS[name]
    table = to_hf_config(config, 512)
    del table["lowvram"]
    assert read_hf_config(table).model == config, "their values are the default ones here"


def test_a_bare_llama_is_read_with_the_defaults_of_its_class() -> None:
    model, longest, trained = read_hf_config(LLAMA)
    assert model.attention == Gqa(heads=4, kv_heads=4, head_dim=12)
    assert model.ffn == SwiGlu(hidden=60)
    assert (model.tied, model.norm_eps, model.positions.theta, longest, trained) == (False, 1e-6, 1e4, 2048, 2048)


def test_a_bare_qwen3_has_heads_of_128() -> None:
    model = read_hf_config(LLAMA | {"model_type": "qwen3"}).model
    assert model.attention == Gqa(heads=4, kv_heads=4, head_dim=128, qk_norm=True)
    assert model.window is None


def test_deepseek_is_read_with_its_experts() -> None:
    model = read_hf_config(DEEPSEEK).model
    assert model.attention == Mla(heads=4, kv_lora_rank=20, nope_dim=12, rope_dim=8, value_dim=12)
    assert model.ffn == Moe(hidden=60, dense_layers=1, experts=5, top_k=2, expert_hidden=20, route_scale=2.5)


def test_deepseek_with_dense_layers_only_has_no_experts() -> None:
    assert read_hf_config(DEEPSEEK | {"first_k_dense_replace": 3}).model.ffn == SwiGlu(hidden=60)


@pytest.mark.parametrize("is_new", [True, False], ids=["rope_parameters", "rope_scaling"])
def test_rope_is_read_in_both_forms(is_new: bool) -> None:
    said = {"rope_parameters": {**YARN, "rope_theta": 5e5}} if is_new else {"rope_scaling": YARN, "rope_theta": 5e5}
    rope = read_hf_config(LLAMA | said).model.positions
    assert (rope.theta, rope.yarn.factor, rope.yarn.original_len, rope.yarn.mscale) == (5e5, 4.0, 16, 1.0)


def test_the_type_of_rope_has_an_older_name() -> None:
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert read_hf_config(LLAMA | {"rope_scaling": old}).model.positions.yarn is not None


def test_an_attention_factor_becomes_our_mscale() -> None:
    yarn = read_hf_config(LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.25}}).model.positions.yarn
    assert yarn.magnitude == pytest.approx(1.25, rel=1e-12)


def test_the_factor_of_yarn_may_follow_from_the_lengths() -> None:
    said = {"max_position_embeddings": 128, "rope_scaling": YARN | {"factor": None}}
    assert read_hf_config(LLAMA | said).model.positions.yarn.factor == 8.0


@pytest.mark.parametrize(
    "said, expected",
    [
        ({"model_type": "mistral"}, Window(size=4096, pattern="SSS")),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 9}, Window(size=9, pattern="SSS")),
        ({"model_type": "qwen3", "sliding_window": 9}, None),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
            Window(size=9, pattern="FFS"),
        ),
        (
            {"model_type": "ministral", "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"] * 2,
             "num_hidden_layers": 4},
            Window(size=9, pattern="FSFS"),
        ),
        ({"model_type": "llama", "sliding_window": 9}, None),
    ],
    ids=["mistral", "mistral-null", "mistral-9", "qwen3-off", "qwen3-on", "ministral", "llama"],
)  # fmt: skip
def test_windows_are_read_as_each_class_has_them(said: dict[str, Any], expected: Window | None) -> None:
    assert read_hf_config(LLAMA | said).model.window == expected


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": (LLAMA | {"model_type": "gpt2"}, "model_type is 'gpt2'"),
    "no type": ({}, "model_type is None"),
    "gelu": (LLAMA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention bias": (LLAMA | {"attention_bias": True}, "attention_bias is True"),
    "mlp bias": (LLAMA | {"mlp_bias": True}, "mlp_bias is True"),
    "llama3 rope": (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
    "linear rope": (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    "rope as a word": (LLAMA | {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
    "unrounded ramp": (LLAMA | {"rope_scaling": YARN | {"truncate": False}}, "truncate is False"),
    "flat yarn": (LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor is 1.0"),
    "partial rotation": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "glm's partial rotation": (
        {key: value for key, value in GLM.items() if key != "partial_rotary_factor"},
        "partial_rotary_factor is 0.5",
    ),
    "groups": (DEEPSEEK | {"n_group": 8}, "n_group is 8"),
    "groups unsaid": ({k: v for k, v in DEEPSEEK.items() if k != "n_group"}, "n_group is 8"),
    "softmax routing": (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    "greedy routing": (DEEPSEEK | {"topk_method": "greedy"}, "topk_method is 'greedy'"),
    "raw weights": (DEEPSEEK | {"norm_topk_prob": False}, "norm_topk_prob is False"),
    "every second layer": (DEEPSEEK | {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    "halves": (DEEPSEEK | {"rope_interleave": False}, "rope_interleave is False"),
    "no shared expert": (DEEPSEEK | {"n_shared_experts": None}, "has no n_shared_experts"),
    "no rank": (DEEPSEEK | {"kv_lora_rank": None}, "has no kv_lora_rank"),
    "queries unsaid": ({k: v for k, v in DEEPSEEK.items() if k != "q_lora_rank"}, "has no q_lora_rank"),
    "latent epsilon": (DEEPSEEK | {"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    "unequal mscales": (DEEPSEEK | {"rope_scaling": LATENT_YARN | {"mscale": 0.7}}, "(0.7, 1.0, None)"),
    "no mscale": (DEEPSEEK | {"rope_scaling": YARN}, "(None, None, None)"),
    "missing width": ({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "has no hidden_size"),
    "a word for a width": (LLAMA | {"hidden_size": "48"}, "hidden_size is '48'"),
    "a negative width": (LLAMA | {"vocab_size": -1}, "vocab_size is -1"),
    "half a layer": (LLAMA | {"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    "heads that do not divide": (LLAMA | {"num_key_value_heads": 3}, "attention.kv_heads is 3"),
    "odd heads": (LLAMA | {"head_dim": 13}, "attention.head_dim is 13"),
    "too many choices": (DEEPSEEK | {"num_experts_per_tok": 9}, "ffn.top_k is 9"),
    "unknown layers": (
        LLAMA | {"model_type": "ministral", "sliding_window": 9, "layer_types": ["chunked_attention"] * 3},
        "layer_types is 'chunked_attention'",
    ),
    "too few layers": (
        LLAMA | {"model_type": "ministral", "sliding_window": 9, "layer_types": ["full_attention"]},
        "layer_types is ['full_attention']",
    ),
}


@pytest.mark.parametrize("table, words", REFUSALS.values(), ids=REFUSALS)
def test_what_our_model_cannot_be_is_named_by_key_and_value(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError) as caught:
        read_hf_config(table)
    assert words in str(caught.value)
    assert all((caught.value.what, caught.value.why, caught.value.fix))


def test_reading_leaves_the_table_alone() -> None:
    table = to_hf_config(FORMS["mla-yarn-q_lora"][0], 64)
    before = json.dumps(table)
    read_hf_config(table)
    assert json.dumps(table) == before
