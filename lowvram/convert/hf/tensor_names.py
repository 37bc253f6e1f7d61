"""What each of our tensors is called in transformers' files, and how it is cut there; knows no file and no number.

One of our tensors is its pieces one after the other in memory: gate above up, expert after expert.  Their names and
order are those of the DeepSeek-V3 and Llama architectures (transformers, models/deepseek_v3 and models/llama).

Legend: E experts, D model width, I hidden width, P pieces of R rows and C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lowvram_kernels.quant.quantise import BLOCK, QuantTensor
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.model.transformer import Transformer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WHOLE = {"embedding": EMBEDDING, "head": HEAD, "norm.weight": "model.norm.weight"}
_IN_LAYER = {
    "attention.norm.weight": "input_layernorm.weight",
    "attention.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.kv_a_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "ffn.norm.weight": "post_attention_layernorm.weight",
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.router.bias_E": "mlp.gate.e_score_correction_bias",
    "ffn.down_proj.weight": "mlp.down_proj.weight",
    "ffn.shared.down_proj.weight": "mlp.shared_experts.down_proj.weight",
}
_HALVES = {
    "ffn.gate_up_proj.weight": "mlp.{}.weight",
    "ffn.shared.gate_up_proj.weight": "mlp.shared_experts.{}.weight",
}


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a model, by our names; no memory is taken."""
    return {name: tensor.shape for name, tensor in Transformer(config, None, "meta").state_dict().items()}


def name_pieces(name: str, config: ModelConfig) -> list[str]:
    """Return transformers' names of the pieces of our tensor `name`, in order."""
    if name in _WHOLE:
        return [_WHOLE[name]]
    number, inner = name.removeprefix("blocks.").split(".", 1)
    return [f"model.layers.{number}.{piece}" for piece in _pieces_in_layer(inner, config)]


def _pieces_in_layer(name: str, config: ModelConfig) -> list[str]:
    if name in _IN_LAYER:
        return [_IN_LAYER[name]]
    if name in _HALVES:
        return [_HALVES[name].format(half) for half in ("gate_proj", "up_proj")]
    if name in ("ffn.gate_up_EHD", "ffn.down_EDI"):
        assert config.ffn.kind == "moe", "only a mixture has experts"
        parts = ("gate_proj", "up_proj") if name == "ffn.gate_up_EHD" else ("down_proj",)
        return [f"mlp.experts.{expert}.{part}.weight" for expert in range(config.ffn.experts) for part in parts]
    return [name.replace("attention.", "self_attn.")]


def cut(tensor: Tensor, count: int) -> list[Tensor]:
    """Return a tensor's pieces as contiguous views of it: [D], [P·R, C] or [E, P·R / E, C]."""
    whole = tensor.contiguous()
    return [whole] if count == 1 else list(whole.view(count, -1, whole.shape[-1]).unbind(0))


def join(pieces: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Return one of our tensors, of this shape, from its pieces."""
    return (pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))).reshape(tuple(shape))


def join_scaled(pieces: Sequence[QuantTensor], shape: Sequence[int]) -> QuantTensor | None:
    """Return the codes and scales of one of our tensors, or None where blocks of it would straddle two pieces."""
    rows = pieces[0].code.shape[0]
    if rows % BLOCK and len(pieces) > (shape[0] if len(shape) == 3 else 1):
        return None
    scale = torch.cat([piece.scale for piece in pieces])
    grid = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    return QuantTensor(join([piece.code for piece in pieces], shape), scale.reshape(grid))
