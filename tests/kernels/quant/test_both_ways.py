"""A matrix rounded along its rows and along its columns at once has the bits of two calls, for one read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.quant.both_ways import quantise_beside, quantise_both_ways, quantise_weight_both_, reference
from lowvram_kernels.quant.quantise import FORMATS, QuantTensor, dequantise, quantise_rows, quantise_weight_both
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on, unwritten
from tests.kernels.quant.test_quantise import assert_same, numbers

each_form = pytest.mark.parametrize("form", FORMATS)
each_shape = pytest.mark.parametrize("shape", [(1, 1), (17, 100), (130, 300), (300, 5), (257, 688)], ids=str)


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_card(x: Tensor, form: str) -> list[QuantTensor]:
    with running_on("sm86"):
        return [QuantTensor(*(part.cpu() for part in each)) for each in quantise_both_ways(x.to(DEVICE), form)]


@each_form
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_both_backends_give_the_bits_of_two_calls(shape: tuple[int, int], form: str, dtype: torch.dtype) -> None:
    x = numbers(shape, dtype)
    for found, plain, expected in zip(
        on_card(x, form), quantise_both_ways(x, form), reference(x.clone(), form), strict=True
    ):
        assert_same(found, expected)
        assert_same(plain, expected)


@each_form
def test_strides_do_not_matter(form: str) -> None:
    wide = numbers((40, 300), torch.float16)
    for view in (wide.T, wide[::3, ::2], wide[:, 7:140].T, wide[:1].expand(9, -1)):
        for found, expected in zip(on_card(view, form), reference(view.contiguous(), form), strict=True):
            assert_same(found, expected)


@each_form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_spoils_what_shares_its_scale_and_no_more(form: str, bad: float) -> None:
    x = numbers((140, 260))
    x[3, 130] = bad
    for found, expected in zip(on_card(x, form), reference(x, form), strict=True):
        spoilt = dequantise(expected, torch.float32).isnan()
        assert torch.equal(dequantise(found, torch.float32).isnan(), spoilt)
        assert spoilt.any()


def test_int8_codes_stay_within_127_whatever_the_reciprocal_is_rounded_to() -> None:
    # The largest number of a row times the rounded reciprocal of its rounded 127th, for many mantissas and exponents.
    mantissa = 1.0 + torch.arange(2**12) / 2**12
    for exponent in (-149, -126, -60, 0, 60, 127):
        largest = (mantissa.double() * 2.0**exponent).clamp(max=3.4028234e38).float()[:, None]
        x = torch.cat([largest, -largest, largest / 2], 1)
        code = quantise_rows(x, "int8").code
        assert code.abs().max() <= 127
        assert code.min() >= -127
        if exponent >= -100:
            assert (code[:, 0] == 127).all()
            assert (code[:, 1] == -127).all()
        with running_on("sm86"):
            assert torch.equal(quantise_rows(x[::16].to(DEVICE), "int8").code.cpu(), code[::16])


@pytest.mark.parametrize("card", ["sm86", "cpu"])
def test_matrices_beside_each_other_are_one_in_rows_and_apart_in_columns(card: str) -> None:
    xs = [numbers((130, width), torch.float16, seed=width) for width in (256, 128, 40)]
    if card == "cpu":
        rows, columns = quantise_beside(xs)
    else:
        with running_on(card):
            rows, columns = quantise_beside([x.to(DEVICE) for x in xs])
    assert_same(QuantTensor(*(part.cpu() for part in rows)), quantise_rows(torch.cat(xs, 1), "e4m3"))
    for found, x in zip(columns, xs, strict=True):
        assert_same(QuantTensor(*(part.cpu() for part in found)), reference(x, "e4m3")[1])
    with pytest.raises(ShapeError, match="whole blocks of 128"):
        quantise_beside([xs[2], xs[0]])


@each_form
@pytest.mark.parametrize("shape", [(130, 300), (2, 70, 140)], ids=["matrix", "stack"])
@pytest.mark.parametrize("card", ["sm86", "cpu"])
def test_a_weight_is_rounded_into_memory_that_exists(shape: tuple[int, ...], form: str, card: str) -> None:
    w = numbers(shape)
    expected = quantise_weight_both(w, form)
    made = [QuantTensor(*(unwritten(*part.shape, dtype=part.dtype) for part in each)) for each in expected]
    if card == "cpu":
        quantise_weight_both_(w, form, *made)
    else:
        with running_on(card):
            quantise_weight_both_(w.to(DEVICE), form, *made)
    for found, truth in zip(made, expected, strict=True):
        assert_same(QuantTensor(*(part.cpu() for part in found)), truth)


@each_form
def test_on_a_card_x_is_read_once_or_for_int8_twice(form: str) -> None:
    works: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append):
        x = torch.empty(512, 1024, dtype=torch.bfloat16)
        made = [part.nbytes for each in quantise_both_ways(x, form) for part in each]
    partial = 0 if form == "e4m3" else 2 * 4 * (512 * 8 + 1024 * 4)
    assert len(works) == (1 if form == "e4m3" else 2)
    assert sum(work.moved_bytes for work in works) == len(works) * x.nbytes + sum(made) + partial


@pytest.mark.parametrize(
    "x", [torch.ones(3), torch.ones(0, 4), torch.ones(2, 2, dtype=torch.int32)], ids=["1d", "empty", "integers"]
)
def test_what_is_no_matrix_of_numbers_is_refused(x: Tensor) -> None:
    with pytest.raises(ShapeError, match="quantise_both_ways: got"):
        quantise_both_ways(x, "e4m3")
