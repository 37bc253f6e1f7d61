"""What a card of 8 or 12 GB is promised to hold: the jobs and the largest models of the README, rehearsed."""

from __future__ import annotations

from typing import Any

import pytest

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Ledger, Plan
from lowvram.config.run_file import load_preset
from lowvram.config.train import TrainConfig
from lowvram.fit.rehearse import imagine, rehearse
from lowvram.hardware.profile import load_profile

SMALL, MIDDLE = load_profile("rtx5060"), load_profile("rtx5070")  # 8 and 12 GB
GIB = 2**30
CONTEXT = 2_048
ADAMW, MUON = {"name": "adamw", "bits": 8}, {"name": "muon", "bits": 8}


def dense(layers: int, dim: int, hidden: int, heads: int, kv_heads: int) -> ModelConfig:
    attention = {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": 128, "qk_norm": True}
    shape = {"layers": layers, "dim": dim, "vocabulary": 32_768}
    return ModelConfig.model_validate(shape | {"attention": attention, "ffn": {"kind": "swiglu", "hidden": hidden}})


def smallest(model: ModelConfig, accumulate: int = 32, **said: Any) -> Ledger:
    """Rehearse one sequence of 2,048 tokens at a time, every block recomputed."""
    recipe = {"tokens": "1B", "seq_len": CONTEXT, "batch_tokens": CONTEXT * accumulate, "weights": "bf16"}
    train = TrainConfig.model_validate(recipe | said)
    return rehearse(model, train, Plan(micro_batch=1, accumulate=accumulate, recompute="block"), imagine(SMALL)).ledger


@pytest.mark.nightly
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize(
    "model, least, card, during",
    [
        pytest.param(dense(22, 2048, 5632, 16, 4), 1.05e9, SMALL, False, id="1.05B-on-8GB"),
        pytest.param(dense(30, 2304, 6144, 18, 2), 1.7e9, MIDDLE, False, id="1.7B-on-12GB"),
        pytest.param(dense(32, 2048, 5632, 16, 4), 1.5e9, SMALL, True, id="1.5B-on-8GB-during-backward"),
        pytest.param(dense(34, 2560, 6912, 20, 4), 2.4e9, MIDDLE, True, id="2.4B-on-12GB-during-backward"),
    ],
)
def test_the_largest_dense_models_fit(
    model: ModelConfig, least: float, card: Any, during: bool, optimizer: Any
) -> None:
    assert model.num_parameters() >= least
    ledger = smallest(model, 1 if during else 32, optimizer=optimizer, update_during_backward=during)
    assert ledger.peak_bytes <= card.limit_bytes()
    assert ledger.kept_on_host == 0


@pytest.mark.nightly
@pytest.mark.parametrize(
    "preset, least, card, ram_bytes",
    [("tr-1b", 1.05e9, SMALL, 4 * GIB), ("tr-2b-moe", 2e9, SMALL, 8 * GIB), ("tr-4b-moe", 4e9, MIDDLE, 16 * GIB)],
)
def test_the_largest_presets_fit_card_and_computer(preset: str, least: float, card: Any, ram_bytes: int) -> None:
    model, train = load_preset(preset)
    assert model.num_parameters() >= least
    assert train.seq_len >= CONTEXT
    plan = Plan(micro_batch=1, accumulate=train.batch_samples, recompute="block")
    ledger = rehearse(model, train, plan, imagine(card)).ledger
    assert ledger.peak_bytes <= card.limit_bytes()
    assert ledger.host_bytes + card.host_process_bytes <= ram_bytes
    assert (ledger.kept_on_host > 0) == (train.rotation is not None)


def job(preset: str, seq_len: int, micro_batch: int, accumulate: int = 1, **said: Any) -> float:
    """Return the gigabytes of tensors of one of the README's jobs."""
    model, _ = load_preset(preset)
    recipe = {"tokens": "1B", "seq_len": seq_len, "batch_tokens": seq_len * micro_batch * accumulate}
    train = TrainConfig.model_validate(recipe | {"weights": "bf16", "optimizer": MUON} | said)
    plan = Plan(micro_batch=micro_batch, accumulate=accumulate, recompute="block")
    return rehearse(model, train, plan, imagine(SMALL)).ledger.peak_bytes / 1e9


def test_ismail_512_with_16_sequences_of_512_takes_1_2_gigabytes() -> None:
    assert job("ismail-512", 512, 16) <= 1.2
    assert job("ismail-512", 512, 16, optimizer=ADAMW, update_during_backward=True) <= 1.2


@pytest.mark.nightly
def test_ismail_1024_with_4_sequences_of_2048_takes_3_6_gigabytes_during_backward_and_4_5_with_accumulation() -> None:
    during = job("ismail-1024", 2_048, 4, optimizer=ADAMW, update_during_backward=True)
    accumulated = job("ismail-1024", 2_048, 4, 2, optimizer=ADAMW)
    rotating = {"window": 2, "interval": 80, "idle": "int8"}
    turning = job("ismail-1024", 2_048, 4, 2, optimizer=ADAMW, rotation=rotating)
    assert during <= 3.6
    assert turning < accumulated <= 4.5
