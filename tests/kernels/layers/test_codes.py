"""Norm and SwiGLU that write codes write those of two launches, bit for bit, for fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, simulate_card
from lowvram_kernels.layers import codes, rms_norm, swiglu
from lowvram_kernels.quant.both_ways import quantise_both_ways
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_columns, quantise_rows
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes

EPS = 1e-6
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
each_form = pytest.mark.parametrize("form", ["e4m3", "int8"])
each_width = pytest.mark.parametrize("width", [1, 64, 100, 768, 1100])


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Numbers whose blocks of 128 have unlike sizes, so that a scale of a neighbour would be seen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 2.0
    return (x * torch.exp2((torch.arange(shape[-1]) // 128 % 5).float() - 2.0)).to(dtype).to(DEVICE)


def assert_same(found: QuantTensor, expected: QuantTensor) -> None:
    assert torch.equal(found.code, expected.code)
    assert torch.equal(found.scale, expected.scale)


@each_dtype
@each_form
@each_width
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "of a sum"])
def test_a_norms_codes_are_those_of_its_rows(width: int, form: str, dtype: torch.dtype, adds: bool) -> None:
    x = numbers(2, 5, width, dtype=dtype)
    added, weight = numbers(2, 5, width, dtype=dtype, seed=1) if adds else None, 1.0 + 0.1 * numbers(width, seed=2)
    with running_on("sm86"):
        found = codes.normalise_to_codes(x, weight, EPS, form, added)
        expected = codes.reference(x, weight, EPS, form, added)
        again = codes.normalise_to_codes(x.repeat_interleave(2, 1)[:, ::2], weight, EPS, form, added)
    assert_same(found.operand, expected.operand)
    assert_same(again.operand, expected.operand)
    assert torch.equal(found.rstd_N1, expected.rstd_N1)
    assert torch.equal(found.stream, expected.stream)


@each_dtype
@each_width
def test_a_norms_columns_are_those_of_its_rows(width: int, dtype: torch.dtype) -> None:
    x, weight = numbers(130, width, dtype=dtype), 1.0 + 0.1 * numbers(width, seed=2)
    with running_on("sm86"):
        y, rstd_N1, _ = rms_norm.normalise(x, weight, EPS)
        assert_same(codes.normed_columns(x, weight, rstd_N1), quantise_columns(y, "e4m3"))


@each_dtype
@each_form
@pytest.mark.parametrize("width", [1, 100, 688, 2048])
def test_a_gates_codes_are_those_of_its_product(width: int, form: str, dtype: torch.dtype) -> None:
    gate_up = numbers(7, 2 * width, dtype=dtype)
    with running_on("sm86"):
        assert codes.gates_to_codes(gate_up, form)
        assert_same(codes.gate_to_codes(gate_up, form), quantise_rows(swiglu.gated_product(gate_up), form))


@each_dtype
@pytest.mark.parametrize("rows", [3, 130])
def test_a_gates_gradient_is_rounded_both_ways_as_its_numbers_are(rows: int, dtype: torch.dtype) -> None:
    gate_up, d_product = numbers(rows, 512, dtype=dtype), 1e-3 * numbers(rows, 256, seed=1)
    d_product = d_product.to(dtype)
    with running_on("sm86"):
        found = codes.gate_to_codes_backward(gate_up, d_product)
        d_gate_up, product = swiglu.gated_product_backward(d_product, gate_up)
        expected = *quantise_both_ways(d_gate_up, "e4m3"), quantise_columns(product, "e4m3")
    for own, other in zip(found, expected, strict=True):
        assert_same(own, other)
    for own, other in zip(found, codes.reference_of_gate(gate_up, d_product), strict=True):
        a, b = dequantise(own, torch.float32), dequantise(other, torch.float32)
        # exp differs by a rounding, which moves few numbers to the next of E4M3's.
        assert float((a - b).norm() / b.norm()) < 0.01


@each_form
def test_what_is_not_finite_spoils_its_row_of_codes(form: str) -> None:
    gate_up, x = numbers(4, 512), numbers(4, 256)
    gate_up[1, 300], x[2, 7] = torch.nan, torch.inf
    with running_on("sm86"):
        product = dequantise(codes.gate_to_codes(gate_up, form), torch.float32)
        normed = dequantise(codes.normalise_to_codes(x, torch.ones(256), EPS, form).operand, torch.float32)
    assert product[1].isnan().any()
    assert product[[0, 2, 3]].isfinite().all()
    assert normed[2].isnan().any()
    assert normed[[0, 1, 3]].isfinite().all()


def test_rows_that_no_program_holds_are_gated_to_numbers_first() -> None:
    with torch.device("meta"), simulate_card(CARDS["sm120"]):
        wide = torch.empty(2, 2 * codes.WIDEST_INT8 + 2)
        assert not codes.gates_to_codes(wide, "int8")
        assert codes.gates_to_codes(wide, "e4m3")
        assert not codes.gates_to_codes(wide, "plain")
        assert not codes.norms_to_codes(torch.empty(2, rms_norm.WIDEST + 1), "e4m3")


def test_each_pass_is_one_launch_of_the_least_bytes_and_makes_nothing_but_its_results() -> None:
    works: list[HiddenWork] = []
    N, D, width = 512, 768, 2048
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append):
        x, weight = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(D)
        gate_up, d_product = (torch.empty(N, size, dtype=torch.bfloat16) for size in (2 * width, width))
        with LiveBytes().ignore(x, weight, gate_up, d_product) as live:
            made = codes.normalise_to_codes(x, weight, EPS, "e4m3", x)
            row_bytes = N * (D + 4 * D // 128)
            assert live.peak == row_bytes + 4 * N + x.nbytes
            before = live.now
            columns = codes.normed_columns(x, weight, made.rstd_N1)
            assert live.now - before == D * (N + 4 * N // 128)
            codes.gate_to_codes(gate_up, "e4m3")
            before = live.now
            results = codes.gate_to_codes_backward(gate_up, d_product)
            gate_bytes = sum(part.nbytes for each in results for part in each)
            assert live.now - before == gate_bytes
    column_bytes = sum(part.nbytes for part in columns)
    assert [work.moved_bytes for work in works] == [
        3 * x.nbytes + weight.nbytes + 4 * N + row_bytes,
        x.nbytes + weight.nbytes + 4 * N + column_bytes,
        gate_up.nbytes + N * (width + 4 * width // 128),
        gate_up.nbytes + d_product.nbytes + gate_bytes,
    ]
    assert all(work.ops == 1 for work in works)
