"""Small models of every kind that GGUF can hold, and weights in memory as the writer wants them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowvram_kernels.quant.quantise import QuantTensor
from torch import Tensor

from lowvram.config.architecture import Alibi, Gqa, Mla, Moe, Rope, SwiGlu, Yarn
from lowvram.config.model import ModelConfig
from lowvram.model.transformer import Transformer
from tests.model.outside import randomise

VOCABULARY = 400

# Few of these numbers are powers of two, and no two that could be confused are equal.
_GQA = Gqa(heads=6, kv_heads=2, head_dim=24)
_MLA = Mla(heads=3, kv_lora_rank=40, nope_dim=24, rope_dim=16, value_dim=20)
_Q_LORA = _MLA.model_copy(update={"q_lora_rank": 36})
_DENSE = SwiGlu(hidden=172)
_MOE = Moe(hidden=172, dense_layers=1, experts=5, top_k=2, shared=2, expert_hidden=44, route_scale=1.5)
_YARN = Rope(theta=20_000.0, yarn=Yarn(factor=8.0, original_len=32))
_SHARP = Rope(yarn=Yarn(factor=8.0, original_len=32, mscale=0.707))


def small(**fields: Any) -> ModelConfig:
    """Return a model of three layers with the fields given."""
    return ModelConfig(**({"layers": 3, "dim": 108, "vocabulary": VOCABULARY, "ffn": _DENSE} | fields))


FORMS: dict[str, tuple[str, ModelConfig]] = {
    "llama": ("llama", small(attention=_GQA)),
    "llama-untied": ("llama", small(attention=_GQA, tied=False)),
    "llama-yarn": ("llama", small(attention=_GQA, positions=_YARN)),
    "llama-yarn-mscale": ("llama", small(attention=_GQA, positions=_SHARP)),
    "qwen3": ("qwen3", small(attention=_GQA.model_copy(update={"qk_norm": True}), positions=Rope(theta=5e5))),
    "qwen3-yarn": ("qwen3", small(attention=_GQA.model_copy(update={"qk_norm": True}), positions=_YARN)),
    "deepseek-dense": ("deepseek2", small(attention=_MLA)),
    "deepseek-dense-q_lora-yarn": ("deepseek2", small(attention=_Q_LORA, positions=_YARN)),
    "deepseek-moe": ("deepseek2", small(attention=_MLA, ffn=_MOE)),
    "deepseek-moe-untied": ("deepseek2", small(attention=_MLA, ffn=_MOE, tied=False)),
    "deepseek-moe-yarn": ("deepseek2", small(attention=_MLA, ffn=_MOE, positions=_YARN)),
    "deepseek-moe-q_lora": ("deepseek2", small(attention=_Q_LORA, ffn=_MOE)),
    "deepseek-moe-q_lora-yarn-mscale": ("deepseek2", small(attention=_Q_LORA, ffn=_MOE, positions=_SHARP)),
    "deepseek-moe-27-layers": ("deepseek2", small(layers=27, attention=_MLA, ffn=_MOE)),
    "refact": ("refact", small(attention=Gqa(heads=8, kv_heads=2, head_dim=16), positions=Alibi())),
    "refact-6-heads": ("refact", small(attention=_GQA, positions=Alibi(), tied=False)),
}


@dataclass
class Held:
    """Weights in memory: a `WeightReader`."""

    config: ModelConfig
    weights: dict[str, Tensor | QuantTensor]

    def names(self) -> list[str]:
        return list(self.weights)

    def read(self, name: str) -> Tensor | QuantTensor:
        return self.weights[name]


def hold(config: ModelConfig, seed: int = 0) -> tuple[Transformer, Held]:
    """Return a model whose every tensor is random, and its weights as a source."""
    model = randomise(Transformer(config, seed=None), seed)
    return model, Held(config, dict(model.state_dict()))
