"""Writes a ModelConfig as transformers' config.json, and chooses the architecture; knows no tensor and no file.

    llama       GQA                             ministral   GQA with a window in some layers
    qwen3       GQA with q/k norm, or window    glm4_moe    GQA with experts, with or without q/k norm
    dots1       GQA with q/k norm, experts and a window
    deepseek_v3 MLA, with experts or without

Source of each class's keys, defaults and constants: transformers 5.24, models/*/configuration_*.py and modeling_*.py;
tests compare the logits of every class with ours.
"""

from __future__ import annotations

from typing import Any

from lowvram.config.architecture import Mla, Moe, Window
from lowvram.config.model import ModelConfig
from lowvram.errors import ExportError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
# DeepseekV3RMSNorm uses this for the norms inside MLA, whatever config.json says.
MLA_NORM_EPS = 1e-6
# Our own table in config.json, for settings that transformers has no key for; transformers keeps and ignores it.
OWN = "lowvram"


def choose_family(model: ModelConfig) -> str:
    """Return the `model_type` for a model; raises ExportError naming the key where transformers has none."""
    if model.positions.kind == "alibi":
        fix = "Such a model opens in lowvram only; choose another form before training."
        has_norms = model.attention.kind == "gqa" and model.attention.qk_norm
        if model.ffn.kind == "swiglu" and model.window is None and not has_norms:
            fix = 'Export it with `to="gguf"`: llama.cpp\'s architecture refact is exactly this model.'
        why = "transformers has no class with ALiBi, grouped queries and SwiGLU."
        raise ExportError('positions.kind is "alibi".', why, fix)
    if model.attention.kind == "mla":
        if model.window is not None:
            raise _no_class(
                f"window.size is {model.window.size}", "DeepseekV3ForCausalLM sees all tokens in every layer"
            )
        if model.norm_eps != MLA_NORM_EPS:
            why = f"transformers computes the norms inside MLA with {MLA_NORM_EPS:g}, whatever config.json says"
            raise _no_class(f"norm_eps is {model.norm_eps:g}", why)
        return "deepseek_v3"
    if model.ffn.kind == "moe":
        if model.window is None:
            return "glm4_moe"
        if not model.attention.qk_norm:
            why = "of its classes with such experts only Dots1 has windows, and that one has q/k norms"
            raise _no_class(f"window.size is {model.window.size} and attention.qk_norm is false", why)
        return "dots1"
    if model.attention.qk_norm:
        return "qwen3"
    return "llama" if model.window is None else "ministral"


def _no_class(what: str, why: str) -> ExportError:
    return ExportError(
        f"{what}.", f"{why}.", "Such a model opens in lowvram only; choose another form before training."
    )


def to_hf_config(model: ModelConfig, max_positions: int) -> dict[str, Any]:
    """Return the keys of config.json that describe a model; raises ExportError as `choose_family` does.

    max_positions: the longest text that it was trained on; if YaRN reaches further, its reach is written.
    """
    family = choose_family(model)
    attention, ffn = model.attention, model.ffn
    rope = to_rope_config(model)
    if family == "glm4_moe":  # its default rotates only half of each head
        rope["partial_rotary_factor"] = 1.0
    is_long = rope["rope_type"] == "yarn"
    reach = round(rope["factor"] * rope["original_max_position_embeddings"]) if is_long else 0
    common = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "vocab_size": model.vocabulary,
        "hidden_size": model.dim,
        "intermediate_size": ffn.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads if attention.kind == "gqa" else attention.heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": max(max_positions, reach),
        # Both spellings are written: MLX and older programs know only rope_theta and rope_scaling.
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": _older_form(rope) if is_long else None,
        "use_cache": True,
        OWN: {"trained_positions": max_positions},
    }
    if attention.kind == "mla":
        common |= _mla_settings(attention)
    else:
        common |= {"head_dim": attention.head_dim}
    if family == "llama":
        common |= {"mlp_bias": False}
    if family == "glm4_moe":
        common |= {"use_qk_norm": attention.kind == "gqa" and attention.qk_norm, "partial_rotary_factor": 1.0}
    if model.window is not None:
        common |= _window_settings(model, model.window)
        common[OWN]["window_pattern"] = model.window.pattern
    if ffn.kind == "moe":
        common |= _moe_settings(ffn)
        common[OWN]["balance_rate"] = ffn.balance_rate
    elif family == "deepseek_v3":
        common |= {"first_k_dense_replace": model.layers}
    return common


def to_rope_config(model: ModelConfig) -> dict[str, Any]:
    """Return `rope_parameters`."""
    rope = model.positions
    assert rope.kind == "rope", "choose_family has refused the others"
    if rope.yarn is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    yarn = rope.yarn
    config = {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
    }
    # In DeepSeek, equal mscales cancel in the rotary table and act on the softmax scale; others scale the table.
    return config | (
        {"mscale_all_dim": yarn.mscale} if model.attention.kind == "mla" else {"attention_factor": yarn.magnitude}
    )


def _older_form(rope: dict[str, Any]) -> dict[str, Any]:
    """Return `rope_scaling` for older programs, which expect theta and the rotated part beside it, not in it."""
    apart = ("rope_theta", "partial_rotary_factor")
    return {"type": rope["rope_type"], **{key: value for key, value in rope.items() if key not in apart}}


def _mla_settings(attention: Mla) -> dict[str, Any]:
    return {
        "kv_lora_rank": attention.kv_lora_rank,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.nope_dim,
        "qk_rope_head_dim": attention.rope_dim,
        "v_head_dim": attention.value_dim,
        "rope_interleave": True,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def _moe_settings(ffn: Moe) -> dict[str, Any]:
    return {
        "n_routed_experts": ffn.experts,
        "num_experts_per_tok": ffn.top_k,
        "n_shared_experts": ffn.shared,
        "moe_intermediate_size": ffn.expert_hidden,
        "first_k_dense_replace": ffn.dense_layers,
        "moe_layer_freq": 1,
        "routed_scaling_factor": ffn.route_scale,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    }


def _window_settings(model: ModelConfig, window: Window) -> dict[str, Any]:
    kinds = ["full_attention" if model.window_of(n) is None else "sliding_attention" for n in range(model.layers)]
    return {
        "sliding_window": window.size,
        "layer_types": kinds,
        # Without this key, Qwen3 ignores its window; layer_types describes the rest.
        "use_sliding_window": True,
        "max_window_layers": 0,
    }
