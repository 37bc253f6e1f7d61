"""8-bit AdamW against bitsandbytes step by step, against textbook AdamW, and its cost in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import lowvram_kernels.optim.adamw8 as op
import pytest
import torch
from lowvram_kernels.dispatch import Card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.optim.adamw8 import CodeMap, Maps, Moments, adamw8_, build_maps, decode, encode, new_moments
from lowvram_kernels.random.stochastic_rounding import CHUNK, round_to_bf16
from torch import Tensor

from tests.kernels.measures import LiveBytes, relative_error

MAPS = build_maps()
SHAPES = [
    pytest.param((16, 256), id="whole-blocks"),
    pytest.param((67, 91), id="odd"),
    pytest.param((3, 1399), id="one-over"),
    pytest.param((5, 7, 131), id="stack"),
]
STEPS = 25
FROZEN_ROUNDING = [1, 0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0]
# One rounding of fp32, a few times over: what another order of the same operations makes.
ROUNDING = 1e-6


def gradients_of(shape: tuple[int, ...], step: int) -> Tensor:
    """Gradients over six decades inside a block, some exactly zero, as an embedding's are."""
    torch.manual_seed(1000 + step)
    gradient = torch.randn(shape) * 10.0 ** (-6.0 * torch.rand(shape))
    return gradient * (torch.rand(shape) > 0.1) * 1e-2


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return (torch.randn(shape) * 0.02).to(dtype)


def take(weight: Tensor, gradient: Tensor, moments: Moments, step: int, **others: Any) -> None:
    settings = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "decay": 0.1} | others
    adamw8_(weight, gradient, moments, MAPS, torch.tensor(float(step)), **settings)


class Oracle:
    """bitsandbytes' AdamW8bit over one weight."""

    def __init__(self, weight: Tensor) -> None:
        library = pytest.importorskip("bitsandbytes")
        self.weight = torch.nn.Parameter(weight.clone())
        settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        self.optimizer = library.optim.AdamW8bit([self.weight], **settings)

    def take(self, gradient: Tensor) -> None:
        self.weight.grad = gradient.clone()
        self.optimizer.step()

    def moments(self) -> Moments:
        """Copies of its memory, as ours."""
        state = self.optimizer.state[self.weight]
        return Moments(*(state[name].clone() for name in ("state1", "state2", "absmax1", "absmax2")))


def encode_on_its_grid(x_BK: Tensor, codes: CodeMap) -> tuple[Tensor, Tensor]:
    """On CPU bitsandbytes looks codes up at the nearest of 2¹⁶ points of [−1, 1], in fp32: the nearest code of that."""
    absmax_B = x_BK.abs().amax(-1)
    scaled_BK = x_BK * (1.0 / absmax_B.clamp_min(1e-38))[:, None]
    place_BK = ((scaled_BK + 1.0) * 32767.5 + 0.5).floor() / 32767.5 - 1.0
    # A first column of ones keeps the places as they are.
    ours, _ = encode(torch.cat([torch.ones_like(place_BK[:, :1]), place_BK], 1), codes)
    return ours.view(place_BK.shape[0], -1)[:, 1:].reshape(-1), absmax_B


@pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])
def test_the_values_are_those_of_bitsandbytes(is_signed: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional").create_dynamic_map(signed=is_signed)
    # Two roundings of fp32: theirs are computed in it.
    torch.testing.assert_close(torch.tensor(op.map_values(is_signed)), theirs, rtol=2.5e-7, atol=0)


@pytest.mark.parametrize("codes", MAPS, ids=["signed", "unsigned"])
def test_every_value_has_its_own_code_and_any_number_the_nearest(codes: CodeMap) -> None:
    found, _ = encode(codes.value.clone()[None], codes)
    assert torch.equal(found, torch.arange(256, dtype=torch.uint8))
    x = torch.cat([torch.ones(1), torch.rand(9_999) * 10.0 ** (-8.0 * torch.rand(9_999))])
    x = torch.where((torch.arange(10_000) % 2 == 1) & (codes.value[0] < 0), -x, x)
    found, absmax = encode(x.clone()[None], codes)
    assert absmax.tolist() == [1.0]
    distance = (x.double()[:, None] - codes.value.double()).abs()
    chosen = distance.gather(1, found.long()[:, None])[:, 0]
    # On a midpoint either neighbour is nearest, up to the midpoint's own rounding.
    assert ((chosen - distance.amin(1)) <= 1.2e-7 * x.abs()).all()


def test_a_block_of_zeros_decodes_to_zeros() -> None:
    for codes in MAPS:
        code, absmax = encode(torch.zeros(2, 256), codes)
        assert decode(code, absmax, codes).abs().max() == 0.0


@pytest.mark.parametrize("codes", MAPS, ids=["signed", "unsigned"])
def test_bitsandbytes_rounds_to_its_grid_first_and_then_every_code_is_ours(codes: CodeMap) -> None:
    its = pytest.importorskip("bitsandbytes.functional")
    theirs_map = its.create_dynamic_map(signed=bool(codes.value[0] < 0))
    torch.manual_seed(3)
    x = torch.randn(100_003) * 10.0 ** (-6.0 * torch.rand(100_003))
    x = x if codes.value[0] < 0 else x.abs()
    theirs, state = its.quantize_blockwise(x, theirs_map, blocksize=256)
    whole = 100_003 // 256 * 256
    for part, blocks in ((slice(0, whole), (-1, 256)), (slice(whole, None), (1, -1))):
        code, absmax = encode_on_its_grid(x[part].view(blocks), codes)
        assert torch.equal(code, theirs[part])
        assert torch.equal(absmax, state.absmax[part.start // 256 : -(-(part.stop or 100_003) // 256)])


@pytest.mark.parametrize("shape", SHAPES)
def test_on_its_grid_all_steps_are_those_of_bitsandbytes(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "encode", encode_on_its_grid)
    weight = weight_of(shape)
    oracle, moments = Oracle(weight), new_moments(weight)
    others = 0
    for step in range(1, STEPS + 1):
        gradient = gradients_of(shape, step)
        oracle.take(gradient)
        take(weight, gradient, moments, step)
        theirs = oracle.moments()
        for index in (0, 1):
            others += int((moments[index] != theirs[index]).sum())
        torch.testing.assert_close(moments.absmax_m, theirs.absmax_m, rtol=ROUNDING, atol=0)
        torch.testing.assert_close(moments.absmax_v, theirs.absmax_v, rtol=ROUNDING, atol=0)
        assert relative_error(weight, oracle.weight) < ROUNDING
    # None where this was written; a processor that fuses products and sums otherwise may move one over an edge.
    assert others <= 1e-4 * 2 * STEPS * weight.numel()


@pytest.mark.parametrize("shape", SHAPES)
def test_from_its_state_a_step_is_bitsandbytes_own_and_our_codes_are_never_further_off(shape: tuple[int, ...]) -> None:
    oracle = Oracle(weight_of(shape))
    moments = new_moments(oracle.weight)
    for step in range(1, STEPS + 1):
        gradient, weight = gradients_of(shape, step), oracle.weight.detach().clone()
        before = weight.clone()
        m, v = (decode_flat(moments, index) for index in (0, 1))
        _, m, v = op.reference(weight.flatten(), gradient.flatten(), m, v, step, 1e-3)
        take(weight, gradient, moments, step)
        oracle.take(gradient)
        moved = oracle.weight.detach() - before
        assert relative_error(weight - before, moved) < 1e-5  # the weights' own rounding is 1e-8 of 1e-3
        theirs = oracle.moments()
        for index, truth in enumerate((m, v)):
            ours_off, theirs_off = ((decode_flat(own, index) - truth).abs() for own in (moments, theirs))
            assert (ours_off <= theirs_off + ROUNDING * truth.abs().max()).all()
        moments = theirs


def decode_flat(moments: Moments, index: int) -> Tensor:
    """One moment as flat fp32, by the definition."""
    code, absmax = moments[index].flatten(), moments[2 + index]
    return MAPS[index].value[code.long()] * absmax.repeat_interleave(256)[: code.numel()]


@pytest.mark.parametrize("shape", SHAPES)
def test_many_steps_stay_as_close_to_exact_moments_as_bitsandbytes_does(shape: tuple[int, ...]) -> None:
    start = weight_of(shape)
    oracle, moments, weight = Oracle(start), new_moments(start), start.clone()
    exact, m, v = start, torch.zeros(shape), torch.zeros(shape)
    for step in range(1, STEPS + 1):
        # Within one decade: where moments span more, 8 bits call the smaller ones zero.
        gradient = torch.randn(shape).sign() * (0.1 + gradients_of(shape, step).abs())
        oracle.take(gradient)
        take(weight, gradient, moments, step)
        exact, m, v = op.reference(exact, gradient, m, v, step, 1e-3, decay=0.1)
    ours, theirs = (relative_error(w.detach() - start, exact - start) for w in (weight, oracle.weight))
    assert ours < 1.1 * theirs
    assert ours < 0.03


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.9, 0.0)], ids=str)
def test_the_first_step_is_the_textbooks_in_fp32(betas: tuple[float, float]) -> None:
    weight, gradient = weight_of((41, 103)), torch.randn(41, 103)
    before, moments = weight.clone(), new_moments(weight)
    take(weight, gradient / 3, moments, 1, betas=betas, gradient_scale=torch.tensor(3.0))
    zeros = torch.zeros_like(before).double()
    exact, _, _ = op.reference(before.double(), gradient.double(), zeros, zeros, 1, 1e-3, betas, decay=0.1)
    torch.testing.assert_close(weight - before, (exact - before.double()).float(), rtol=1e-4, atol=3e-9)


def test_numbers_and_scalars_on_the_device_mean_the_same() -> None:
    results = []
    for rate, scale, skip in ((1e-3, 0.5, None), (torch.tensor(1e-3), torch.tensor(0.5), torch.tensor(0.0))):
        weight = weight_of((61, 77))
        moments = new_moments(weight)
        for step in (1, 2):
            settings = {"learning_rate": rate, "gradient_scale": scale, "skip": skip}
            take(weight, gradients_of((61, 77), step), moments, step, **settings)
        results.append((weight, *moments))
    torch.testing.assert_close(results[0], results[1], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_skipped_step_changes_no_bit(dtype: torch.dtype) -> None:
    weight = weight_of((61, 77), dtype)
    moments = new_moments(weight)
    take(weight, gradients_of((61, 77), 1), moments, 1)
    before = [tensor.clone() for tensor in (weight, *moments)]
    assert moments.code_v.any()
    gradient = torch.full((61, 77), float("nan"))
    take(weight, gradient, moments, 2, skip=~gradient.norm().isfinite())
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, *moments), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_slices_of_experts_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, size = (3, 16, 160), 16 * 160
    ways: list[Callable[[Tensor, Tensor, Moments, int], None]] = []

    def whole(weight: Tensor, gradient: Tensor, moments: Moments, step: int) -> None:
        take(weight, gradient, moments, step, seed=5, purpose=3)

    def by_expert(weight: Tensor, gradient: Tensor, moments: Moments, step: int) -> None:
        for expert in (2, 0, 1):
            first = expert * size
            part = moments.part(first, first + size)
            take(weight[expert], gradient[expert], part, step, seed=5, purpose=3, first=first)

    ways = [whole, by_expert, whole]
    results = []
    for number, way in enumerate(ways):
        if number == 2:
            monkeypatch.setattr("lowvram_kernels.random.stochastic_rounding.CHUNK", 512)
        weight = weight_of(shape, dtype)
        moments = new_moments(weight)
        for step in (1, 2, 3):
            way(weight, gradients_of(shape, step), moments, step)
        results.append((weight, *moments))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_rounding_to_bf16_is_unbiased_and_never_further_than_a_neighbour() -> None:
    exact = torch.cat([torch.tensor([1.0, -1.0, 0.0, 2.0**-100]), torch.randn(60)])
    noise = torch.randint(0, 2**32, (40_000, 64))
    rounded = round_to_bf16(exact.expand(40_000, 64).contiguous(), noise).double()
    assert torch.equal(rounded[:, :4], exact[:4].double().expand(40_000, 4))
    gap = exact.abs().log2().floor().exp2().mul(2.0**-7).nan_to_num(neginf=0.0)
    assert ((rounded - exact).abs() < gap.clamp_min(1e-45)).all()
    # Five standard errors of a coin between neighbours.
    assert ((rounded.mean(0) - exact).abs() <= 5 * gap * 0.5 / 200).all()


def test_a_bf16_weight_moves_by_less_than_its_gaps_because_its_rounding_is_drawn_anew() -> None:
    size, steps = 40_000, 30
    weight = torch.ones(size, dtype=torch.bfloat16)
    moments = new_moments(weight)
    for step in range(1, steps + 1):
        take(weight, torch.ones(size), moments, step, learning_rate=1e-5, decay=0.0)
    # Below 1 bf16 has gaps of 2⁻⁸, four hundred times a step: rounding to nearest would stand still.
    assert 1.0 - weight.double().mean().item() == pytest.approx(steps * 1e-5, rel=0.1)
    other = torch.ones(size, dtype=torch.bfloat16)
    take(other, torch.ones(size), new_moments(other), 1, learning_rate=1e-3, purpose=1)
    again = torch.ones(size, dtype=torch.bfloat16)
    take(again, torch.ones(size), new_moments(again), 1, learning_rate=1e-3, purpose=2)
    assert not torch.equal(other, again)


def test_the_rounding_never_changes_between_releases() -> None:
    """A run resumed with a newer version must round the same way: these figures are frozen."""
    weight = torch.ones(4096, dtype=torch.bfloat16)
    take(weight, torch.ones(4096), new_moments(weight), 1, learning_rate=2e-3, decay=0.0, seed=7, purpose=2)
    assert (weight[:24] < 1.0).int().tolist() == FROZEN_ROUNDING


def test_it_keeps_two_bytes_and_a_32nd_for_each_parameter() -> None:
    kept = sum(tensor.nbytes for tensor in new_moments(torch.empty(1024, 250)))
    assert kept == 256_000 * 2 + 1000 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_has_the_size_of_the_weight_and_paper_agrees(dtype: torch.dtype) -> None:
    limit = {torch.float32: 19, torch.bfloat16: 27}[dtype] * CHUNK
    for count in (3 * CHUNK + 77, 9 * CHUNK):
        peaks = []
        for mode, device in ((simulate_card(Card("cpu")), "meta"), (contextlib.nullcontext(), "cpu")):
            with mode, torch.device(device):
                weight, gradient = torch.zeros(count, dtype=dtype), torch.ones(count)
                moments, maps = new_moments(weight), build_maps(device)
                step, rate, skip = torch.ones(()), torch.ones(()), torch.zeros(())
                known = [weight, gradient, *moments, *maps.first, *maps.second, step, rate, skip]
                with LiveBytes().ignore(*known) as live:
                    adamw8_(weight, gradient, moments, maps, step, rate, skip=skip)
            peaks.append(live.peak)
        assert peaks[0] == peaks[1]
        assert 0 < peaks[0] < limit
    assert sum(table.nbytes for codes in build_maps() for table in codes) < 2**20


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"gradient": torch.ones(299)}, "300 weights", id="gradient-size"),
        pytest.param({"moments": new_moments(torch.ones(600))}, "300 weights", id="moments-size"),
        pytest.param({"weight": torch.ones(300, dtype=torch.float16)}, "torch.float16", id="fp16-weight"),
        pytest.param({"gradient": torch.ones(300, dtype=torch.int64)}, "torch.int64", id="integer-gradient"),
        pytest.param({"gradient": torch.ones(600)[::2]}, "contiguous", id="strides"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(change: dict[str, Any], named: str) -> None:
    whole = {"weight": torch.ones(300), "gradient": torch.ones(300), "moments": new_moments(torch.ones(300))} | change
    with pytest.raises(ShapeError, match=named):
        take(step=1, **whole)


@pytest.mark.parametrize(("first", "end"), [(100, 600), (0, 300), (0, 1000), (512, 512)], ids=str)
def test_a_part_that_cuts_a_block_is_refused(first: int, end: int) -> None:
    with pytest.raises(ShapeError, match=r"Moments\.part"):
        new_moments(torch.ones(600)).part(first, end)
    assert Maps._fields == ("first", "second")
