"""A step of AdamW in one launch: the plain form's bits, and what it moves and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, is_interpreted, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.optim.adamw8 import Moments, adamw8_, build_maps, new_moments, reference
from test_adamw8 import Oracle, decode_flat
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on, unwritten
from tests.kernels.measures import LiveBytes, relative_error

MAPS = build_maps(DEVICE)
PLAIN = Card("cpu")
SHAPES = [
    pytest.param((1,), id="one"),
    pytest.param((255,), id="short-block"),
    pytest.param((257,), id="one-over"),
    pytest.param((4096 + 17,), id="five-programs"),
    pytest.param((3, 688), id="rows-of-688"),
]
WEIGHTS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
EXACT = pytest.mark.parametrize("exact", [False, True], ids=["codes", "exact"])
# 1 − βᵗ and its root, a few roundings of fp32 each, are what the two forms reckon differently.
ROUNDING = 1e-6


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=generator) * 0.02).to(DEVICE, dtype)


def gradient_of(shape: tuple[int, ...], step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients over six decades inside a block, some exactly zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = 10.0 ** (-6.0 * torch.rand(shape, generator=generator))
    gradient = torch.randn(shape, generator=generator) * size * 1e-2
    return (gradient * (torch.rand(shape, generator=generator) > 0.1)).to(DEVICE, dtype)


def take(card: Card, weight: Tensor, gradient: Tensor, moments: Moments, step: int, **others: Any) -> None:
    settings = {"learning_rate": 1e-3, "decay": 0.1, "seed": 5, "purpose": 3} | others
    with override_card(card):
        adamw8_(weight, gradient, moments, MAPS, torch.tensor(float(step), device=DEVICE), **settings)


def on_both(weight: Tensor, gradients: list[Tensor], exact: bool, **others: Any) -> list[tuple[Tensor, ...]]:
    """Weight and moments after steps of the kernel and of the plain form."""
    with running_on("sm86"):
        pass  # skips where the card cannot
    results = []
    for card in (CARDS["sm86"], PLAIN):
        own, moments = weight.clone(), new_moments(weight, exact)
        for step, gradient in enumerate(gradients, 1):
            take(card, own, gradient, moments, step, **others)
        results.append((own, *moments))
    return results


def are_equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def kernels_expm1(x: Tensor) -> Tensor:
    """What the kernel makes of eˣ − 1, in the same order."""
    series = 1.0 + x * (1.0 / 7.0) * (1.0 + x * (1.0 / 8.0))
    series = 1.0 + x * (1.0 / 5.0) * (1.0 + x * (1.0 / 6.0) * series)
    series = 1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * (1.0 + x * 0.25 * series))
    far = torch.tensor(math.exp(x.item()), dtype=torch.float32)  # the interpreter's numpy rounds it so, or nearly
    return x * series if x > -0.5 else far - 1.0


def exact_root(x: Tensor, out: Tensor | None = None) -> Tensor:
    """√x rounded to nearest, which torch's on a processor is not always."""
    root = (x.double() ** 0.5).float()
    return root if out is None else out.copy_(root)


only_interpreted = pytest.mark.skipif(not is_interpreted(), reason="a card's exponential rounds otherwise")


@only_interpreted
@WEIGHTS
@EXACT
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=["g-fp32", "g-bf16"])
def test_with_the_kernels_bias_correction_and_roots_the_plain_form_has_its_bits(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    exact: bool,
    gradient_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "expm1", kernels_expm1)
    monkeypatch.setattr(torch, "sqrt", exact_root)
    monkeypatch.setattr(Tensor, "sqrt", exact_root)
    gradients = [gradient_of(shape, step, gradient_dtype) for step in (1, 2, 3)]
    assert are_equal(*on_both(weight_of(shape, dtype), gradients, exact))


@WEIGHTS
@EXACT
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.999), (0.9, 0.0)], ids=str)
def test_moments_are_the_plain_forms_and_weights_within_their_rounding(
    dtype: torch.dtype, exact: bool, betas: tuple[float, float]
) -> None:
    start = weight_of((5, 431), dtype)
    gradients = [gradient_of((5, 431), step) for step in range(1, 5)]
    ours, plain = on_both(start, gradients, exact, betas=betas, gradient_scale=0.5)
    if is_interpreted():
        assert are_equal(ours[1:], plain[1:])
    else:  # the plain form ran on the card, whose compiler may fuse other products and sums: some codes are neighbours
        assert relative_error(ours[1], plain[1]) < 1e-3
    if dtype == torch.float32:
        assert relative_error(ours[0] - start, plain[0] - start) < 10 * ROUNDING
        return
    # A change that is off by 1e-6 of itself flips a coin between neighbours in one case of so many.
    assert (ours[0] != plain[0]).double().mean() < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_moments_make_the_textbooks_steps(shape: tuple[int, ...]) -> None:
    weight = weight_of(shape)
    start, moments = weight.double(), new_moments(weight, exact=True)
    exact, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    with running_on("sm75"):
        for step in range(1, 6):
            gradient = gradient_of(shape, step)
            take(CARDS["sm75"], weight, gradient, moments, step, learning_rate=1e-2)
            exact, m, v = reference(exact, gradient.double(), m, v, step, 1e-2, decay=0.1)
    assert relative_error(weight.double() - start, exact - start) < 10 * ROUNDING
    assert relative_error(moments.code_m, m) < ROUNDING
    assert relative_error(moments.code_v, v) < ROUNDING


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_the_bias_correction_does_not_cancel_for_any_step(beta: float) -> None:
    with running_on("sm86"):
        for step in (1, 2, 3, 7, 60, 499, 500, 501, 700, 5_000, 100_000):
            weight, gradient = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
            one = torch.ones(1, device=DEVICE)
            moments = Moments(one.clone(), one.clone(), one[:0], one[:0])
            settings = {"betas": (beta or 0.5, beta or 0.5), "eps": 0.0, "decay": 0.0, "learning_rate": 1.0}
            take(CARDS["sm86"], weight, gradient, moments, step, **settings)
            # √β · √(1 − βᵗ)/(1 − βᵗ), in fp64 and of the β and the logarithm that fp32 can say
            log = torch.tensor(math.log(beta or 0.5)).mul(float(step)).double().item()
            expected = (beta or 0.5) ** 0.5 / (-math.expm1(log)) ** 0.5
            assert -weight.item() == pytest.approx(expected, rel=ROUNDING / 2), step


@WEIGHTS
def test_numbers_and_scalars_on_the_device_mean_the_same(dtype: torch.dtype) -> None:
    start, gradients = weight_of((613,), dtype), [gradient_of((613,), step) for step in (1, 2)]
    scalars = {"learning_rate": torch.tensor([1e-3]), "gradient_scale": torch.tensor(0.5)}
    scalars = {name: value.to(DEVICE) for name, value in scalars.items()}
    of_scalars, plain = on_both(start, gradients, False, **scalars)
    of_numbers, _ = on_both(start, gradients, False, gradient_scale=0.5)
    assert are_equal(of_scalars[1:], of_numbers[1:])
    for other in (plain, of_numbers):
        assert relative_error(of_scalars[0] - start, other[0] - start) < (
            10 * ROUNDING if dtype == torch.float32 else 0.1
        )


@WEIGHTS
@EXACT
@pytest.mark.parametrize(
    "skip", [torch.tensor(1.0), torch.tensor([True]), torch.tensor(torch.nan)], ids=["one", "truth", "nan"]
)
def test_a_skipped_step_changes_no_bit_and_zero_skips_none(dtype: torch.dtype, exact: bool, skip: Tensor) -> None:
    weight = weight_of((777,), dtype)
    moments = new_moments(weight, exact)
    with running_on("sm86"):
        take(CARDS["sm86"], weight, gradient_of((777,), 1), moments, 1)
        before = tuple(tensor.clone() for tensor in (weight, *moments))
        nan = torch.full_like(weight, torch.nan, dtype=torch.float32)
        take(CARDS["sm86"], weight, nan, moments, 2, skip=skip.to(DEVICE))
    assert are_equal((weight, *moments), before)
    gradients = [gradient_of((777,), step) for step in (1, 2)]
    zero = torch.zeros_like(skip, device=DEVICE)
    assert are_equal(on_both(weight, gradients, exact, skip=zero)[0], on_both(weight, gradients, exact)[0])


@WEIGHTS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30], ids=["nan", "inf", "overflow"])
def test_what_is_no_number_spoils_what_it_spoils_in_the_plain_form(dtype: torch.dtype, bad: float) -> None:
    gradients = [gradient_of((700,), step) for step in (1, 2)]
    gradients[0][300] = bad
    weight = weight_of((700,), dtype)
    weight[10] = torch.nan
    ours, plain = on_both(weight, gradients, False)
    for mine, its in zip(ours, plain, strict=True):
        assert torch.equal(mine.isnan(), its.isnan())
    assert ours[0].isnan()[[10, 300]].all()
    # Only its own block of 256, and the weight that was none before.
    assert ours[0].isnan().sum() == 257
    for mine, its in zip(ours[1:3], plain[1:3], strict=True):
        assert (mine != its).double().mean() <= (0.0 if is_interpreted() else 0.01)


def by_expert(size: int, exact: bool) -> Callable[[Tensor, Tensor, Moments, int], None]:
    def run(weight: Tensor, gradient: Tensor, moments: Moments, step: int) -> None:
        for expert in (2, 0, 1):
            first = expert * size
            if exact:  # which has no blocks to cut
                part = Moments(*(code.view(3, -1)[expert] for code in moments[:2]), *moments[2:])
            else:
                part = moments.part(first, first + size)
            take(CARDS["sm86"], weight[expert], gradient[expert], part, step, first=first)

    return run


@WEIGHTS
@pytest.mark.parametrize(("size", "exact"), [(768, False), (256, False), (331, True)], ids=["768", "256", "331-exact"])
def test_slices_of_experts_change_no_bit(dtype: torch.dtype, size: int, exact: bool) -> None:
    results = []
    with running_on("sm86"):
        for way in (lambda *given: take(CARDS["sm86"], *given), by_expert(size, exact)):
            weight = weight_of((3, size), dtype)
            moments = new_moments(weight, exact)
            for step in (1, 2):
                way(weight, gradient_of((3, size), step), moments, step)
            results.append((weight, *moments))
    assert are_equal(*results)


@WEIGHTS
def test_memory_beside_a_slice_at_an_odd_address_stays_as_it_is(dtype: torch.dtype) -> None:
    count = 1 + 700 + 60
    wide = [unwritten(count, dtype=kind) for kind in (dtype, torch.uint8, torch.uint8)]
    weight, code_m, code_v = (tensor[1:701] for tensor in wide)
    scales = [unwritten(5, dtype=torch.float32) for _ in range(2)]
    moments, gradient = Moments(code_m, code_v, scales[0][1:4], scales[1][1:4]), gradient_of((701,), 1)[1:]
    plain = weight_of((700,), dtype)
    fresh = new_moments(plain)
    weight.copy_(plain)
    for own, new in zip(moments, fresh, strict=True):
        own.copy_(new)
    with running_on("sm86"):
        take(CARDS["sm86"], weight, gradient, moments, 1)
        take(CARDS["sm86"], plain, gradient.clone(), fresh, 1)
    assert are_equal((weight, *moments), (plain, *fresh))
    for tensor in wide[1:]:
        assert torch.cat([tensor[:1], tensor[701:]]).unique().tolist() == [165]
    assert torch.cat([wide[0][:1], wide[0][701:]]).isnan().all()
    assert all(scale[[0, 4]].isnan().all() for scale in scales)


@pytest.mark.skipif(DEVICE != "cpu", reason="the oracle's state is a processor's")
@pytest.mark.parametrize("shape", [(67, 91), (5, 7, 131)], ids=["odd", "stack"])
def test_from_its_state_a_step_is_bitsandbytes_own_and_our_codes_are_never_further_off(shape: tuple[int, ...]) -> None:
    oracle = Oracle(weight_of(shape))
    moments = new_moments(oracle.weight)
    for step in range(1, 4):
        gradient, weight = gradient_of(shape, step), oracle.weight.detach().clone()
        before = weight.clone()
        m, v = (decode_flat(moments, index) for index in (0, 1))
        _, m, v = reference(weight.flatten(), gradient.flatten(), m, v, step, 1e-3)
        take(CARDS["sm86"], weight, gradient, moments, step)
        oracle.take(gradient)
        assert relative_error(weight - before, oracle.weight.detach() - before) < 10 * ROUNDING
        theirs = oracle.moments()
        for index, truth in enumerate((m, v)):
            ours_off, theirs_off = ((decode_flat(own, index) - truth).abs() for own in (moments, theirs))
            assert (ours_off <= theirs_off + ROUNDING * truth.abs().max()).all()
        moments = theirs


@pytest.mark.parametrize(
    ("dtype", "gradient_dtype", "exact", "moved"),
    [
        pytest.param(torch.bfloat16, torch.bfloat16, False, 10 + 16 / 256, id="bf16"),
        pytest.param(torch.float32, torch.float32, False, 16 + 16 / 256, id="fp32"),
        pytest.param(torch.bfloat16, torch.bfloat16, True, 22, id="bf16-exact"),
    ],
)
@pytest.mark.parametrize("card", list(CARDS))
def test_on_paper_it_is_one_launch_without_temporaries_that_moves_what_is_said(
    dtype: torch.dtype, gradient_dtype: torch.dtype, exact: bool, moved: float, card: str
) -> None:
    count = 40_000 * 256
    launches: list[Launch] = []
    told: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS[card], told.append, note_launch=launches.append):
        weight, gradient = torch.empty(count, dtype=dtype), torch.empty(count, dtype=gradient_dtype)
        moments, maps, step, skip = new_moments(weight, exact), build_maps("meta"), torch.ones(()), torch.zeros(())
        with LiveBytes().ignore(weight, gradient, *moments, *maps.first, *maps.second, step, skip) as live:
            adamw8_(weight, gradient, moments, maps, step, 1e-3, skip=skip)
    assert live.peak == 0
    assert [(what.kernel, what.grid) for what in launches] == [("adamw8_kernel", (10_000,))]
    assert told == [HiddenWork(0.0, moved * count, 1.0)]


def test_without_triton_a_card_takes_the_plain_form() -> None:
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(Card("cuda", (8, 6), has_triton=False), note_launch=launches.append):
        weight = torch.empty(5_000)
        adamw8_(weight, torch.empty(5_000), new_moments(weight), build_maps("meta"), torch.ones(()), 1e-3)
    assert not launches


def test_under_compile_a_step_is_one_op_of_the_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(weight: Tensor, gradient: Tensor, code_m: Tensor, code_v: Tensor, *absmax: Tensor) -> None:
        now = torch.ones((), device=DEVICE)
        adamw8_(weight, gradient, Moments(code_m, code_v, *absmax), MAPS, now, 1e-3, decay=0.1, seed=5, purpose=3)

    results = []
    with running_on("sm86"):
        for run in (step, torch.compile(step, fullgraph=True, backend=keep)):
            weight = weight_of((300,), torch.bfloat16)
            moments = new_moments(weight)
            run(weight, gradient_of((300,), 1), *moments)
            results.append((weight, *moments))
    assert are_equal(*results)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("lowvram_kernels" in name for name in called) == 1


@pytest.mark.parametrize("name", ["learning_rate", "gradient_scale", "skip"])
def test_scalars_on_another_device_are_refused(name: str) -> None:
    weight = weight_of((300,))
    with pytest.raises(ShapeError, match=f"need to lie on {DEVICE}"), running_on("sm86"):
        take(CARDS["sm86"], weight, weight, new_moments(weight), 1, **{name: torch.ones((), device="meta")})
