"""On a real card: the ledger beside the allocator's own peak, and plans that must hold inside 8 and 12 GB."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.run_file import load_preset, preset_names
from lowvram.config.train import TrainConfig
from lowvram.fit.memory_curve import MemoryCurve
from lowvram.fit.rehearse import rehearse
from lowvram.fit.search import search
from lowvram.fit.throughput import step_seconds
from lowvram.hardware.profile import Profile, generic_profile
from lowvram.objective import Batch, count_targets
from lowvram.train.state import build_state
from lowvram.train.step import gradients, loss_for, update
from tests.kernels.measures import take_workspaces

pytestmark = pytest.mark.gpu
RELATIVE = 0.03
STEPS = 20
GIB = 2**30


@pytest.fixture(autouse=True)
def clean_card() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def run_steps(model: ModelConfig, train: TrainConfig, plan: Plan, steps: int) -> int:
    """Train on random tokens, at most two micro-batches a step, and return the peak of its tensors in bytes."""
    held_bytes = take_workspaces()
    state = build_state(model, train, plan, torch.device("cuda"), 0)
    network, optimizer, loss_of = state.model, state.optimizer, loss_for(state.model, train, plan)
    torch.cuda.reset_peak_memory_stats()
    for step in range(steps):
        if state.rotation is not None:
            state.rotation.rotate_to(state.rotation.interval_of(step))
        shape = (plan.micro_batch, train.seq_len + 1)
        batches = [
            Batch(
                torch.randint(0, model.vocabulary, shape, device="cuda"), torch.arange(plan.micro_batch, device="cuda")
            )
            for _ in range(min(plan.accumulate, 2))
        ]
        found = gradients(network, loss_of, batches, sum(map(count_targets, batches)))
        update(network, optimizer, found.loads, 1e-4, 1.0)
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - held_bytes


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
@pytest.mark.parametrize("name", ["tr-25m", "tiny-llm-v1", "tr-130m-moe", "ismail-512", "tr-350m"])
def test_the_ledger_is_what_the_card_gave_out(name: str, recompute: str) -> None:
    from lowvram_kernels.dispatch import card_of

    model, train = load_preset(name)
    samples = max(2, 8_192 // train.seq_len)
    train = train.model_copy(update={"batch_tokens": samples * train.seq_len})
    for accumulate in (1, 2):
        plan = Plan(micro_batch=samples // accumulate, accumulate=accumulate, recompute=recompute)
        ledger = rehearse(model, train, plan, card_of(torch.device("cuda"))).ledger
        assert run_steps(model, train, plan, steps=3) == pytest.approx(ledger.peak_bytes, rel=RELATIVE)
        gc.collect()
        torch.cuda.empty_cache()


def cap(profile: Profile) -> None:
    """Leave torch what such a card would leave it, fragmentation included."""
    room = profile.memory_bytes - profile.reserved_bytes - profile.context_bytes
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)


@pytest.mark.parametrize("gigabytes", [8, 12])
@pytest.mark.parametrize("name", preset_names())
def test_a_plan_that_fits_trains_inside_that_memory(name: str, gigabytes: int) -> None:
    from lowvram_kernels.dispatch import card_of

    model, train = load_preset(name)
    profile = generic_profile(gigabytes * GIB)
    card = card_of(torch.device("cuda"))
    sketch = MemoryCurve(train.micro_batches, lambda plan: rehearse(model, train, plan, card), train.seq_len)
    found = search(sketch, profile.limit_bytes(), lambda r, plan: step_seconds(r, plan, train, profile), exact=True)
    if not found.fits:
        pytest.skip(f"{name} does not fit {gigabytes} GB, as fit says")
    cap(profile)
    assert run_steps(model, train, found.plan, STEPS) <= profile.limit_bytes() * 1.03
