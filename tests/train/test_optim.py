"""Learning rates against values worked out by hand, and which weights the optimizer lets decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowvram.config.run_file import load_preset, preset_names
from lowvram.config.train import AdamW, Muon, TrainConfig
from lowvram.model.transformer import Transformer
from lowvram.train.optim import LEAST_8BIT, LeanOptimizer, build_optimizer
from lowvram.train.optimizer_tensors import load_optimizer_tensors, optimizer_tensors
from lowvram.train.schedule import learning_rate
from lowvram.train.step import update
from tests.model.variants import VARIANTS


def recipe(schedule: dict[str, Any], steps: int = 20, lr: float = 1.0) -> TrainConfig:
    return TrainConfig(
        tokens=steps * 64,
        seq_len=32,
        batch_tokens=64,
        optimizer=AdamW(lr=lr),
        schedule=schedule,  # type: ignore[arg-type]
    )


def rates(train: TrainConfig) -> list[float]:
    return [learning_rate(train, step) for step in range(train.steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_warm_up_rises_evenly_and_reaches_the_peak_after_its_share_of_the_steps(kind: str) -> None:
    found = rates(recipe({"kind": kind, "warmup": 0.2}, lr=0.5))
    assert found[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], rel=1e-12)
    assert max(found) == found[4]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak_rate(kind: str) -> None:
    assert learning_rate(recipe({"kind": kind, "warmup": 0.0}, lr=0.25), 0) == 0.25


def test_the_cosine_falls_from_the_peak_to_its_floor() -> None:
    train = recipe({"kind": "cosine", "warmup": 0.2, "floor": 0.1})
    # After 4 steps of warm-up 16 are left: a quarter, a half, three quarters and all of half a cosine.
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    three = 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2
    found = [learning_rate(train, step) for step in (4, 8, 12, 16, 20)]
    assert found == pytest.approx([1.0, quarter, 0.55, three, 0.1], rel=1e-12)
    assert rates(train)[4:] == sorted(rates(train)[4:], reverse=True)


def test_warmup_stable_decay_is_flat_and_then_falls_in_a_line() -> None:
    found = rates(recipe({"kind": "wsd", "warmup": 0.1, "decay": 0.25, "floor": 0.0}))
    assert found[:2] == pytest.approx([1 / 3, 2 / 3], rel=1e-12)
    assert found[2:16] == [1.0] * 14
    assert found[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2], rel=1e-12)


def test_a_decay_ends_at_its_floor() -> None:
    train = recipe({"kind": "wsd", "warmup": 0.0, "decay": 1.0, "floor": 0.5})
    assert [learning_rate(train, step) for step in (0, 10, 20, 99)] == pytest.approx([1.0, 0.75, 0.5, 0.5], rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 50])
def test_every_rate_of_a_short_run_is_positive_and_not_above_the_peak(kind: str, steps: int) -> None:
    assert all(0 < rate <= 3e-3 for rate in rates(recipe({"kind": kind, "warmup": 0.3}, steps, lr=3e-3)))


def test_the_number_of_steps_is_rounded_up() -> None:
    assert TrainConfig(tokens=129, seq_len=32, batch_tokens=64).steps == 3


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["gqa-qk_norm", "gqa-moe-untied", "mla-yarn-q_lora"])
def test_matrices_decay_and_norms_do_not(kind: str, bits: int) -> None:
    model = Transformer(VARIANTS[kind])
    optimizer = build_optimizer(model, AdamW(decay=0.3, bits=bits))  # type: ignore[arg-type]
    decays = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    for name, weight in model.named_parameters():
        assert decays.pop(id(weight)) == (0.0 if "norm" in name else 0.3), name
    assert decays == {}


def test_the_optimizer_steps_as_the_formula_of_adamw_says() -> None:
    model = Transformer(VARIANTS["gqa-rope"])
    config = AdamW(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, decay=0.2)
    optimizer, weight = build_optimizer(model, config), model.embedding
    expected, first, second = weight.detach().double(), 0.0, 0.0
    for step in range(1, 4):
        weight.grad = torch.full_like(weight, 0.1 * step) * torch.linspace(-1, 1, weight.shape[1])
        gradient = weight.grad.double()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        expected = expected * (1 - 0.01 * 0.2)
        expected -= 0.01 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_what_the_optimizer_remembers_is_put_back_as_copies_under_the_weights_names() -> None:
    one, other = Transformer(VARIANTS["mla-moe"]), Transformer(VARIANTS["mla-moe"])
    first, second = (build_optimizer(model, AdamW()) for model in (one, other))
    assert optimizer_tensors(one, first) == {}
    for weight in one.parameters():
        weight.grad = torch.randn_like(weight)
    first.step()
    told = optimizer_tensors(one, first)
    names = {name for name, _ in one.named_parameters()}
    assert set(told) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq", "step") for name in names}
    load_optimizer_tensors(other, second, told)
    again = optimizer_tensors(other, second)
    assert all(torch.equal(again[name], told[name]) for name in told)
    told["exp_avg.embedding"].zero_()
    assert again["exp_avg.embedding"].abs().max() > 0


def with_gradients(model: Transformer, seed: int) -> Transformer:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)
    return model


def remembered(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    told = {**optimizer_tensors(model, optimizer), **model.state_dict()}
    return {name: tensor.clone() for name, tensor in told.items()}


@pytest.mark.parametrize("embeddings", ["same", "fp32"])
@pytest.mark.parametrize("kind", ["gqa-moe-untied", "mla-moe"])
def test_8_bits_are_for_large_matrices_and_the_rest_steps_as_with_32(kind: str, embeddings: str) -> None:
    one, other = (with_gradients(Transformer(VARIANTS[kind]), 1) for _ in range(2))
    config = AdamW(bits=8, embeddings=embeddings, decay=0.2)  # type: ignore[arg-type]
    small, plain = build_optimizer(one, config), build_optimizer(other, AdamW(decay=0.2))
    assert isinstance(small, LeanOptimizer)
    for _ in range(3):
        small.step()
        plain.step()
    eight_bit = {name.partition(".")[2] for name in optimizer_tensors(one, small) if name.startswith("code_m.")}
    exempt = {"embedding", "head"} if embeddings == "fp32" else set()
    large = {n for n, w in one.named_parameters() if w.dim() > 1 and w.numel() >= LEAST_8BIT}
    assert eight_bit == large - exempt
    assert eight_bit
    start = Transformer(VARIANTS[kind])
    for name, weight in one.named_parameters():
        exact, before = other.get_parameter(name), start.get_parameter(name)
        assert torch.equal(weight, exact) == (name not in eight_bit), name
        assert (weight - exact).norm() < 0.03 * (exact - before).norm(), name


@pytest.mark.parametrize("preset", preset_names())
def test_8_bit_states_of_every_preset_take_at_most_2_1_bytes_a_parameter(preset: str) -> None:
    with FakeTensorMode():
        model = Transformer(load_preset(preset)[0], seed=None)
        optimizer = build_optimizer(model, AdamW(bits=8))
        optimizer.make_states()
        states = optimizer_tensors(model, optimizer)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert {name.partition(".")[2] for name in states} == {name for name, _ in model.named_parameters()}
    assert 2.0 < sum(tensor.nbytes for tensor in states.values()) / parameters <= 2.1


@pytest.mark.parametrize("bits", [32, 8])
def test_an_optimizer_that_was_put_back_goes_on_bit_for_bit(bits: int) -> None:
    config = AdamW(bits=bits)  # type: ignore[arg-type]
    whole, second = Transformer(VARIANTS["gqa-moe-untied"]), Transformer(VARIANTS["gqa-moe-untied"])
    first_half, second_half = (build_optimizer(model, config, seed=3) for model in (whole, second))
    for seed in (1, 2):
        update(with_gradients(whole, seed), first_half, None, 1e-3, 1.0)
    load_optimizer_tensors(second, second_half, optimizer_tensors(whole, first_half))
    second.load_state_dict(whole.state_dict())
    for model, optimizer in ((whole, first_half), (second, second_half)):
        update(with_gradients(model, 3), optimizer, None, 1e-3, 1.0)
    truth, found = remembered(whole, first_half), remembered(second, second_half)
    assert truth.keys() == found.keys()
    assert all(torch.equal(truth[name], found[name]) for name in truth)


@pytest.mark.parametrize("config", [AdamW(bits=8), Muon()], ids=["adamw", "muon"])
def test_an_experts_rounding_is_the_same_in_every_slot(config: AdamW | Muon) -> None:
    def step(experts: list[int]) -> torch.Tensor:
        """Update equal weights of two rotating experts by equal gradients; returns them by the expert's number."""
        weight = torch.nn.Parameter(torch.full((2, 64, 64), 0.3, dtype=torch.bfloat16))
        group = {"params": [weight], "rule": config.name, "bits": 8, "rows": 64 if config.name == "muon" else 0}
        optimizer = LeanOptimizer([group], config, seed=5)
        optimizer.experts[weight] = experts
        weight.grad = torch.linspace(-1, 1, 64 * 64).view(64, 64).expand(2, -1, -1).to(weight.dtype)
        optimizer.step()
        return weight.detach()[torch.tensor(experts).argsort()]

    ordered = step([4, 7])
    assert torch.equal(ordered, step([7, 4]))
    assert not torch.equal(ordered[0], ordered[1]), "each expert has random bits of its own"


@pytest.mark.parametrize("bits", [32, 8])
def test_where_gradients_are_not_finite_the_device_alone_leaves_every_bit(bits: int) -> None:
    model = Transformer(VARIANTS["gqa-moe-untied"])
    optimizer = build_optimizer(model, AdamW(bits=bits))  # type: ignore[arg-type]
    update(with_gradients(model, 1), optimizer, None, 1e-3, 1.0)
    before = remembered(model, optimizer)
    with_gradients(model, 2).embedding.grad[3, 4] = float("nan")
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    update(model, optimizer, None, 1e-3, 1.0, (~norm.isfinite()).float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in remembered(model, optimizer).items())
    update(with_gradients(model, 2), optimizer, None, 1e-3, 1.0, torch.zeros(()))
    assert optimizer_tensors(model, optimizer)["step.embedding"].item() == 2.0
    assert not torch.equal(model.embedding, before["embedding"])
