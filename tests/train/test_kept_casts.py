"""Kept casts give the bits of casts at use, and only where they are in use and fresh."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from lowvram_kernels.matmul import fp32_sums
from lowvram_kernels.matmul.kept_casts import KeptCasts, cast, kept

from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.objective import Batch, count_targets
from lowvram.train import compilation
from lowvram.train.compilation import compiled
from lowvram.train.state import TrainState, build_state
from lowvram.train.step import gradients, loss_for, update
from tests.kernels.measures import relative_error
from tests.model.variants import VARIANTS


def test_a_copy_is_read_where_it_is_in_use_and_of_the_dtype() -> None:
    weight, other, low = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4).bfloat16()
    casts = KeptCasts([weight, low], torch.bfloat16)
    casts.refresh()
    assert kept(weight, torch.bfloat16) is None
    with casts.in_use():
        copy = cast(weight, torch.bfloat16)
        assert copy is cast(weight, torch.bfloat16)
        assert torch.equal(copy, weight.bfloat16())
        assert kept(weight, torch.float16) is None
        assert kept(other, torch.bfloat16) is None
        assert cast(low, torch.bfloat16) is low
        weight += 1.0
        assert not torch.equal(cast(weight, torch.bfloat16), weight.bfloat16()), "nobody has copied it again"
        casts.refresh()
        assert torch.equal(cast(weight, torch.bfloat16), weight.bfloat16())
        assert cast(weight, torch.bfloat16) is copy
    assert kept(weight, torch.bfloat16) is None


def learn(name: str, precision: str, keep_casts: bool) -> TrainState:
    """Make three steps of two micro-batches."""
    given = {"tokens": 4 * 16 * 3, "seq_len": 16, "batch_tokens": 64, "precision": precision}
    train = TrainConfig.model_validate(given)
    plan = Plan(micro_batch=2, accumulate=2, keep_casts=keep_casts)
    state = build_state(VARIANTS[name], train, plan, torch.device("cpu"), 1)
    generator = torch.Generator().manual_seed(3)
    for step in range(3):
        token_BT = torch.randint(0, VARIANTS[name].vocabulary, (4, 17), generator=generator)
        batches = [Batch(token_BT[i : i + 2], torch.arange(i, i + 2)) for i in (0, 2)]
        targets = sum(count_targets(batch) for batch in batches)
        gradients(state.model, loss_for(state.model, train, plan), batches, targets, seed=step)
        update(state.model, state.optimizer, None, 1e-2, 1.0)
    return state


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["gqa-qk_norm", "gqa-moe-untied", "mla-moe"])
def test_a_run_that_keeps_casts_learns_the_same_to_the_bit(name: str, precision: str) -> None:
    own, plain = (learn(name, precision, keep_casts) for keep_casts in (True, False))
    assert own.model.kept_casts is not None
    assert plain.model.kept_casts is None
    for key, tensor in own.model.state_dict().items():
        other = plain.model.state_dict()[key]
        if name == "gqa-qk_norm" and precision == "bf16":  # whose three projections are one product
            assert relative_error(tensor, other) < 2e-3, key
        else:
            assert torch.equal(tensor, other), key
    assert own.model.state_dict().keys() == plain.model.state_dict().keys(), "copies are not saved"


@pytest.mark.default_cases("block")
@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_each_block_reads_its_own_copies_compiled_or_computed_again(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # Dynamo alone decides which copies a graph reads
    config = VARIANTS["gqa-rope"].model_copy(update={"layers": 3})
    train = TrainConfig.model_validate({"tokens": 64, "seq_len": 16, "batch_tokens": 64, "precision": "bf16"})
    token_BT = torch.randint(0, config.vocabulary, (4, 17), generator=torch.Generator().manual_seed(1))
    batches = [Batch(token_BT[i : i + 2], torch.arange(i, i + 2)) for i in (0, 2)]
    results = []
    for keep_casts, is_compiled in ((False, False), (True, False), (True, True)):
        plan = Plan(micro_batch=2, accumulate=2, recompute=recompute, keep_casts=keep_casts)  # type: ignore[arg-type]
        state = build_state(config, train, plan, torch.device("cpu"), 1)
        targets = sum(count_targets(batch) for batch in batches)
        torch._dynamo.reset()
        with compiled(state.model) if is_compiled else nullcontext():
            gradients(state.model, loss_for(state.model, train, plan), batches, targets)
        results.append({name: weight.grad for name, weight in state.model.named_parameters()})
    for name, expected in results[0].items():
        assert expected is not None
        assert torch.equal(results[1][name], expected), name
        assert relative_error(results[2][name], expected) < 0.03, name


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_layers_that_are_computed_again_add_to_their_sums_and_read_their_copies_too(
    recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"added": 0}
    add = fp32_sums.add_product_

    def counted(total: torch.Tensor, *others: torch.Tensor, **options: bool) -> None:
        counts["added"] += 1
        add(total, *others, **options)

    monkeypatch.setattr(fp32_sums, "add_product_", counted)
    config = VARIANTS["gqa-rope"]
    train = TrainConfig.model_validate({"tokens": 64, "seq_len": 16, "batch_tokens": 64, "precision": "bf16"})
    plan = Plan(micro_batch=2, accumulate=2, recompute=recompute)  # type: ignore[arg-type]
    state = build_state(config, train, plan, torch.device("cpu"), 1)
    token_BT = torch.randint(0, config.vocabulary, (4, 17), generator=torch.Generator().manual_seed(1))
    batches = [Batch(token_BT[i : i + 2], torch.arange(i, i + 2)) for i in (0, 2)]
    gradients(state.model, loss_for(state.model, train, plan), batches, 64)
    assert counts["added"] == 6 * config.layers, "each of a block's matrices, in the second micro-batch"
