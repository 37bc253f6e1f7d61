"""The same network as a class of transformers, with the same weights: the outside that the model is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lowvram.config.model import ModelConfig
from lowvram.model.transformer import Transformer


def outside_class(config: ModelConfig) -> tuple[type[nn.Module], Any]:
    """Return transformers' class and its configuration for the same numbers."""
    common = {
        "vocab_size": config.vocabulary,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.attention.heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": _rope(config),
        "max_position_embeddings": 8192,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    attention, ffn = config.attention, config.ffn
    if attention.kind == "gqa":
        kind, settings = (Qwen3ForCausalLM, Qwen3Config) if attention.qk_norm else (LlamaForCausalLM, LlamaConfig)
        return kind, settings(**common, num_key_value_heads=attention.kv_heads, head_dim=attention.head_dim)
    routed = (
        {}
        if ffn.kind == "swiglu"
        else {
            "n_routed_experts": ffn.experts,
            "num_experts_per_tok": ffn.top_k,
            "n_shared_experts": ffn.shared,
            "moe_intermediate_size": ffn.expert_hidden,
            "first_k_dense_replace": ffn.dense_layers,
            "routed_scaling_factor": ffn.route_scale,
        }
    )
    if ffn.kind == "swiglu":
        routed = {"first_k_dense_replace": config.layers}
    return DeepseekV3ForCausalLM, DeepseekV3Config(
        **common,
        **routed,
        num_key_value_heads=attention.heads,
        kv_lora_rank=attention.kv_lora_rank,
        q_lora_rank=attention.q_lora_rank,
        qk_nope_head_dim=attention.nope_dim,
        qk_rope_head_dim=attention.rope_dim,
        v_head_dim=attention.value_dim,
        n_group=1,
        topk_group=1,
    )


def _rope(config: ModelConfig) -> dict[str, Any]:
    yarn = config.positions.yarn
    if yarn is None:
        return {"rope_type": "default", "rope_theta": config.positions.theta}
    return {
        "rope_type": "yarn",
        "rope_theta": config.positions.theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        # Equal mscales cancel in DeepSeek's table and act in its softmax scale; Llama and Qwen put theirs in the table.
        **({"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale} if config.attention.kind == "mla" else {}),
    }


def outside_twin(model: Transformer) -> nn.Module:
    """Return transformers' model with this model's weights, in fp32."""
    kind, settings = outside_class(model.config)
    twin = kind(settings).eval()
    missing, unexpected = twin.load_state_dict(outside_names(model), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"} if model.config.tied else not missing
    return twin


_NAMES = {
    "attention.norm": "input_layernorm",
    "ffn.norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
}


def outside_names(model: Transformer) -> dict[str, Tensor]:
    """Return this model's tensors under transformers' names and in its layout."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "embedding":
            renamed["model.embed_tokens.weight"] = tensor
        elif name == "head":
            renamed["lm_head.weight"] = tensor
        elif name == "norm.weight":
            renamed["model.norm.weight"] = tensor
        else:
            layer, rest = name.removeprefix("blocks.").split(".", 1)
            renamed |= {f"model.layers.{layer}.{new}": value for new, value in _in_layer(rest, tensor).items()}
    return renamed


def _in_layer(name: str, tensor: Tensor) -> dict[str, Tensor]:
    stem = name.removesuffix(".weight")
    if stem in _NAMES:
        return {f"{_NAMES[stem]}.weight": tensor}
    if stem.endswith("gate_up_proj"):
        home = stem.removesuffix("gate_up_proj").replace("ffn.shared.", "mlp.shared_experts.").replace("ffn.", "mlp.")
        gate, up = tensor.chunk(2)
        return {f"{home}gate_proj.weight": gate, f"{home}up_proj.weight": up}
    whole = {
        "ffn.router": "mlp.gate.weight",
        "ffn.router.bias_E": "mlp.gate.e_score_correction_bias",
        "ffn.gate_up_EHD": "mlp.experts.gate_up_proj",
        "ffn.down_EDI": "mlp.experts.down_proj",
        "ffn.shared.down_proj": "mlp.shared_experts.down_proj.weight",
        "ffn.down_proj": "mlp.down_proj.weight",
    }
    if stem in whole:
        return {whole[stem]: tensor}
    return {name.replace("attention.", "self_attn."): tensor}


@torch.no_grad()
def randomise(model: Transformer, seed: int = 0, std: float = 0.08) -> Transformer:
    """Give every tensor, norms and balancing biases too, random values, so that none of them can be ignored unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        is_norm = tensor.dim() == 1 and not name.endswith("bias_E")
        tensor.copy_(1 + 0.2 * drawn if is_norm else std * drawn)
    return model
