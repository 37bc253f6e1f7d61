"""How llama.cpp sees a model: its architecture, its numbers, its tensors' names and layouts; knows no file.

Read in llama.cpp's src/llama-arch.cpp, src/llama-context.cpp and src/models/ as llama-cpp-python 0.3.36 ships them;
tests/convert/test_llama_cpp.py holds all of it against that program.

Legend: D model width, H heads, K width of a query and key, N of its part without position, V of a value,
C kv_lora_rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lowvram.config.architecture import Mla, Yarn
from lowvram.config.model import ModelConfig
from lowvram.errors import ExportError

Value = int | float | bool | str

# llama.cpp reads other values for a few architectures only, of which none is ours (src/models/grok.cpp, mistral3.cpp).
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
# deepseek2 takes models of these layers for ones without q_lora, whatever the file says (src/models/deepseek2.cpp).
_LITE_LAYERS = (26, 27)
_LITE_LAYERS_AND_VOCABULARY = (48, 128_256)
_SIGMOID = 2  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID


class TensorLayout(NamedTuple):
    """A tensor of llama.cpp's: its name, how it is cut out of one of ours, and whether it is fp32 in every file."""

    name: str
    take: Callable[[Tensor], Tensor]
    is_exact: bool = False


def architecture_of(config: ModelConfig) -> str:
    """Return llama.cpp's name for a model of this form; raises ExportError where it has none that computes the same."""
    if config.attention.kind == "mla":
        name = "deepseek2"
    elif config.positions.kind == "alibi":
        name = "refact"
    else:
        name = "qwen3" if config.attention.qk_norm else "llama"
    _refuse_other_attention(config, name)
    _refuse_other_layers(config, name)
    return name


def _refuse_other_attention(config: ModelConfig, name: str) -> None:
    attention, positions = config.attention, config.positions
    windows = [window for layer in range(config.layers) if (window := config.window_of(layer)) is not None]
    if windows:
        raise ExportError(
            f"model.window lets {len(windows)} layers see only their last {windows[0]} tokens.",
            f"llama.cpp's architecture {name}, which the model has otherwise, has no sliding window.",
            "Train a further stage without model.window (train.start_from allows that), and export it.",
        )
    if attention.kind == "gqa" and attention.qk_norm and positions.kind == "alibi":
        raise ExportError(
            'attention.qk_norm is true and positions.kind is "alibi".',
            "llama.cpp has norms of queries and keys only together with RoPE (architecture qwen3).",
            "Such a model stays with `lowvram chat`; for GGUF train one with either of the two.",
        )
    yarn = positions.yarn if positions.kind == "rope" else None
    if yarn is not None and (yarn.beta_fast, yarn.beta_slow) != (_BETA_FAST, _BETA_SLOW):
        raise ExportError(
            f"positions.yarn has beta_fast {yarn.beta_fast:g} and beta_slow {yarn.beta_slow:g}.",
            f"llama.cpp's architecture {name} always takes {_BETA_FAST:g} and {_BETA_SLOW:g}.",
            "Train a further stage with those two (train.start_from allows that), and export it.",
        )


def _refuse_other_layers(config: ModelConfig, name: str) -> None:
    attention = config.attention
    if config.ffn.kind == "moe" and attention.kind == "gqa":
        raise ExportError(
            'ffn.kind is "moe" and attention.kind is "gqa".',
            "Experts that are chosen by sigmoid with a bias go into llama.cpp's deepseek2, whose attention is MLA.",
            'Such a model stays with `lowvram chat`; for GGUF train one with attention.kind = "mla".',
        )
    is_lite = config.layers in _LITE_LAYERS or (config.layers, config.vocabulary) == _LITE_LAYERS_AND_VOCABULARY
    if attention.kind == "mla" and attention.q_lora_rank is not None and is_lite:
        raise ExportError(
            f"attention.q_lora_rank is {attention.q_lora_rank} in a model of {config.layers} layers.",
            f"llama.cpp's {name} takes every model of so many layers for one without q_lora, and does not load it.",
            "Train one of another number of layers, or without attention.q_lora_rank.",
        )


def keys_of(config: ModelConfig, context_len: int) -> dict[str, Value]:
    """Return the numbers that llama.cpp builds the model from, under its keys; context_len: tokens trained on."""
    keys: dict[str, Value] = {
        "vocab_size": config.vocabulary,
        "context_length": context_len,
        "embedding_length": config.dim,
        "block_count": config.layers,
        "feed_forward_length": config.ffn.hidden,
        "attention.head_count": config.attention.heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        **(_mla_keys(config, config.attention) if config.attention.kind == "mla" else {}),
    }
    if config.attention.kind == "gqa":
        keys["attention.head_count_kv"] = config.attention.kv_heads
        keys["attention.key_length"] = keys["attention.value_length"] = config.attention.head_dim
    if config.positions.kind == "rope":
        keys["rope.freq_base"] = config.positions.theta
        keys["rope.dimension_count"] = config.attention.rope_dim
        if config.positions.yarn is not None:
            keys |= _yarn_keys(config.positions.yarn, config.attention.kind == "mla")
    architecture = architecture_of(config)
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _mla_keys(config: ModelConfig, attention: Mla) -> dict[str, Value]:
    """Attention runs over the latent, so there is one key of C + rope, and the latent is the value."""
    keys: dict[str, Value] = {
        "attention.head_count_kv": 1,
        "attention.key_length": attention.kv_lora_rank + attention.rope_dim,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.query_dim,
        "attention.value_length_mla": attention.value_dim,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.q_lora_rank": attention.q_lora_rank or 0,
    }
    ffn = config.ffn
    if ffn.kind == "swiglu":
        # Asked for by name even where every layer is dense.
        no_experts = {"leading_dense_block_count": config.layers, "expert_feed_forward_length": 0}
        return keys | no_experts | {"expert_shared_count": 0}
    return keys | {
        "leading_dense_block_count": ffn.dense_layers,
        "expert_feed_forward_length": ffn.expert_hidden,
        "expert_count": ffn.experts,
        "expert_used_count": ffn.top_k,
        "expert_shared_count": ffn.shared,
        "expert_weights_scale": ffn.route_scale,
        "expert_weights_norm": True,
        "expert_gating_func": _SIGMOID,
    }


def _yarn_keys(yarn: Yarn, is_mla: bool) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_len,
        "rope.scaling.yarn_beta_fast": yarn.beta_fast,
        "rope.scaling.yarn_beta_slow": yarn.beta_slow,
    }
    if is_mla:
        # Acts in the softmax's scale: (1 + this · ln factor)².
        return keys | {"rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale}
    # Queries and keys are scaled by 1 + 0.1 · ln factor, times this.
    return keys | {"rope.scaling.attn_factor": yarn.magnitude / (0.1 * math.log(yarn.factor) + 1.0)}


_OUTSIDE_LAYERS = {"embedding": "token_embd.weight", "head": "output.weight", "norm.weight": "output_norm.weight"}
_WHOLE = {
    "attention.norm.weight": "attn_norm.weight",
    "attention.q_proj.weight": "attn_q.weight",
    "attention.k_proj.weight": "attn_k.weight",
    "attention.v_proj.weight": "attn_v.weight",
    "attention.o_proj.weight": "attn_output.weight",
    "attention.q_norm.weight": "attn_q_norm.weight",
    "attention.k_norm.weight": "attn_k_norm.weight",
    "attention.q_a_proj.weight": "attn_q_a.weight",
    "attention.q_a_norm.weight": "attn_q_a_norm.weight",
    "attention.q_b_proj.weight": "attn_q_b.weight",
    "attention.kv_a_proj.weight": "attn_kv_a_mqa.weight",
    "attention.kv_a_norm.weight": "attn_kv_a_norm.weight",
    "ffn.norm.weight": "ffn_norm.weight",
    "ffn.down_proj.weight": "ffn_down.weight",
    "ffn.down_EDI": "ffn_down_exps.weight",
    "ffn.shared.down_proj.weight": "ffn_down_shexp.weight",
    "ffn.router.weight": "ffn_gate_inp.weight",
    "ffn.router.bias_E": "exp_probs_b.bias",
}
_GATE_AND_UP = {
    "ffn.gate_up_proj.weight": ("ffn_gate.weight", "ffn_up.weight"),
    "ffn.gate_up_EHD": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "ffn.shared.gate_up_proj.weight": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
}


def layouts_of(config: ModelConfig, name: str) -> list[TensorLayout]:
    """Return the tensors of llama.cpp's that our tensor `name` becomes."""
    if name in _OUTSIDE_LAYERS:
        return [TensorLayout(_OUTSIDE_LAYERS[name], _whole)]
    _, layer, rest = name.split(".", 2)
    return [cut._replace(name=f"blk.{layer}.{cut.name}") for cut in _cuts_in_layer(config, rest)]


def _cuts_in_layer(config: ModelConfig, rest: str) -> list[TensorLayout]:
    if rest in _GATE_AND_UP:
        return [TensorLayout(name, partial(_half, number=number)) for number, name in enumerate(_GATE_AND_UP[rest])]
    attention = config.attention
    if attention.kind == "mla" and rest == "attention.kv_b_proj.weight":
        cut = partial(_up, attention=attention)
        return [
            TensorLayout("attn_k_b.weight", partial(cut, of_keys=True)),
            TensorLayout("attn_v_b.weight", partial(cut, of_keys=False)),
        ]
    is_rotated = rest in ("attention.q_proj.weight", "attention.k_proj.weight")
    if attention.kind == "gqa" and is_rotated and architecture_of(config) == "llama":
        return [TensorLayout(_WHOLE[rest], partial(_as_neighbours, head_dim=attention.head_dim))]
    return [TensorLayout(_WHOLE[rest], _whole, is_exact=rest.startswith("ffn.router."))]


def _whole(tensor: Tensor) -> Tensor:
    return tensor


def _half(tensor: Tensor, number: int) -> Tensor:
    return tensor.chunk(2, dim=-2)[number]


def _up(weight: Tensor, attention: Mla, of_keys: bool) -> Tensor:
    """Return W_uk as [H, C, N], turned for the query that it is absorbed into, or W_uv as [H, V, C]."""
    both = weight.reshape(attention.heads, attention.nope_dim + attention.value_dim, attention.kv_lora_rank)
    k_HNC, v_HVC = both[:, : attention.nope_dim], both[:, attention.nope_dim :]
    return k_HNC.transpose(1, 2) if of_keys else v_HVC


def _as_neighbours(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's rows: `llama` turns neighbours (2i, 2i + 1) where we turn (i, i + K/2)."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).flatten(0, 2)
