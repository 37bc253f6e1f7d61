"""Both ends of a step of Muon in one launch each: the plain form's bits around the same products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lowvram_kernels.optim.muon as op
import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, is_interpreted, override_card, simulate_card
from lowvram_kernels.optim.adamw8 import build_maps
from lowvram_kernels.optim.muon import Momentum, muon_, new_momentum
from lowvram_kernels.optim.muon_together import (
    MOST_TOGETHER,
    TOGETHER,
    MuonPart,
    elements_together,
    muon_together_,
    offsets_of,
    to_device,
)
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error

CODES = build_maps(DEVICE).first
BITS = pytest.mark.parametrize("bits", [16, 8])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [
    pytest.param((48, 64), id="whole-blocks"),
    pytest.param((67, 91), id="odd"),
    pytest.param((2, 3, 17, 29), id="odd-stack"),
]
# A card's products differ in their last bits; the passes around them do not.
NEAR_ON_CARD = 0.05


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(DEVICE, dtype)


def gradient_of(shape: tuple[int, ...], step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return (1e-3 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def take(card: Card, weight: Tensor, gradient: Tensor, momentum: Momentum, step: int, **others: Any) -> None:
    settings = {"learning_rate": 2e-3, "decay": 0.1, "seed": 5, "purpose": 3} | others
    with override_card(card):
        muon_(weight, gradient, momentum, CODES, torch.tensor(float(step), device=DEVICE), **settings)


def plain_of(card: str) -> Card:
    """The same card without Triton: the same products."""
    return CARDS[card]._replace(has_triton=False)


def on_both(start: Tensor, gradients: list[Tensor], bits: int, **others: Any) -> list[tuple[Tensor, ...]]:
    results = []
    with running_on("sm86"):
        for card in (CARDS["sm86"], plain_of("sm86")):
            weight, momentum = start.clone(), new_momentum(start, bits)
            for step, gradient in enumerate(gradients, 1):
                take(card, weight, gradient, momentum, step, **others)
            results.append((weight, *momentum))
    return results


def assert_same(start: Tensor, ours: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> None:
    if is_interpreted():
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    else:
        assert relative_error(ours[0] - start, plain[0] - start) < NEAR_ON_CARD


@BITS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16], ids=["g-fp32", "g-bf16"])
def test_the_kernels_have_the_plain_forms_bits(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, gradient_dtype: torch.dtype
) -> None:
    start = weight_of(shape, dtype)
    gradients = [gradient_of(shape, step, gradient_dtype) for step in (1, 2, 3)]
    assert_same(start, *on_both(start, gradients, bits, gradient_scale=0.5))


@BITS
@DTYPES
def test_scalars_on_the_device_and_other_names_have_them_too(dtype: torch.dtype, bits: int) -> None:
    start, gradients = weight_of((33, 70), dtype), [gradient_of((33, 70), step) for step in (1, 2)]
    scalars = {"learning_rate": torch.tensor([2e-3]), "gradient_scale": torch.tensor([0.5])}
    others = {name: value.to(DEVICE) for name, value in scalars.items()} | {"first": 300, "seed": -1}
    assert_same(start, *on_both(start, gradients, bits, **others))


@BITS
@DTYPES
@pytest.mark.parametrize("skip", [torch.tensor(1.0), torch.tensor([True])], ids=["one", "truth"])
def test_a_skipped_step_changes_no_bit_and_zero_skips_none(dtype: torch.dtype, bits: int, skip: Tensor) -> None:
    weight = weight_of((33, 70), dtype)
    momentum = new_momentum(weight, bits)
    with running_on("sm86"):
        take(CARDS["sm86"], weight, gradient_of((33, 70), 1), momentum, 1)
        before = [tensor.clone() for tensor in (weight, *momentum)]
        nan = torch.full((33, 70), torch.nan, device=DEVICE)
        take(CARDS["sm86"], weight, nan, momentum, 2, skip=skip.to(DEVICE))
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, *momentum), strict=True))
    gradients = [gradient_of((33, 70), step) for step in (1, 2)]
    zero = torch.zeros_like(skip, device=DEVICE)
    ours, _ = on_both(weight, gradients, bits, skip=zero)
    assert_same(weight, ours, on_both(weight, gradients, bits)[0])


@BITS
def test_what_is_no_number_spoils_what_it_spoils_in_the_plain_form(bits: int) -> None:
    gradient = gradient_of((4, 16, 32), 1)
    gradient[2, 3, 5] = torch.nan
    (weight, code, absmax), plain = on_both(weight_of((4, 16, 32)), [gradient], bits)
    assert torch.equal(weight.isnan(), plain[0].isnan())
    assert weight.isnan().flatten(1).sum(1).tolist() == [0, 0, 512, 0]
    assert torch.equal(absmax.isnan(), plain[2].isnan())
    assert torch.equal(code.isnan(), plain[1].isnan())
    assert absmax.isnan().sum() == (1 if bits == 8 else 0)


@BITS
@DTYPES
def test_slices_of_experts_change_no_bit(dtype: torch.dtype, bits: int) -> None:
    size, results = 16 * 48, []
    with running_on("sm86"):
        for is_whole in (True, False):
            weight = weight_of((3, 16, 48), dtype)
            momentum = new_momentum(weight, bits)
            for step in (1, 2):
                gradient = gradient_of((3, 16, 48), step)
                if is_whole:
                    take(CARDS["sm86"], weight, gradient, momentum, step)
                    continue
                for expert in (1, 2, 0):
                    part = momentum.part(expert * size, (expert + 1) * size)
                    take(CARDS["sm86"], weight[expert], gradient[expert], part, step, first=expert * size)
            results.append((weight, *momentum))
    assert_same(weight_of((3, 16, 48), dtype), *results)


def test_before_capability_8_directions_come_in_fp16() -> None:
    start, gradient = weight_of((40, 32)), gradient_of((40, 32), 1)
    results = []
    with running_on("sm75"):
        for card in (CARDS["sm75"], plain_of("sm75")):
            weight, momentum = start.clone(), new_momentum(start, 16)
            take(card, weight, gradient * 1e-8, momentum, 1)
            results.append((weight, *momentum))
    assert_same(start, *results)
    assert relative_error(results[0][0], start) > 1e-3


@BITS
@DTYPES
def test_on_paper_both_passes_are_launches_that_move_what_is_said(
    dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "orthogonalise", lambda u_BMN, *others: u_BMN)
    count = 512 * 512
    launches: list[Launch] = []
    told: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS["sm86"], told.append, note_launch=launches.append):
        weight, gradient = torch.empty(512, 512, dtype=dtype), torch.empty(512, 512, dtype=torch.bfloat16)
        momentum, codes, step = new_momentum(weight, bits), build_maps("meta").first, torch.ones(())
        with LiveBytes().ignore(weight, gradient, *momentum, *codes, step) as live:
            muon_(weight, gradient, momentum, codes, step, 1e-3)
    assert live.peak == 2 * count, "u alone"
    assert [what.kernel for what in launches] == ["lead_kernel", "move_kernel"]
    kept = 2 if bits == 16 else 1 + 4 / 256
    assert [work.moved_bytes / count for work in told] == [2 + 2 * kept + 2, 2 * dtype.itemsize + 2]


def test_under_compile_each_pass_is_one_op_of_the_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def step(weight: Tensor, gradient: Tensor, code: Tensor, absmax: Tensor) -> None:
        now = torch.ones((), device=DEVICE)
        muon_(weight, gradient, Momentum(code, absmax), CODES, now, 1e-3, seed=5, purpose=3)

    results = []
    with running_on("sm86"):
        for run in (step, torch.compile(step, fullgraph=True, backend=keep)):
            weight = weight_of((32, 48), torch.bfloat16)
            momentum = new_momentum(weight, 8)
            run(weight, gradient_of((32, 48), 1), *momentum)
            results.append((weight, *momentum))
    assert_same(weight_of((32, 48), torch.bfloat16), *results)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("lowvram_kernels" in name for name in called) == 2


@BITS
@DTYPES
@pytest.mark.parametrize(("shape", "rows"), [((16, 48), None), ((32, 48), 16)], ids=["one-matrix", "two-in-a-weight"])
def test_weights_that_step_together_step_as_each_alone(
    shape: tuple[int, ...], rows: int | None, dtype: torch.dtype, bits: int
) -> None:
    starts = [weight_of(shape, dtype) * (1 + number) for number in range(3)]
    steps = [torch.tensor(2.0 + number, device=DEVICE) for number in range(3)]
    settings = {"rows": rows, "decay": 0.1, "gradient_scale": 0.5}
    rate, results = torch.tensor(2e-3, device=DEVICE), []
    with running_on("sm86"):
        for together in (True, False):
            weights = [start.clone() for start in starts]
            momenta = [new_momentum(weight, bits) for weight in weights]
            gradients = [gradient_of(shape, number) for number in range(3)]
            if together:
                parts = [MuonPart(*each) for each in zip(weights, momenta, steps, range(7, 10), strict=True)]
                offsets = offsets_of(parts, gradients, 5)
                assert offsets is not None
                muon_together_(parts, gradients, to_device(offsets, weights[0].device), CODES, rate, **settings)
                assert gradients == [], "their memory is free for the products"
            else:
                for i, each in enumerate(zip(weights, gradients, momenta, strict=True)):
                    muon_(*each, CODES, steps[i], rate, purpose=7 + i, seed=5, **settings)
            results.append([*weights, *(part for momentum in momenta for part in momentum)])
    for own, alone, start in zip(*results, [*starts, *[None] * 6], strict=True):
        if start is None:
            assert torch.equal(own, alone), "momenta have the same bits"
        else:
            assert relative_error(own - start, alone - start) < (2e-3 if dtype == torch.float32 else 0.05)


def test_a_step_of_many_weights_is_two_launches_for_all_of_them() -> None:
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], note_launch=launches.append):
        weights = [torch.empty(64, 96) for _ in range(40)]
        parts = [MuonPart(w, new_momentum(w, 8), torch.empty(()), 0) for w in weights]
        gradients = [torch.empty(64, 96) for _ in parts]
        offsets = torch.empty(6, 40, dtype=torch.int64)
        with LiveBytes().ignore(*weights, *gradients) as live:
            codes, rate = build_maps("meta").first, torch.empty(())
            muon_together_(parts, gradients, offsets, codes, rate, skip=torch.empty(()))
    assert [what.grid for what in launches] == [(6, 40), (6, 40)]
    assert live.largest <= 40 * 64 * 96 * 2


def test_offsets_tell_every_tensor_of_a_part_and_refuse_what_a_kernel_cannot_read_at_once() -> None:
    weights = [weight_of((16, 48)) for _ in range(3)]
    parts = [MuonPart(w, new_momentum(w, 8), torch.tensor(1.0, device=DEVICE), i) for i, w in enumerate(weights)]
    gradients = [gradient_of((16, 48), i) for i in range(3)]
    offsets = offsets_of(parts, gradients, 5)
    assert offsets is not None
    assert [row[0] for row in offsets[:5]] == [0] * 5
    assert [gradients[0].data_ptr() + 4 * number for number in offsets[0]] == [g.data_ptr() for g in gradients]
    assert len({*offsets[5]}) == 3, "each weight is rounded by a key of its own"
    crooked = torch.empty(16 * 48 + 1, device=DEVICE)[1:].view(16, 48)
    assert offsets_of(parts, [gradients[0], crooked, gradients[2]], 5) is None


def test_gradients_that_are_gone_make_room_for_larger_stacks() -> None:
    assert elements_together(0, 4) == elements_together(1000, 2) == TOGETHER
    assert elements_together(100 * 2**20, 4) == 50 * 2**20, "fp32: 6 bytes alive less the gradient's own 4"
    assert elements_together(100 * 2**20, 2) == 25 * 2**20
    assert elements_together(2**40, 2) == MOST_TOGETHER
