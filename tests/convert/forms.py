"""Models of every kind that transformers has a class for, and those that it has none for, with words of the refusal."""

from __future__ import annotations

from lowvram.config.architecture import Gqa, Mla, Moe, Rope, SwiGlu, Window, Yarn
from lowvram.config.model import ModelConfig
from tests.model.variants import VARIANTS

_QK = VARIANTS["gqa-qk_norm"].attention
_WINDOW = VARIANTS["gqa-window"].window
_MOE = VARIANTS["gqa-moe-untied"]
# Another mscale than 1: its magnitude is no default of anybody's.
_YARN = Rope(theta=5e5, yarn=Yarn(factor=4.0, original_len=16, mscale=0.7, beta_fast=16.0, beta_slow=2.0))

_ALL: dict[str, tuple[ModelConfig, str]] = {
    "gqa-rope": (VARIANTS["gqa-rope"], "LlamaForCausalLM"),
    "gqa-rope-yarn": (VARIANTS["gqa-rope-yarn"], "LlamaForCausalLM"),
    "gqa-yarn-mscale": (VARIANTS["gqa-rope"].model_copy(update={"positions": _YARN}), "LlamaForCausalLM"),
    "gqa-qk_norm": (VARIANTS["gqa-qk_norm"], "Qwen3ForCausalLM"),
    "gqa-window": (VARIANTS["gqa-window"], "MinistralForCausalLM"),
    "gqa-window-yarn": (VARIANTS["gqa-window"].model_copy(update={"positions": _YARN}), "MinistralForCausalLM"),
    "gqa-qk_norm-window": (VARIANTS["gqa-qk_norm"].model_copy(update={"window": _WINDOW}), "Qwen3ForCausalLM"),
    "gqa-moe-untied": (_MOE, "Glm4MoeForCausalLM"),
    "gqa-moe-tied": (_MOE.model_copy(update={"tied": True}), "Glm4MoeForCausalLM"),
    "gqa-moe-qk_norm": (_MOE.model_copy(update={"attention": _QK}), "Glm4MoeForCausalLM"),
    "gqa-moe-yarn": (_MOE.model_copy(update={"positions": _YARN}), "Glm4MoeForCausalLM"),
    "gqa-moe-qk_norm-window": (_MOE.model_copy(update={"attention": _QK, "window": _WINDOW}), "Dots1ForCausalLM"),
    "mla-rope": (VARIANTS["mla-rope"], "DeepseekV3ForCausalLM"),
    "mla-yarn-q_lora": (VARIANTS["mla-yarn-q_lora"], "DeepseekV3ForCausalLM"),
    "mla-yarn-mscale": (VARIANTS["mla-rope"].model_copy(update={"positions": _YARN}), "DeepseekV3ForCausalLM"),
    "mla-moe": (VARIANTS["mla-moe"], "DeepseekV3ForCausalLM"),
    "mla-moe-untied": (VARIANTS["mla-moe"].model_copy(update={"tied": False}), "DeepseekV3ForCausalLM"),
}

# What `small_tokenizer` has found to merge.
VOCABULARY = 422
FORMS = {name: (config.model_copy(update={"vocabulary": VOCABULARY}), kind) for name, (config, kind) in _ALL.items()}

REFUSED: dict[str, tuple[ModelConfig, str]] = {
    "alibi": (VARIANTS["gqa-alibi"], '`to="gguf"`'),
    "alibi-window": (VARIANTS["gqa-alibi-window"], "opens in lowvram only"),
    "mla-window": (VARIANTS["mla-window"], "window.size is 7"),
    "mla-eps": (VARIANTS["mla-rope"].model_copy(update={"norm_eps": 1e-5}), "norm_eps is 1e-05"),
    "gqa-moe-window": (_MOE.model_copy(update={"window": _WINDOW}), "attention.qk_norm is false"),
}

# Configurations of transformers' own classes.
SMALL = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
LATENT = {
    **{key: value for key, value in SMALL.items() if key not in ("head_dim", "num_key_value_heads")},
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
}


def blocky(kind: str) -> ModelConfig:
    """Return a model whose matrices have sides below, at and above 128, some of which 128 does not divide."""
    common = {"layers": 2, "vocabulary": VOCABULARY}
    moe = Moe(hidden=384, dense_layers=1, experts=3, top_k=2, shared=1, expert_hidden=128)
    if kind == "mla":
        mla = Mla(heads=2, kv_lora_rank=192, nope_dim=64, rope_dim=32, value_dim=96)
        return ModelConfig(dim=256, attention=mla, ffn=moe, **common)
    gqa = Gqa(heads=4, kv_heads=2, head_dim=32, qk_norm=kind == "moe")
    if kind == "moe":
        narrow = moe.model_copy(update={"hidden": 256, "expert_hidden": 52})
        return ModelConfig(dim=128, attention=gqa, ffn=narrow, **common)
    return ModelConfig(dim=128, attention=gqa, ffn=SwiGlu(hidden=320), **common)


def windowed(pattern: str, layers: int = 3) -> ModelConfig:
    """Return a GQA model whose layers slide by this pattern."""
    window = Window(size=7, pattern=pattern)
    return VARIANTS["gqa-rope"].model_copy(update={"layers": layers, "window": window})
