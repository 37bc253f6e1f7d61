"""The ledger is what the allocator says: the same step really run, its memory events read from torch's profiler."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card
from torch.profiler import ProfilerActivity, profile

from lowvram.config import ModelConfig, TrainConfig
from lowvram.fit.rehearse import rehearse
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES, Batch, causal_loss
from lowvram.plan import Plan
from lowvram.train.optim import build_optimizer
from lowvram.train.step import gradients, update

CPU = Card("cpu")
# What a ledger may differ from the allocator's own events: scratch that kernels take inside one op.
RELATIVE = 0.01

ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa-rope": {"attention": {"kind": "gqa", "heads": 6, "kv_heads": 2, "head_dim": 32}},
    "gqa-alibi": {
        "attention": {"kind": "gqa", "heads": 6, "kv_heads": 2, "head_dim": 32},
        "positions": {"kind": "alibi"},
    },
    "mla-rope": {
        "attention": {"kind": "mla", "heads": 4, "kv_lora_rank": 96, "nope_dim": 32, "rope_dim": 16, "value_dim": 40}
    },
}
FFNS: dict[str, dict[str, Any]] = {
    "swiglu": {"kind": "swiglu", "hidden": 520},
    "moe": {
        "kind": "moe",
        "hidden": 520,
        "dense_layers": 1,
        "experts": 4,
        "top_k": 2,
        "shared": 1,
        "expert_hidden": 256,
    },
}
SEQ_LEN, MICRO_BATCH = 200, 3


def model_of(attention: str, ffn: str) -> ModelConfig:
    shape = {"layers": 3, "dim": 200, "vocabulary": 2_000}
    return ModelConfig.model_validate({**shape, **ATTENTIONS[attention], "ffn": FFNS[ffn]})


def train_of(accumulate: int, bits: int = 32, **more: Any) -> TrainConfig:
    batch_tokens = SEQ_LEN * MICRO_BATCH * accumulate
    given = {"tokens": batch_tokens, "seq_len": SEQ_LEN, "batch_tokens": batch_tokens, "optimizer": {"bits": bits}}
    return TrainConfig.model_validate({**given, "precision": "fp32", **more})


def batches(plan: Plan, vocabulary: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(
            torch.randint(0, vocabulary, (plan.micro_batch, SEQ_LEN + 1), generator=generator), torch.arange(i, i + 3)
        )
        for i in range(plan.accumulate)
    ]


def real_steps(model: ModelConfig, train: TrainConfig, plan: Plan, steps: int = 2) -> None:
    """Two steps of the trainer on real tensors: the second has the optimizer's states from the beginning."""
    network = Transformer(model, None)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, 0.0, 0.02)
    optimizer = build_optimizer(network, train.optimizer)
    options = {"dtype": DTYPES[train.precision], "dropout": train.dropout, "recompute": plan.recompute}
    loss_of = functools.partial(causal_loss, network, **options)
    for _ in range(steps):
        found = gradients(network, loss_of, batches(plan, model.vocabulary), train.batch_tokens)
        update(network, optimizer, found.loads, 1e-3, 0.5)
        del found


def allocator_peak(model: ModelConfig, train: TrainConfig, plan: Plan) -> int:
    """Return the most bytes that torch's CPU allocator had given out at once during real steps, by its own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        real_steps(model, train, plan)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert len(events) > 1_000, "the profiler has seen the step"
    return peak


@pytest.mark.parametrize("accumulate", [1, 4], ids=lambda n: f"accumulate-{n}")
@pytest.mark.parametrize("bits", [32, 8], ids=lambda n: f"{n}-bit")
@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_ledger_is_what_the_allocator_gave_out(
    attention: str, ffn: str, recompute: Any, bits: int, accumulate: int
) -> None:
    model, train = model_of(attention, ffn), train_of(accumulate, bits)
    plan = Plan(micro_batch=MICRO_BATCH, accumulate=accumulate, recompute=recompute)
    ledger = rehearse(model, train, plan, CPU).ledger
    print("RATIO", ledger.peak_bytes / allocator_peak(model, train, plan))
    assert ledger.peak_bytes == pytest.approx(allocator_peak(model, train, plan), rel=RELATIVE)
