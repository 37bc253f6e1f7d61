"""Products of scaled 8-bit matrices on every kind of card: near the truth, NaN where a scale is, right on paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import lowvram_kernels.matmul.scaled_matmul as product_of_codes
import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, Tile, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.scaled_matmul import (
    backend_of,
    choose_matmul_tile,
    matmul_tiles,
    multiply_tiles,
    reference,
    rows_of_scale,
    scaled_matmul,
)
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_columns, quantise_rows, quantise_weight
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes

# M, K, N: one number, edges of every tile, K that is no multiple of 16.
SHAPES = [(1, 1, 1), (17, 688, 40), (130, 100, 33), (40, 257, 130)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["1×1×1", "17×688×40", "130×100×33", "40×257×130"])
each_form = pytest.mark.parametrize("form", ["e4m3", "int8"])
each_card = pytest.mark.parametrize("card", list(CARDS))
# What rounding a result once costs: half of the last bit, of numbers that are normal in fp16.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# FP8 tensor cores before Blackwell keep 14 bits of a sum (DeepSeek-AI 2024, section 3.3.2); those after, more.
FP8_SUM = 2.0**-13


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def block_scaled_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Triton's interpreter the instruction that it lacks, as the MX specification defines it."""
    if DEVICE == "cuda":
        return
    from triton import language
    from triton.runtime import interpreter

    def values(code: Tensor, scale: Tensor) -> Tensor:
        factor = torch.where(scale == 255, torch.nan, torch.exp2(scale.float() - 127.0))
        return code.view(torch.float8_e4m3fn).float() * factor.repeat_interleave(32, 1)

    def dot_scaled(a, a_scale, a_form, b, b_scale, b_form, acc):
        assert a_form == b_form == "e4m3"
        left, left_scale, right, right_scale = (
            torch.from_numpy(part.handle.data.view("uint8").copy()) for part in (a, a_scale, b, b_scale)
        )
        product = values(left, left_scale) @ values(right.mT.contiguous(), right_scale).mT
        return language.tensor(interpreter.TensorHandle(product.numpy() + acc.handle.data, language.float32), acc.type)

    monkeypatch.setattr(language, "dot_scaled", dot_scaled)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers about 1 of another size in each block of 128 rows and columns, so that neighbours have unequal scales."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    rows, columns = (torch.arange(size) // 128 % 3 for size in shape)
    return x * torch.exp2(rows[:, None] * 2.0 + columns * 3.0 - 4.0)


def operands(shape: tuple[int, int, int], form: str, b_is_weight: bool = True) -> tuple[QuantTensor, QuantTensor]:
    rows, summed, columns = shape
    quantise = quantise_weight if b_is_weight else quantise_rows
    return quantise_rows(random(rows, summed), form), quantise(random(columns, summed, seed=1), form)


def to_device(scaled: QuantTensor, device: str) -> QuantTensor:
    return QuantTensor(*(part.to(device) for part in scaled))


def assert_near(y: Tensor, a: QuantTensor, b: QuantTensor, fp8_sum: float = 0.0) -> None:
    """Hold y against fp64 of the decoded operands.

    Sums of K terms in fp32 err by some √K roundings of the terms' sizes where errors have random signs (Higham and
    Mary 2019, "A new approach to probabilistic rounding error analysis"), and the result is rounded once.
    """
    a_MK, b_NK = (dequantise(QuantTensor(*(part.cpu() for part in s)), torch.float32).double() for s in (a, b))
    truth, sizes = a_MK @ b_NK.mT, a_MK.abs() @ b_NK.abs().mT
    sum_rounding = 2.0**-24 * math.sqrt(a_MK.shape[1]) + (fp8_sum if DEVICE == "cuda" else 0.0)
    bound = sum_rounding * sizes.norm() + ROUNDING[y.dtype] * truth.norm()
    assert float((y.cpu().double() - truth).norm()) <= float(bound)


def multiply_on(card: str, a: QuantTensor, b: QuantTensor, dtype: torch.dtype, has_fp32_scales: bool = False) -> Tensor:
    if card == "cpu":
        return scaled_matmul(a, b, dtype, has_fp32_scales)
    with running_on(card) as device:
        return scaled_matmul(to_device(a, device), to_device(b, device), dtype, has_fp32_scales)


@each_card
@each_form
@each_shape
@pytest.mark.parametrize("b_is_weight", [True, False], ids=["weight", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_card_multiplies_what_the_codes_stand_for(
    card: str, form: str, shape: tuple[int, int, int], b_is_weight: bool, dtype: torch.dtype
) -> None:
    a, b = operands(shape, form, b_is_weight)
    assert_near(multiply_on(card, a, b, dtype), a, b, FP8_SUM)


@each_form
@each_shape
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_a_processor_multiplies_what_the_codes_stand_for(
    form: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    a, b = operands(shape, form)
    assert_near(scaled_matmul(a, b, dtype), a, b)
    assert_near(reference(a, b, dtype), a, b)


FORCED = [
    pytest.param(card, form, tile, id=f"{card}-{form}-{tile.rows}×{tile.columns}")
    for card, form in [("sm86", "e4m3"), ("sm89", "e4m3"), ("sm90", "e4m3"), ("sm120", "e4m3"), ("sm86", "int8")]
    for tile in matmul_tiles(CARDS[card], backend_of(torch.uint8 if form == "e4m3" else torch.int8, CARDS[card]))
]


@pytest.mark.parametrize("card, form, tile", FORCED)
def test_every_tile_gives_the_same_product(card: str, form: str, tile: Tile) -> None:
    a, b = operands((140, 300, 150), form)
    with running_on(card) as device:
        backend = backend_of(a.code.dtype, CARDS[card])
        y = multiply_tiles(to_device(a, device), to_device(b, device), torch.float32, backend, tile)
    assert_near(y, a, b, FP8_SUM)


@each_form
def test_rows_of_odd_lengths_are_padded_in_copies(form: str) -> None:
    card = CARDS["sm89"]
    a, b = (QuantTensor(*(part.to("meta") for part in each)) for each in operands((64, 100, 32), form))
    with simulate_card(card), LiveBytes() as live:
        scaled_matmul(a, b, torch.float16)
    assert live.peak == 64 * 32 * 2 + (64 + 32) * 112


def test_many_tiles_are_all_computed_once() -> None:
    a, b = operands((650, 16, 200), "int8")  # 11 tiles of rows: one whole group of 8 and a part of one
    with running_on("sm86") as device:
        y = multiply_tiles(to_device(a, device), to_device(b, device), torch.float32, "int8", Tile(64, 64, 32, 4, 3))
    assert_near(y, a, b)


@each_card
def test_a_weights_gradient_is_the_product_of_columns(card: str) -> None:
    dy, x = random(50, 30), random(50, 140, seed=1)
    a, b = quantise_columns(dy, "e4m3"), quantise_columns(x, "e4m3")
    dw = multiply_on(card, a, b, torch.float32)
    assert_near(dw, a, b, FP8_SUM)
    # Two codes of three bits err by 2⁻⁴ of each product at most, with random signs by less.
    truth = dy.double().mT @ x.double()
    assert float((dw.cpu().double() - truth).norm() / truth.norm()) < 2.0**-4


@each_card
def test_both_operands_may_have_square_blocks(card: str) -> None:
    a, b = quantise_weight(random(140, 260), "e4m3"), quantise_weight(random(33, 260, seed=1), "e4m3")
    assert_near(multiply_on(card, a, b, torch.float32), a, b, FP8_SUM)


@pytest.mark.parametrize("card", [*CARDS, "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_that_are_no_powers_of_two_are_taken_where_it_is_said(card: str, dtype: torch.dtype) -> None:
    a, b = operands((20, 200, 30), "e4m3")
    a, b = QuantTensor(a.code, a.scale * 1.37), QuantTensor(b.code, b.scale * 0.77)
    y = multiply_on(card, a, b, dtype, True)
    # Before capability 8.0 each operand is rounded to fp16 once.
    if card == "sm75":
        assert_nearly(y, a, b, 2 * 2.0**-11 + ROUNDING[dtype])
    else:
        assert_near(y, a, b, FP8_SUM)


def assert_nearly(y: Tensor, a: QuantTensor, b: QuantTensor, tolerance: float) -> None:
    truth = dequantise(a, torch.float32).double() @ dequantise(b, torch.float32).double().mT
    assert float((y.cpu().double() - truth).norm() / truth.norm()) < tolerance


def test_a_processor_in_bf16_takes_any_scale_too() -> None:
    a, b = operands((20, 200, 30), "e4m3")
    a, b = QuantTensor(a.code, a.scale * 1.37), QuantTensor(b.code, b.scale * 0.77)
    assert_near(scaled_matmul(a, b, torch.bfloat16, has_fp32_scales=True), a, b)


@pytest.mark.parametrize("card", [*CARDS, "cpu"])
def test_int8_sums_are_exact(card: str) -> None:
    # 1,500 products of 127 · 127 pass 2²⁴, where fp32 no longer has every whole number, and what 16 bits hold.
    code = torch.full((3, 1500), 127, dtype=torch.int8)
    code[1] = -127
    code[2, ::2] = -126
    a = QuantTensor(code, torch.ones(3, 1))
    y = multiply_on(card, a, a, torch.float32)
    exact = code.long() @ code.long().mT
    # Kernels and VNNI add whole numbers and round once; cuBLAS in fp16 adds in fp32.
    tolerance = 2.0**-24 * math.sqrt(1500) if card in ("sm75", "cpu") else 2.0**-24
    assert ((y.cpu().double() - exact).abs() <= tolerance * 127.0 * 127.0 * 1500).all()


@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("limit", [2**31 - 1, 2**15 - 1], ids=["32 bits", "16 bits"])
def test_a_processor_multiplies_int8_only_where_its_sums_are_whole(
    monkeypatch: pytest.MonkeyPatch, has_vnni: bool, limit: int
) -> None:
    """oneDNN adds in 16 bits, which saturate, without VNNI and where its variable forbids VNNI."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        return (a.int() @ b.int()).clamp(max=limit)

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    monkeypatch.setattr(torch, "_int_mm", multiply)
    assert product_of_codes._sums_int8_exactly() == (has_vnni and limit == 2**31 - 1)


@pytest.mark.parametrize("form", ["e4m3", "int8"])
@pytest.mark.parametrize("card", [*CARDS, "cpu"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_comes_out_as_nan(card: str, form: str, bad: float) -> None:
    x, w = random(5, 300), random(140, 300, seed=1)
    x[2, 290] = bad
    w[135, 10] = bad
    a, b = quantise_rows(x, form), quantise_weight(w, form)
    y = multiply_on(card, a, b, torch.float32)
    is_bad = torch.zeros(5, 140, dtype=torch.bool)
    is_bad[2] = True
    is_bad[:, slice(128, 140) if form == "e4m3" else 135] = True
    assert torch.equal(y.cpu().isnan(), is_bad)


@each_card
def test_scales_far_apart_are_multiplied(card: str) -> None:
    a, b = operands((9, 512, 7), "e4m3")
    # In fp16 2⁴⁰ would be infinite; what sm75's units of rows leave out of fp16 is 2⁻²⁰ of the rest and less.
    a = QuantTensor(a.code, a.scale * torch.tensor([[2.0**40, 2.0**30, 2.0**5, 1.0]]))
    b = QuantTensor(b.code, b.scale * torch.tensor([[2.0**-30, 2.0**-22, 2.0**-30, 2.0**-40]]))
    assert_nearly(multiply_on(card, a, b, torch.float32), a, b, 2.0**-18 + (FP8_SUM if DEVICE == "cuda" else 0.0))


@pytest.mark.parametrize("card", [*CARDS, "cpu"])
def test_a_scale_of_nan_is_enough(card: str) -> None:
    a, b = operands((4, 300, 5), "e4m3")
    a.scale[3, 1] = torch.nan
    y = multiply_on(card, a, b, torch.float32)
    assert y[3].isnan().all()
    assert y[:3].isfinite().all()


@pytest.mark.parametrize("card", [*CARDS, "cpu"])
@each_form
def test_no_rows_make_no_launch(card: str, form: str) -> None:
    a, b = operands((3, 130, 5), form)
    none = QuantTensor(a.code[:0], a.scale[:0])
    assert multiply_on(card, none, b, torch.float16).shape == (0, 5)
    assert multiply_on(card, b, none, torch.float16).shape == (5, 0)


@pytest.mark.parametrize("card", [*CARDS, "cpu"])
def test_scales_may_lie_turned_in_memory(card: str) -> None:
    a, b = operands((5, 300, 200), "e4m3")
    turned = QuantTensor(b.code, b.scale.mT.contiguous().mT)
    assert not turned.scale.is_contiguous()
    assert torch.equal(multiply_on(card, a, turned, torch.float32), multiply_on(card, a, b, torch.float32))


def rehearse(
    card: Card, has_fp32_scales: bool = False, form: str = "e4m3"
) -> tuple[list[Launch], list[HiddenWork], int]:
    launches: list[Launch] = []
    works: list[HiddenWork] = []
    a, b = (to_device(each, "meta") for each in operands((256, 384, 128), form))
    with simulate_card(card, note=works.append, note_launch=launches.append), LiveBytes().ignore(*a, *b) as live:
        y = scaled_matmul(a, b, torch.bfloat16, has_fp32_scales)
    assert y.shape == (256, 128)
    return launches, works, live.peak


@pytest.mark.parametrize(
    "card, form, has_fp32_scales, kernel, expected_mma",
    [
        ("sm86", "e4m3", False, "e4m3_kernel", "f16"),
        ("sm89", "e4m3", False, "e4m3_kernel", "e4m3"),
        ("sm90", "e4m3", True, "e4m3_kernel", "e4m3"),
        ("sm120", "e4m3", False, "mxfp8_kernel", "mxf8"),
        ("sm120", "e4m3", True, "e4m3_kernel", "e4m3"),
        ("sm120", "int8", False, "int8_kernel", "s8"),
    ],
)
def test_on_paper_a_card_launches_its_own_kernel_and_holds_y_alone(
    card: str, form: str, has_fp32_scales: bool, kernel: str, expected_mma: str
) -> None:
    launches, works, peak = rehearse(CARDS[card], has_fp32_scales, form)
    assert [(what.kernel, what.expected_mma) for what in launches] == [(kernel, expected_mma)]
    flops = 2.0 * 256 * 384 * 128
    assert [work.low_flops + work.product_flops for work in works] == [flops]
    assert works[0].moved_bytes > 256 * 384 + 384 * 128 + 256 * 128 * 2
    assert peak == 256 * 128 * 2


def test_on_paper_the_oldest_card_holds_both_operands_in_fp16() -> None:
    launches, _, peak = rehearse(CARDS["sm75"])
    assert [what.kernel for what in launches] == ["dequantise_kernel"] * 2
    assert peak >= 2 * (256 * 384 + 384 * 128) + 4 * 256 * 128


def test_an_a100_decodes_e4m3_in_registers_and_has_163_kib_of_shared_memory() -> None:
    card = CARDS["sm80"]
    assert backend_of(torch.uint8, card) == "storage"
    assert backend_of(torch.int8, card) == "int8"
    assert card.shared_bytes == 163 * 1024
    assert matmul_tiles(card, "storage") == matmul_tiles(CARDS["sm86"], "storage")
    assert set(matmul_tiles(CARDS["sm86"], "int8")) <= set(matmul_tiles(card, "int8"))


def test_tiles_fit_the_shared_memory_and_grow_with_the_work() -> None:
    card = CARDS["sm86"]
    assert [tile.rows * tile.columns for tile in matmul_tiles(card, "storage")] == [128 * 128, 128 * 64, 64 * 64]
    assert matmul_tiles(card._replace(capability=(7, 5)), "storage")[0].stages * 256 * 132 > 65_536
    assert choose_matmul_tile(card, "storage", 8192, 1024) == matmul_tiles(card, "storage")[0]
    assert choose_matmul_tile(card, "storage", 100, 1024) == matmul_tiles(card, "storage")[-1]
    assert choose_matmul_tile(card._replace(multiprocessors=400), "int8", 2048, 2048) == matmul_tiles(card, "int8")[1]


@pytest.mark.parametrize("card", ["sm86", "sm75", None])
@each_form
def test_a_compiled_graph_holds_the_product_whole(card: str | None, form: str) -> None:
    a, b = operands((5, 140, 7), form)

    def multiply(*parts: Tensor) -> Tensor:
        return scaled_matmul(QuantTensor(*parts[:2]), QuantTensor(*parts[2:]), torch.float32) * 2.0

    compiled = torch.compile(multiply, backend="aot_eager", fullgraph=True)
    where: Callable[[], AbstractContextManager[object]] = (
        (lambda: running_on(card)) if card is not None else torch.inference_mode
    )
    with where():
        parts = [part.to(DEVICE if card else "cpu") for part in (*a, *b)]
        assert torch.equal(compiled(*parts), multiply(*parts))
    torch.compiler.reset()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b: (QuantTensor(a.code.mT, a.scale), b), r"a: code is \[200, 4\] torch.uint8, strides"),
        (lambda a, b: (QuantTensor(a.code.float(), a.scale), b), r"torch.float32.*needs \[N, K\] uint8 or int8"),
        (lambda a, b: (QuantTensor(a.code[0], a.scale), b), r"code is \[200\]"),
        (
            lambda a, b: (a, QuantTensor(b.code, b.scale[:, :1])),
            r"b: scale is \[1, 1\].*needs \[1, 2\] or \[30, 2\], fp32",
        ),
        (lambda a, b: (a, QuantTensor(b.code, b.scale.double())), r"torch.float64"),
        (lambda a, b: (QuantTensor(a.code[:, :128].contiguous(), a.scale[:, :1]), b), r"need one K, dtype and device"),
        (lambda a, b: (QuantTensor(a.code.view(torch.int8), a.scale[:, :1]), b), r"need one K, dtype and device"),
        (lambda a, b: (a, to_device(b, "meta")), r"need one K, dtype and device"),
        (lambda a, b: (QuantTensor(a.code[:, :0], a.scale[:, :0]), b), r"K ≥ 1"),
    ],
)
def test_what_does_not_fit_together_is_named(
    change: Callable[[QuantTensor, QuantTensor], tuple[QuantTensor, QuantTensor]], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        scaled_matmul(*change(*operands((4, 200, 30), "e4m3")), torch.float32)


def test_a_wrong_dtype_and_too_long_a_sum_are_named() -> None:
    a, b = operands((4, 200, 30), "e4m3")
    with pytest.raises(ShapeError, match=r"dtype is torch.float64; needs bf16, fp16 or fp32"):
        scaled_matmul(a, b, torch.float64)
    long = QuantTensor(torch.zeros(1, 133_145, dtype=torch.int8), torch.ones(1, 1))
    with pytest.raises(ShapeError, match=r"K is 133145; int32 holds INT8 sums over 133144"):
        scaled_matmul(long, long, torch.float32)


def test_rows_of_a_scale_are_told_by_its_shape() -> None:
    a, b = operands((140, 300, 150), "e4m3")
    assert (rows_of_scale(a, "a"), rows_of_scale(b, "b")) == (1, 128)
    assert rows_of_scale(quantise_weight(random(140, 300), "int8"), "w") == 1
