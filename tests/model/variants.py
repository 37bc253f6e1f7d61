"""Small models of every kind that the configuration can describe, for tests that must hold for all of them."""

from __future__ import annotations

from typing import Any

from lowvram.config.architecture import Alibi, Gqa, Mla, Moe, Rope, SwiGlu, Window, Yarn
from lowvram.config.model import ModelConfig

VOCABULARY = 67

_GQA = Gqa(heads=6, kv_heads=2, head_dim=8)
_MLA = Mla(heads=3, kv_lora_rank=20, nope_dim=12, rope_dim=8, value_dim=10)
_DENSE = SwiGlu(hidden=52)
_MOE = Moe(hidden=52, dense_layers=1, experts=5, top_k=2, shared=1, expert_hidden=20)
_YARN = Rope(yarn=Yarn(factor=4.0, original_len=16))
_WINDOW = Window(size=7, pattern="SF")


def _config(**fields: Any) -> ModelConfig:
    return ModelConfig(**({"layers": 2, "dim": 36, "vocabulary": VOCABULARY, "ffn": _DENSE} | fields))


VARIANTS: dict[str, ModelConfig] = {
    "gqa-rope": _config(attention=_GQA),
    "gqa-rope-yarn": _config(attention=_GQA, positions=_YARN),
    "gqa-qk_norm": _config(attention=_GQA.model_copy(update={"qk_norm": True})),
    "gqa-alibi": _config(attention=_GQA, positions=Alibi()),
    "gqa-window": _config(attention=_GQA, window=_WINDOW),
    "gqa-alibi-window": _config(attention=_GQA, positions=Alibi(), window=_WINDOW),
    "gqa-moe-untied": _config(attention=_GQA, ffn=_MOE, tied=False),
    "mla-rope": _config(attention=_MLA),
    "mla-yarn-q_lora": _config(attention=_MLA.model_copy(update={"q_lora_rank": 14}), positions=_YARN),
    "mla-window": _config(attention=_MLA, window=_WINDOW),
    "mla-moe": _config(attention=_MLA, ffn=_MOE),
}
