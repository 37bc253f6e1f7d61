"""A run so small that six steps take a second: text, tokenizer, shards and configuration in one directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowvram.config.plan import choose_plan
from lowvram.config.run import RunConfig
from lowvram.data.shards import pack
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.train.prepare import prepare
from lowvram.train.rotation import ExpertRotation
from lowvram.train.trainer import Trainer
from tests.conftest import TURKISH

KINDS: dict[str, dict[str, Any]] = {
    "gqa-rope": {
        "attention": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
        "ffn": {"kind": "swiglu", "hidden": 64},
    },
    "gqa-alibi": {
        "attention": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
        "positions": {"kind": "alibi"},
        "ffn": {"kind": "swiglu", "hidden": 64},
    },
    "mla-moe": {
        "attention": {"kind": "mla", "heads": 2, "kv_lora_rank": 16, "nope_dim": 8, "rope_dim": 8, "value_dim": 16},
        "ffn": {
            "kind": "moe",
            "hidden": 64,
            "dense_layers": 1,
            "experts": 4,
            "top_k": 2,
            "shared": 1,
            "expert_hidden": 32,
        },
    },
}


def write_texts(home: Path) -> None:
    """Write `train.txt` and `valid.txt`: the test sentences in many orders, so that windows differ."""
    texts = [f"{TURKISH[i % 16]} {TURKISH[(i * 7 + 3) % 16]} {i}" for i in range(96)]
    (home / "train.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (home / "valid.txt").write_text("\n\n".join(TURKISH[::-1]), encoding="utf-8")


def prepare_home(home: Path) -> Tokenizer:
    """Fill a directory with text, a tokenizer and shards."""
    write_texts(home)
    tokenizer = train_tokenizer(iter(TURKISH), 400, home / "tok")
    for name in ("train", "valid"):
        pack([home / f"{name}.txt"], tokenizer, home / "shards" / name, processes=1)
    return tokenizer


def tiny_run(
    home: Path, kind: str = "gqa-rope", run: str = "run", vocabulary: int = 400, experts: int = 0, **train: Any
) -> RunConfig:
    """Return the configuration of a six-step run in a prepared home.

    experts: another number of them, each large enough for states in 8 bits.
    """
    settings = {"tokens": 6 * 256, "seq_len": 32, "batch_tokens": 256, "precision": "fp32"} | train
    ffn = {"ffn": KINDS[kind]["ffn"] | ({"experts": experts, "expert_hidden": 128} if experts else {})}
    options = {"dir": home / run, "validate_every": 4, "sample_every": 100, "sample_tokens": 5, "prompts": ("Kış",)}
    return RunConfig.model_validate(
        {
            "model": {"layers": 2, "dim": 32, "vocabulary": vocabulary, **KINDS[kind], **ffn},
            "data": {"train": home / "shards/train", "valid": home / "shards/valid", "tokenizer": home / "tok"},
            "train": settings,
            "run": options,
        }
    )


def trainer_of(what: RunConfig, micro_batch: int | None = None) -> Trainer:
    """Return a trainer on the CPU, with the plan that is chosen, or with so many sequences at a time."""
    return prepare(what, choose_plan(what.train, micro_batch)[0], torch.device("cpu"))


def tensors_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return copies of all weights and states, by name."""
    weights, memory = trainer.state.tensors()
    return {name: tensor.clone() for name, tensor in (weights | memory).items()}


def unequal(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that differ in a bit; both have the same names."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def rotation_of(trainer: Trainer) -> ExpertRotation:
    """Return a trainer's rotation, which it has."""
    assert trainer.state.rotation is not None
    return trainer.state.rotation
