"""A step of Muon against a textbook in fp64: momentum, several matrices in one weight, bf16 weights, slices, skips."""

from __future__ import annotations

import math
from typing import Any

import lowvram_kernels.optim.muon as op
import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.optim.adamw8 import build_maps
from lowvram_kernels.optim.muon import QUINTICS, Momentum, muon_, new_momentum, reference
from torch import Tensor

from tests.kernels.measures import relative_error

CODES = build_maps().first
RATE, DECAY, BETA = 2e-3, 0.1, 0.95
# How far the op's direction is from U Vᵀ (values within 0.144 of 1, so 0.1 in the mean), and from an iteration in fp64
# on the same momentum: rounding of the products to bf16, of the momentum to bf16, and of the momentum to 8 bits.
NEAR_REFERENCE, ONE_STEP, WITH_BF16, WITH_8BIT = 0.15, 0.04, 0.05, 0.12
# The weight's own rounding in fp32 against a step's size.
ROUNDING = 1e-6
SHAPES = [
    pytest.param((48, 64), id="whole-blocks"),
    pytest.param((67, 91), id="odd"),
    pytest.param((3, 40, 32), id="stack"),
    pytest.param((2, 3, 17, 29), id="odd-stack"),
]
BITS = pytest.mark.parametrize("bits", [16, 8])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return (torch.randn(shape) * 0.02).to(dtype)


def gradient_of(shape: tuple[int, ...], step: int) -> Tensor:
    """Matrices whose directions come back, as a loss's do, and noise on them."""
    generator = torch.Generator().manual_seed(100)
    steady = torch.randn(shape, generator=generator)
    generator.manual_seed(1000 + step)
    return 1e-3 * (steady + 0.5 * torch.randn(shape, generator=generator))


def take(weight: Tensor, gradient: Tensor, momentum: Momentum, step: int, **others: Any) -> None:
    settings = {"learning_rate": RATE, "beta": BETA, "decay": DECAY} | others
    muon_(weight, gradient, momentum, CODES, torch.tensor(float(step)), **settings)


def iterate(matrix_MN: Tensor) -> Tensor:
    """What the iteration's five quintics make of the singular values, fp64."""
    u, x, vh = torch.linalg.svd(matrix_MN, full_matrices=False)
    x = x / (x.norm() or 1.0)
    for a, b, c in QUINTICS[5][2]:
        x = x / op._ROOM
        x = a * x + b * x**3 + c * x**5
    return (u * x) @ vh


def textbook(weight: Tensor, gradient: Tensor, m: Tensor, rows: int, is_exact: bool) -> tuple[Tensor, Tensor]:
    """One step of Muon on fp64 tensors.  is_exact: along U Vᵀ, else by the iteration, in fp64."""
    m = BETA * m + (1 - BETA) * gradient
    u_BMN = ((1 - BETA) * gradient + BETA * m).view(-1, rows, weight.shape[-1])
    o_BMN = torch.stack([(reference if is_exact else iterate)(u_MN) for u_MN in u_BMN])
    factor = 0.2 * math.sqrt(max(rows, weight.shape[-1]))
    return (1 - RATE * DECAY) * weight - RATE * factor * o_BMN.view(weight.shape), m


def run(weight: Tensor, bits: int, steps: int = 3, **others: Any) -> tuple[Tensor, Momentum]:
    momentum = new_momentum(weight, bits)
    for step in range(1, steps + 1):
        take(weight, gradient_of(tuple(weight.shape), step), momentum, step, **others)
    return weight, momentum


def are_equal(one: tuple[Tensor, Momentum], other: tuple[Tensor, Momentum]) -> bool:
    return all(torch.equal(a, b) for a, b in zip((one[0], *one[1]), (other[0], *other[1]), strict=True))


@pytest.mark.parametrize("is_exact", [True, False], ids=["svd", "iteration"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_first_step_is_the_textbooks(shape: tuple[int, ...], is_exact: bool) -> None:
    start, gradient = weight_of(shape), gradient_of(shape, 1)
    zeros = torch.zeros(shape).double()
    exact, m = textbook(start.double(), gradient.double(), zeros, shape[-2], is_exact)
    for bits in (16, 8):
        weight, momentum = start.clone(), new_momentum(start, bits)
        take(weight, gradient, momentum, 1)
        off = relative_error(weight.double() - start.double(), exact - start.double())
        assert off < (NEAR_REFERENCE if is_exact else ONE_STEP)
        if bits == 16:
            torch.testing.assert_close(momentum.code.double(), m, rtol=2**-8, atol=0)


@BITS
@pytest.mark.parametrize("shape", SHAPES)
def test_twenty_steps_stay_close_to_those_with_an_exact_momentum(shape: tuple[int, ...], bits: int) -> None:
    start = weight_of(shape)
    exact, m = start.double(), torch.zeros(shape).double()
    for step in range(1, 21):
        exact, m = textbook(exact, gradient_of(shape, step).double(), m, shape[-2], False)
    weight, _ = run(start.clone(), bits, 20)
    off = relative_error(weight.double() - start.double(), exact - start.double())
    assert off < (WITH_BF16 if bits == 16 else WITH_8BIT)


def test_a_weight_without_gradient_only_decays() -> None:
    start = weight_of((33, 20))
    weight = start.clone()
    take(weight, torch.zeros(33, 20), new_momentum(weight, 16), 1)
    torch.testing.assert_close(weight, start * (1 - RATE * DECAY), rtol=ROUNDING, atol=0)


@BITS
@DTYPES
def test_gate_over_up_are_two_matrices(dtype: torch.dtype, bits: int) -> None:
    start, size = weight_of((2 * 24, 32), dtype), 24 * 32
    both = run(start.clone(), bits, rows=24, seed=3)
    for half in (0, 1):
        first, rows = half * size, slice(half * 24, half * 24 + 24)
        weight = start[rows].clone()
        momentum = new_momentum(weight, bits)
        for step in (1, 2, 3):
            gradient = gradient_of((48, 32), step)[rows].contiguous()
            take(weight, gradient, momentum, step, seed=3, first=first)
        assert torch.equal(weight, both[0][rows])
        part = both[1].part(first, first + size)
        assert torch.equal(momentum.code.view(-1), part.code)
        assert torch.equal(momentum.absmax, part.absmax)
    assert not torch.equal(run(start.clone(), bits)[0], both[0])


@BITS
@DTYPES
def test_a_stack_of_experts_steps_as_each_expert_alone(dtype: torch.dtype, bits: int) -> None:
    start, size = weight_of((4, 32, 24), dtype), 32 * 24
    whole = run(start.clone(), bits, seed=5, purpose=3)
    weight, momentum = start.clone(), new_momentum(start, bits)
    for step in (1, 2, 3):
        for expert in (2, 0, 3, 1):
            first = expert * size
            part = momentum.part(first, first + size)
            gradient = gradient_of((4, 32, 24), step)[expert]
            take(weight[expert], gradient, part, step, seed=5, purpose=3, first=first)
    assert are_equal((weight, momentum), whole)


@BITS
@DTYPES
def test_neither_groups_nor_chunks_change_a_bit(dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowvram_kernels.random.stochastic_rounding as chunks

    start = weight_of((5, 32, 24), dtype)
    whole = run(start.clone(), bits, seed=5)
    assert are_equal(run(start.clone(), bits, seed=5), whole)
    for at_once, chunk in ((2 * 32 * 24, 2**18), (1, 512), (2**22, 256)):
        monkeypatch.setattr(op, "AT_ONCE", at_once)
        monkeypatch.setattr(chunks, "CHUNK", chunk)
        assert are_equal(run(start.clone(), bits, seed=5), whole)


@BITS
def test_matrices_at_work_together_are_as_many_as_fit(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = op.orthogonalise

    def spy(u_BMN: Tensor, *others: Any) -> Tensor:
        seen.append(u_BMN.shape[0])
        return plain(u_BMN, *others)

    monkeypatch.setattr(op, "orthogonalise", spy)
    monkeypatch.setattr(op, "AT_ONCE", 2 * 32 * 24 + 5)
    run(weight_of((5, 32, 24)), bits, 1)
    assert seen == [2, 2, 1]
    # Odd matrices cut a block, which 8 bits cannot.
    seen.clear()
    monkeypatch.setattr(op, "AT_ONCE", 1)
    run(weight_of((3, 7, 9)), bits, 1)
    assert seen == ([3] if bits == 8 else [1, 1, 1])


@BITS
def test_numbers_and_scalars_on_the_device_mean_the_same(bits: int) -> None:
    plain = run(weight_of((40, 56)), bits, gradient_scale=0.5)
    device = {"gradient_scale": torch.tensor(0.5), "learning_rate": torch.tensor(RATE), "skip": torch.zeros(1)}
    again = run(weight_of((40, 56)), bits, **device)
    assert relative_error(again[0], plain[0]) < ROUNDING
    assert torch.equal(again[1].code, plain[1].code)
    weight = weight_of((40, 56))
    momentum = new_momentum(weight, bits)
    for step in (1, 2, 3):
        take(weight, gradient_of((40, 56), step) * 0.5, momentum, step)
    assert are_equal((weight, momentum), plain)


@BITS
@DTYPES
def test_a_skipped_step_changes_no_bit(dtype: torch.dtype, bits: int) -> None:
    weight, momentum = run(weight_of((61, 77), dtype), bits, 1)
    before = weight.clone(), Momentum(*(tensor.clone() for tensor in momentum))
    gradient = torch.full((61, 77), torch.nan)
    take(weight, gradient, momentum, 2, skip=~gradient.norm().isfinite())
    assert are_equal((weight, momentum), before)
    assert momentum.code.any()


def test_a_bf16_weights_rounding_has_the_right_mean_and_another_name_another_rounding() -> None:
    shape = (96, 128)
    start = weight_of(shape, torch.bfloat16)
    exact = start.float()
    take(exact, gradient_of(shape, 1), new_momentum(exact, 16), 1)
    count = 400
    total, seen = torch.zeros(shape).double(), []
    for seed in range(count):
        weight = start.clone()
        take(weight, gradient_of(shape, 1), new_momentum(weight, 16), 1, seed=seed)
        total += weight.double()
        seen.append(weight)
    gap = exact.double().abs().log2().floor().exp2() * 2.0**-7
    assert all(((weight.double() - exact.double()).abs() < 1.001 * gap).all() for weight in seen)
    # A mean over all elements: five standard errors of a coin between neighbours.
    off = ((total / count - exact.double()) / gap).mean().item()
    assert abs(off) < 5 * 0.5 / math.sqrt(count * start.numel())
    others = [start.clone() for _ in range(3)]
    for weight, name in zip(others, ({"purpose": 1}, {"first": 256}, {"seed": 1}), strict=True):
        take(weight, gradient_of(shape, 1), new_momentum(weight, 16), 1, **name)
        assert not torch.equal(weight, seen[0])
    assert torch.equal(others[2], seen[1])


def test_cards_that_multiply_in_fp16_take_gradients_that_fp16_cannot_say() -> None:
    start, gradient = weight_of((40, 32)), gradient_of((40, 32), 1)
    exact, _ = textbook(start.double(), gradient.double(), torch.zeros(40, 32).double(), 40, False)
    for size in (1e-8, 1e9):
        weight = start.clone()
        with override_card(Card("cuda", (7, 5), has_triton=False)):
            take(weight, gradient * size, new_momentum(weight, 16), 1)
        assert relative_error(weight.double() - start.double(), exact - start.double()) < ONE_STEP


def test_a_processor_multiplies_in_fp32_whatever_card_is_set() -> None:
    start, gradient = weight_of((40, 32)), gradient_of((40, 32), 1)
    own = start.clone()
    take(own, gradient, new_momentum(own, 16), 1)
    with override_card(Card("cuda", (8, 6), has_triton=False)):
        weight = start.clone()
        take(weight, gradient, new_momentum(weight, 16), 1)
    assert torch.equal(weight, own)


@BITS
def test_a_weight_whose_gradients_have_long_been_zero_stays_finite(bits: int) -> None:
    weight, momentum = run(weight_of((24, 32)), bits, 1)
    for step in range(2, 2_000):
        take(weight, torch.zeros(24, 32), momentum, step, decay=0.0)
    assert weight.isfinite().all()


def test_unwritten_memory_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(weight_of((300, 77)), 8)
    empty = torch.empty

    def nan(*args: Any, **kwargs: Any) -> Tensor:
        return empty(*args, **kwargs).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", nan)
    assert are_equal(run(weight_of((300, 77)), 8), plain)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"gradient": torch.ones(10, 29)}, "300 weights", id="gradient-size"),
        pytest.param({"momentum": new_momentum(torch.ones(600), 16)}, "300 weights", id="momentum-size"),
        pytest.param({"momentum": new_momentum(torch.ones(300), 8)._replace(absmax=torch.ones(1))}, "300", id="absmax"),
        pytest.param({"weight": torch.ones(300)}, "no matrix", id="vector"),
        pytest.param({"rows": 4}, "4 rows", id="rows"),
        pytest.param({"rows": -5}, "-5 rows", id="negative-rows"),
        pytest.param({"weight": torch.ones(10, 30, dtype=torch.float16)}, "torch.float16", id="fp16-weight"),
        pytest.param({"gradient": torch.ones(10, 30, dtype=torch.int64)}, "torch.int64", id="integer-gradient"),
        pytest.param({"weight": torch.ones(30, 10).mT}, "contiguous", id="strides"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(change: dict[str, Any], named: str) -> None:
    plain = {"weight": torch.ones(10, 30), "gradient": torch.ones(10, 30)}
    whole = plain | {"momentum": new_momentum(torch.ones(10, 30), 16)} | change
    with pytest.raises(ShapeError, match=named):
        take(step=1, **whole)


@pytest.mark.parametrize(("first", "end"), [(100, 600), (0, 300), (0, 1000), (512, 512), (-256, 256)], ids=str)
def test_a_part_that_cuts_a_block_is_refused(first: int, end: int) -> None:
    with pytest.raises(ShapeError, match=r"Momentum\.part"):
        new_momentum(torch.ones(600), 8).part(first, end)


def test_a_part_is_a_view_and_16_bits_may_be_cut_anywhere() -> None:
    momentum = new_momentum(torch.ones(2, 300), 16)
    part = momentum.part(7, 300)
    part.code.fill_(1.0)
    assert momentum.code.sum() == 293
    assert part.absmax.numel() == 0
    with pytest.raises(ShapeError, match=r"Momentum\.part"):
        momentum.part(7, 601)
    codes = new_momentum(torch.ones(600), 8).part(256, 600)
    assert (codes.code.numel(), codes.absmax.numel()) == (344, 2)
