"""Which rule, bits and matrices every weight gets with Muon, and what the optimizer remembers through a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowvram_kernels.optim.adamw8 import build_maps
from lowvram_kernels.optim.muon import muon_, new_momentum

from lowvram.config.train import AdamW, Muon
from lowvram.model.transformer import Transformer
from lowvram.train.optim import LEAST_8BIT, LeanOptimizer, build_optimizer
from lowvram.train.optimizer_tensors import load_optimizer_tensors, optimizer_tensors
from lowvram.train.step import update
from tests.model.variants import VARIANTS

# A weight's bits, its optimizer, and a name: all kinds of states.
RECIPES: dict[str, tuple[torch.dtype, AdamW | Muon]] = {
    "fp32-muon-16": (torch.float32, Muon(bits=16)),
    "fp32-muon-8": (torch.float32, Muon(bits=8)),
    "bf16-muon-16": (torch.bfloat16, Muon(bits=16, iterations=3)),
    "bf16-muon-8": (torch.bfloat16, Muon(bits=8)),
    "bf16-adamw-32": (torch.bfloat16, AdamW(bits=32)),
    "bf16-adamw-8": (torch.bfloat16, AdamW(bits=8)),
    "fp32-adamw-32": (torch.float32, AdamW(bits=32)),
    "fp32-adamw-8": (torch.float32, AdamW(bits=8)),
}
KINDS = pytest.mark.parametrize("kind", ["gqa-moe-untied", "mla-moe", "gqa-qk_norm", "mla-yarn-q_lora"])
EACH_RECIPE = pytest.mark.parametrize("recipe", list(RECIPES))


def model_of(kind: str, dtype: torch.dtype = torch.float32) -> Transformer:
    return Transformer(VARIANTS[kind]).to(dtype)


def step(model: Transformer, optimizer: LeanOptimizer, seed: int, skip: torch.Tensor | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    update(model, optimizer, None, 1e-3, 0.5, skip)


def remembered(model: Transformer, optimizer: LeanOptimizer) -> dict[str, torch.Tensor]:
    told = {**optimizer_tensors(model, optimizer), **model.state_dict()}
    return {name: tensor.clone() for name, tensor in told.items()}


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def groups_of(model: Transformer, optimizer: LeanOptimizer) -> dict[str, dict[str, Any]]:
    group_of = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    return {name: group_of.pop(id(weight)) for name, weight in model.named_parameters()}


@KINDS
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("embeddings", ["same", "fp32"])
def test_muon_steps_the_blocks_matrices_and_adamw_all_else(kind: str, bits: int, embeddings: str) -> None:
    model = model_of(kind)
    config = Muon(bits=bits, embeddings=embeddings, lr=2e-3, adamw_lr=5e-4, decay=0.3)  # type: ignore[arg-type]
    rules = set()
    for name, group in groups_of(model, build_optimizer(model, config)).items():
        weight = model.get_parameter(name)
        is_norm, is_table = "norm" in name, name in ("embedding", "head")
        assert is_norm == (weight.dim() == 1), name
        is_muon = not (is_norm or is_table or "router" in name)
        assert group["rule"] == ("muon" if is_muon else "adamw"), name
        is_coded = bits == 8 and not is_norm and weight.numel() >= LEAST_8BIT
        is_coded = is_coded and not (is_table and embeddings == "fp32")
        plain = 16 if is_muon else 32
        assert group["bits"] == (8 if is_coded else plain), name
        assert group["weight_decay"] == (0.0 if is_norm else 0.3), name
        assert group["share"] == (1.0 if is_muon else 0.25), name
        assert group["rows"] == (weight.shape[-2] // 2 if is_muon and "gate_up" in name else 0), name
        rules.add((group["rule"], group["bits"], group["rows"] > 0))
    assert {("muon", 16, False), ("adamw", 32, False)} <= rules
    if "moe" in kind:
        assert {("muon", 16, True), ("muon", bits, True)} <= rules


@KINDS
def test_without_a_rate_of_its_own_adamw_takes_muons(kind: str) -> None:
    model = model_of(kind)
    assert {group["share"] for group in build_optimizer(model, Muon()).param_groups} == {1.0}
    assert {group["share"] for group in build_optimizer(model, AdamW()).param_groups} == {1.0}


@pytest.mark.parametrize("bits", [16, 8])
def test_every_matrix_moves_as_the_op_says_and_adamws_weights_as_with_adamw_at_its_own_rate(bits: int) -> None:
    kind = "gqa-moe-untied"
    one, plain = model_of(kind), model_of(kind)
    start = {name: weight.detach().clone() for name, weight in one.named_parameters()}
    config = Muon(bits=bits, lr=1e-3, adamw_lr=4e-4, momentum=0.8, iterations=4, decay=0.2)  # type: ignore[arg-type]
    optimizer = build_optimizer(one, config)
    step(one, optimizer, 1)
    beside = AdamW(bits=8 if bits == 8 else 32, lr=1e-3, decay=0.2)
    exact = build_optimizer(plain, beside)
    exact.gradient_scale = 0.5
    step_of_plain(plain, exact, 4e-4)
    for name, group in groups_of(one, optimizer).items():
        weight = start[name]
        if group["rule"] == "adamw":
            assert torch.allclose(one.get_parameter(name), plain.get_parameter(name), rtol=1e-6, atol=1e-9), name
            continue
        rows = weight.shape[-2] // 2 if "gate_up" in name else None
        gradient = gradients_of(one, 1)[name]
        moved = [torch.tensor(1.0), torch.tensor(1e-3), rows, 0.8, 0.2, 4, 0.5]
        muon_(weight, gradient, new_momentum(weight, group["bits"]), build_maps().first, *moved)
        assert torch.equal(weight, one.get_parameter(name)), name


def gradients_of(model: Transformer, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(weight.shape, generator=generator) for name, weight in model.named_parameters()}


def step_of_plain(model: Transformer, optimizer: LeanOptimizer, rate: float) -> None:
    for name, gradient in gradients_of(model, 1).items():
        model.get_parameter(name).grad = gradient
    update(model, optimizer, None, rate, 0.5)


@EACH_RECIPE
@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_an_optimizer_that_was_put_back_goes_on_bit_for_bit(recipe: str, on_host: bool) -> None:
    dtype, config = RECIPES[recipe]
    whole, second = (model_of("gqa-moe-untied", dtype) for _ in range(2))
    first_half, second_half = (build_optimizer(model, config, seed=3, on_host=on_host) for model in (whole, second))
    for seed in (1, 2):
        step(whole, first_half, seed)
    load_optimizer_tensors(second, second_half, optimizer_tensors(whole, first_half))
    second.load_state_dict(whole.state_dict())
    before = remembered(whole, first_half)
    step(whole, first_half, 3)
    step(second, second_half, 3)
    truth = remembered(whole, first_half)
    assert are_equal(truth, remembered(second, second_half))
    stayed = {name for name in truth if truth[name].numel() and torch.equal(truth[name], before[name])}
    # Nobody told the load of the experts.
    assert stayed == {name for name in truth if name.endswith("router.bias_E")}


@EACH_RECIPE
def test_states_in_the_computers_memory_give_the_same_bits(recipe: str) -> None:
    dtype, config = RECIPES[recipe]
    results = []
    for on_host in (False, True):
        model = model_of("mla-moe", dtype)
        optimizer = build_optimizer(model, config, seed=3, on_host=on_host)
        for seed in (1, 2, 3):
            step(model, optimizer, seed)
        results.append(remembered(model, optimizer))
    assert are_equal(*results)
    assert any(name.startswith("step.") for name in results[0])


@EACH_RECIPE
@pytest.mark.parametrize("on_host", [False, True], ids=["device", "host"])
def test_states_made_beforehand_are_those_of_the_first_step(recipe: str, on_host: bool) -> None:
    dtype, config = RECIPES[recipe]
    results, forms = [], []
    for is_beforehand in (True, False):
        model = model_of("gqa-moe-untied", dtype)
        optimizer = build_optimizer(model, config, seed=3, on_host=on_host)
        if is_beforehand:
            optimizer.make_states()
            made = optimizer_tensors(model, optimizer)
            assert all(not tensor.any() for tensor in made.values())
            forms.append({name: (tensor.shape, tensor.dtype) for name, tensor in made.items()})
        step(model, optimizer, 1)
        results.append(remembered(model, optimizer))
        made = optimizer_tensors(model, optimizer)
        forms.append({name: (tensor.shape, tensor.dtype) for name, tensor in made.items()})
    assert are_equal(*results)
    assert forms[0] == forms[1] == forms[2]


@EACH_RECIPE
def test_another_seed_changes_bf16_weights_alone(recipe: str) -> None:
    dtype, config = RECIPES[recipe]
    results = []
    for seed in (3, 4):
        model = model_of("gqa-rope", dtype)
        optimizer = build_optimizer(model, config, seed=seed)
        step(model, optimizer, 1)
        results.append(remembered(model, optimizer))
    differ = {name for name in results[0] if not torch.equal(results[0][name], results[1][name])}
    matrices = {name for name, weight in model.named_parameters() if weight.dim() > 1}
    if dtype == torch.float32:
        assert differ == set()
    else:
        assert matrices <= differ <= {name for name, _ in model.named_parameters()}


@EACH_RECIPE
def test_where_gradients_are_not_finite_the_device_alone_leaves_every_bit(recipe: str) -> None:
    dtype, config = RECIPES[recipe]
    model = model_of("gqa-moe-untied", dtype)
    optimizer = build_optimizer(model, config, seed=3)
    step(model, optimizer, 1)
    before = remembered(model, optimizer)
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, torch.nan)
    update(model, optimizer, None, 1e-3, 1.0, torch.ones(()))
    assert are_equal(remembered(model, optimizer), before)
    step(model, optimizer, 2, torch.zeros(()))
    assert optimizer_tensors(model, optimizer)["step.embedding"].item() == 2.0
    assert not torch.equal(model.embedding, before["embedding"])
