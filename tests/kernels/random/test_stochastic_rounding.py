"""Rounding at random: neighbours only, the right mean, named outcomes, and sums of many terms."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import lowvram_kernels.random.stochastic_rounding as op
import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.random.counter_rng import chain, draw_bits, name_noise
from lowvram_kernels.random.stochastic_rounding import CHUNK, add_rounded_, reference, round_to_bf16
from torch import Tensor

from tests.kernels.measures import LiveBytes, relative_error

DRAWS = 40_000
# Of a coin's mean over that many draws.
FIVE_ERRORS = 5 * 0.5 / DRAWS**0.5
FROZEN = [1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]


def numbers() -> Tensor:
    """Both signs, powers of two and their neighbours, subnormal ones, the greatest below bf16's, over many decades."""
    torch.manual_seed(1)
    powers = torch.tensor([1.0, 2.0, 2.0**-126, 2.0**-130, 2.0**100, 3.0e38])
    beside = torch.cat([powers, powers.nextafter(torch.tensor(0.0)), powers.nextafter(torch.tensor(math.inf))])
    x = torch.cat([beside, torch.randn(46) * 10.0 ** (12 * torch.rand(46) - 6)])
    return torch.cat([x, -x])


def gap_of(x: Tensor) -> Tensor:
    """The distance between a number's neighbours in bf16, fp64."""
    return x.double().abs().log2().floor().clamp_min(-126).exp2() * 2.0**-7


def add(total: Tensor, term: Tensor, seed: int = 0, purpose: int = 0, sample: int = 0) -> Tensor:
    add_rounded_(total, term, seed, purpose, torch.tensor(sample))
    return total


def test_the_formula_and_the_op_agree_for_every_outcome_of_the_chance() -> None:
    x = numbers()
    noise = torch.arange(2**16)
    for number in x:
        many = number.expand(2**16).contiguous()
        # The op takes the next number where bits + part cut off ≥ 2¹⁶, which is where 1 − (bits + 1)/2¹⁶ < part/2¹⁶.
        expected = reference(many, (2**16 - 1 - noise).double() / 2**16)
        assert torch.equal(round_to_bf16(many, noise), expected)


def test_the_reference_rounds_to_neighbours_of_both_signs_and_has_the_right_mean() -> None:
    x = numbers()
    uniform = (torch.arange(DRAWS) + 0.5).double() / DRAWS
    drawn = reference(x.expand(DRAWS, -1), uniform[:, None].expand(-1, len(x))).double()
    assert ((drawn - x.double()).abs() < gap_of(x)).all()
    # An even sweep of the chance errs by one outcome.
    assert ((drawn.mean(0) - x.double()).abs() <= gap_of(x) / DRAWS).all()
    assert ((drawn.abs() >= x.double().abs()).any(0)).all()
    assert ((drawn.abs() <= x.double().abs()).any(0)).all()


def test_the_op_rounds_to_neighbours_and_has_the_right_mean_over_many_names() -> None:
    x = numbers()
    rounded = []
    for purpose in range(400):
        # A hundred elements of each number, in one sum.
        total = torch.zeros(100, len(x), dtype=torch.bfloat16)
        rounded.append(add(total, x.expand(100, -1), purpose=purpose))
    drawn = torch.cat(rounded).double()
    assert drawn.shape == (DRAWS, len(x))
    assert ((drawn - x.double()).abs() < gap_of(x)).all()
    assert ((drawn.mean(0) - x.double()).abs() <= FIVE_ERRORS * gap_of(x)).all()


def test_what_bf16_can_say_stays_as_it_is() -> None:
    x = torch.cat([numbers().bfloat16().float(), torch.tensor([0.0, -0.0, math.inf, -math.inf])])
    for bits in (0, 1, 2**15, 2**16 - 1):
        assert torch.equal(round_to_bf16(x, torch.full(x.shape, bits)), x.bfloat16())
    total = torch.full((300,), 1.5, dtype=torch.bfloat16)
    assert torch.equal(add(total, torch.full((300,), -0.25)), torch.full((300,), 1.25, dtype=torch.bfloat16))


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000])
def test_what_is_no_number_stays_none(bits: int) -> None:
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert x.isnan().all()
    for noise in (0, 1, 2**16 - 1):
        assert round_to_bf16(x, torch.tensor([noise])).isnan().all()
    assert add(torch.ones(1, dtype=torch.bfloat16), x).isnan().all()


def test_only_sixteen_bits_of_the_noise_are_used() -> None:
    x, noise = torch.randn(1000), torch.randint(0, 2**16, (1000,))
    plain = round_to_bf16(x, noise)
    assert torch.equal(round_to_bf16(x, noise + (torch.randint(0, 2**15, (1000,)) << 16)), plain)


def test_seed_purpose_sample_and_place_name_the_rounding() -> None:
    def drawn(**names: int) -> Tensor:
        return add(torch.ones(4096, dtype=torch.bfloat16), torch.full((4096,), 2.0**-8), **names)

    plain = drawn(seed=3, purpose=2, sample=5)
    assert torch.equal(drawn(seed=3, purpose=2, sample=5), plain)
    share = (plain > 1.0).double().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / 64
    for names in ({"seed": 4}, {"purpose": 1}, {"sample": 6}, {"sample": 5 + 2**32}):
        other = drawn(**({"seed": 3, "purpose": 2, "sample": 5} | names))
        # Independent coins agree half the time.
        assert abs((other == plain).double().mean().item() - 0.5) < 5 * 0.5 / 64
    assert not torch.equal(plain[:2048], plain[2048:])


def test_the_rounding_never_changes_between_releases() -> None:
    """A run resumed with a newer version must round the same way: these figures are frozen."""
    total = add(torch.ones(24, dtype=torch.bfloat16), torch.full((24,), 2.0**-9), 7, 2, 11)
    assert (total > 1.0).int().tolist() == FROZEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_chunks_and_shapes_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    start, term = torch.randn(3, 7, 111).bfloat16(), torch.randn(3, 7, 111).to(dtype)
    whole = add(start.clone(), term)
    assert torch.equal(add(start.clone().view(-1), term.view(21, 111)), whole.view(-1))
    assert torch.equal(add(start.clone(), term.mT.contiguous().mT), whole)
    monkeypatch.setattr(op, "CHUNK", 256)
    assert torch.equal(add(start.clone(), term), whole)


def sums(first: float, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """256 terms of mean 1, the first one greater: their exact sum, that of plain bf16 additions, and ours."""
    torch.manual_seed(3)
    size = 20_000
    exact, plain, ours = torch.zeros(size).double(), *(torch.zeros(size, dtype=torch.bfloat16) for _ in range(2))
    for sample in range(256):
        term = ((first if sample == 0 else 1.0) * (1.0 + spread * torch.randn(size))).bfloat16()
        exact += term.double()
        plain += term
        add(ours, term, sample=sample)
    return exact, plain, ours


def test_steady_terms_that_plain_additions_lose_are_all_in_the_sum() -> None:
    exact, plain, ours = sums(20.0, 0.0)
    lost, missed = (((exact - total.double()).mean() / exact.mean()).item() for total in (plain, ours))
    assert lost == pytest.approx(0.069, rel=0.01)
    # Five standard errors: one element errs by some 1.6 %.
    error = relative_error(ours, exact)
    assert abs(missed) < 5 * error / exact.numel() ** 0.5
    assert error < 0.3 * lost
    small = torch.full((CHUNK,), 256.0, dtype=torch.bfloat16)
    for sample in range(10):
        add(small, torch.full((CHUNK,), 0.4), sample=sample)
    # The next number above 256 is 258: to nearest, nothing would move.
    assert small.double().mean().item() - 256.0 == pytest.approx(4.0, rel=0.01)


def test_terms_that_vary_cost_a_root_of_two_against_rounding_to_nearest_and_no_bias() -> None:
    exact, plain, ours = sums(1.0, 0.5)
    assert relative_error(plain, exact) == pytest.approx(0.014, rel=0.1)
    error = relative_error(ours, exact)
    assert error == pytest.approx(2**0.5 * relative_error(plain, exact), rel=0.1)
    assert abs(((ours.double() - exact).mean() / exact.mean()).item()) < 5 * error / exact.numel() ** 0.5


@pytest.mark.parametrize("count", [3 * CHUNK + 77, 9 * CHUNK])
def test_no_temporary_has_the_size_of_the_sum_and_paper_agrees(count: int) -> None:
    peaks, told = [], []
    for mode, device in (
        (simulate_card(Card("cpu"), told.append), "meta"),
        (contextlib.nullcontext(), "cpu"),
    ):
        with mode, torch.device(device):
            total, term, sample = torch.zeros(count, dtype=torch.bfloat16), torch.ones(count), torch.tensor(3)
            with LiveBytes().ignore(total, term, sample) as live:
                add_rounded_(total, term, 1, 2, sample)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]
    assert 0 < peaks[0] <= 44 * CHUNK
    left: HiddenWork = told[0]
    assert len(told) == 1
    assert left.moved_bytes == pytest.approx((count - CHUNK) * op._MOVED_BYTES, rel=1e-9)


@pytest.mark.parametrize(
    ("total", "term"),
    [
        pytest.param(torch.ones(300), torch.ones(300), id="fp32-total"),
        pytest.param(torch.ones(20, 15, dtype=torch.bfloat16).mT, torch.ones(300), id="strides"),
        pytest.param(torch.ones(300, dtype=torch.bfloat16), torch.ones(299), id="sizes"),
        pytest.param(torch.ones(300, dtype=torch.bfloat16), torch.ones(300, dtype=torch.int64), id="integers"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(total: Tensor, term: Any) -> None:
    with pytest.raises(ShapeError, match="add_rounded_"):
        add(total, term)


def test_an_elements_bits_follow_from_its_number_alone_and_are_even_and_independent() -> None:
    def bits(step: int, first: int = 0, count: int = 512) -> Tensor:
        return draw_bits(name_noise(chain(torch.zeros((), dtype=torch.int64), 1, 2, step)), first, count)

    whole = bits(0, count=5_000)
    assert torch.equal(bits(0, 1_000, 700), whole[1_000:1_700])
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 2**16
    drawn = torch.stack([bits(step) for step in range(4_000)]).double() / 2**16 - 0.5
    even = (1 / 12 / 4_000) ** 0.5  # the error of the mean of so many even draws
    assert float(drawn.mean(0).abs().max()) < 5 * even
    together = (drawn.T @ drawn / 4_000 * 12).fill_diagonal_(0.0)
    assert float(together.abs().max()) < 6 / 4_000**0.5, "no two elements of two blocks follow each other"
    assert float((drawn[1:] * drawn[:-1]).mean(0).abs().max()) * 12 < 6 / 4_000**0.5, "nor one step the other"
    counts = torch.bincount(bits(7, count=2**20) >> 8, minlength=256).double()
    assert float(((counts - 4_096) ** 2 / 4_096).sum()) < 255 + 6 * (2 * 255) ** 0.5
