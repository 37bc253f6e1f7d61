"""Numbers in 8 bits with scales: the formulas, both backends bit for bit, edges, and what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.quant import quantise
from lowvram_kernels.quant.quantise import (
    FORMATS,
    QuantTensor,
    dequantise,
    quantise_columns,
    quantise_rows,
    quantise_weight,
    quantise_weight_both,
    reference,
)
from torch import Tensor

from tests.kernels.cards import DEVICE, running_on

SHAPES = [(1, 1), (17, 100), (130, 300), (33, 688), (3, 1376), (300, 5)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_form = pytest.mark.parametrize("form", FORMATS)
WAYS: dict[str, Callable[[Tensor, str], QuantTensor]] = {
    "rows": quantise_rows,
    "columns": quantise_columns,
    "weight": quantise_weight,
    "turned weight": lambda w, form: quantise_weight(w, form, transposed=True),
    "both": lambda w, form: quantise_weight_both(w, form)[0],
    "turned of both": lambda w, form: quantise_weight_both(w, form)[1],
    "rows, fp32 scales": lambda x, form: quantise_rows(x, form, fp32_scales=form == "e4m3"),
    "weight, fp32 scales": lambda w, form: quantise_weight(w, form, fp32_scales=form == "e4m3"),
}
each_way = pytest.mark.parametrize("way", list(WAYS))


@pytest.fixture(autouse=True)
def filled_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers: nothing unwritten can look right."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 3) -> Tensor:
    """Rows and columns of very different magnitudes, some zeros, a row of zeros, numbers on ties."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape[-1], generator=generator) * 3)
    x *= torch.exp2(torch.randint(-6, 5, (*shape[:-1], 1), generator=generator))
    x[torch.rand(shape, generator=generator) < 0.1] = 0.0
    x[..., shape[-2] // 2, :] = 0.0 if shape[-2] > 2 else 1.0625
    return x.to(dtype)


def on_card(run: Callable[[Tensor], QuantTensor], x: Tensor, card: str = "sm86") -> QuantTensor:
    with running_on(card):
        return QuantTensor(*(part.cpu() for part in run(x.to(DEVICE))))


def assert_same(found: QuantTensor, expected: QuantTensor) -> None:
    assert found.code.dtype == expected.code.dtype
    assert torch.equal(found.code, expected.code)
    assert torch.equal(found.scale, expected.scale)
    assert found.code.is_contiguous()
    assert found.scale.is_contiguous()


@each_form
@each_shape
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=["rows", "weight"])
def test_numbers_come_back_as_the_formula_has_them(shape: tuple[int, int], form: str, block: tuple[int, int]) -> None:
    x = numbers(shape)
    scaled = quantise_rows(x, form) if block == (1, 128) else quantise_weight(x, form)
    found = dequantise(scaled, torch.float32).double()
    if form == "e4m3":
        assert torch.equal(found, reference(x, form, block))  # powers of two and short numbers: exact
    else:
        # A scale rounded to fp32 moves the largest code by one rounding.
        assert ((found - reference(x, form)).abs() <= 2.0**-23 * x.abs().amax(1, keepdim=True)).all()


@each_shape
def test_a_round_trip_errs_by_no_more_than_promised(shape: tuple[int, int]) -> None:
    x = numbers(shape)
    absmax = x.abs().amax(1, keepdim=True)
    error = (dequantise(quantise_rows(x, "int8"), torch.float32) - x).abs()
    assert (error <= absmax / 254 * (1 + 2.0**-20)).all()  # of fp32's own roundings
    scaled = quantise_rows(x, "e4m3")
    scale = scaled.scale.repeat_interleave(128, 1)[:, : shape[1]]
    error = (dequantise(scaled, torch.float32) - x).abs()
    assert (error <= torch.where(x.abs() < 2.0**-6 * scale, 2.0**-10 * scale, 2.0**-4 * x.abs())).all()


@each_form
@each_way
@each_shape
def test_the_kernels_and_plain_pytorch_agree_bit_for_bit(shape: tuple[int, int], way: str, form: str) -> None:
    x = numbers(shape)
    assert_same(on_card(lambda x: WAYS[way](x, form), x), WAYS[way](x, form))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_form
@each_way
def test_they_agree_on_16_bit_numbers_too(way: str, form: str, dtype: torch.dtype) -> None:
    x = numbers((130, 200), dtype)
    assert_same(on_card(lambda x: WAYS[way](x, form), x), WAYS[way](x, form))


@each_form
def test_they_agree_on_rows_and_columns_that_many_programs_share(form: str) -> None:
    x = numbers((2, 8200))
    assert_same(on_card(lambda x: quantise_rows(x, form), x), quantise_rows(x, form))
    assert_same(on_card(lambda x: quantise_columns(x, form), x.T), quantise_columns(x.T, form))
    tall = numbers((1100, 3))
    assert_same(on_card(lambda x: quantise_columns(x, form), tall), quantise_columns(tall, form))


@each_way
@each_form
def test_bits_are_the_same_on_mps_and_where_there_is_no_triton(form: str, way: str) -> None:
    x = numbers((130, 300), torch.bfloat16)
    expected = WAYS[way](x, form)
    for card in (Card("mps"), Card("cuda", (8, 6), has_triton=False)):
        with override_card(card):
            found = WAYS[way](x, form)
            assert torch.equal(dequantise(found, torch.float32), dequantise(expected, torch.float32))
        assert_same(found, expected)


@each_way
@each_form
def test_strides_do_not_matter(form: str, way: str) -> None:
    wide = numbers((40, 300), torch.float16)
    for view in (wide.T, wide[::3, ::2], wide[:, 7:140].T, wide[:1].expand(9, -1)):
        expected = WAYS[way](view.contiguous(), form)
        assert_same(WAYS[way](view, form), expected)
        assert_same(on_card(lambda x: WAYS[way](x, form), view), expected)


@each_form
@pytest.mark.parametrize("is_turned", [False, True], ids=["rows", "columns"])
def test_every_tile_gives_the_same_bits(form: str, is_turned: bool) -> None:
    x = numbers((70, 700), torch.float16)
    expected = quantise_columns(x, form) if is_turned else quantise_rows(x, form)
    for tile in quantise.quantise_tiles(form, is_turned):
        if tile.depth == tile.columns and form == "int8" and tile.columns < 700:
            continue  # a program holds whole rows
        view = (lambda x: x.mT) if is_turned else (lambda x: x)
        found = on_card(lambda x, view=view, tile=tile: quantise._quantise_rows(view(x), form, False, tile), x)
        assert_same(found, expected)


def test_each_width_gets_a_tile_that_holds_it() -> None:
    for most, is_transposed in ((8192, False), (2048, True)):
        for width in (1, 100, 640, 1024, 1025, 1376, 2048, 4096, 8192):
            tile = quantise.choose_quantise_tile("int8", width, is_transposed)
            assert (tile.depth == tile.columns) == (width <= most)
            assert tile.columns >= min(width, 512)
            assert tile.columns >= width or width > most
        assert quantise.choose_quantise_tile("int8", most + 1, is_transposed) in quantise._INT8_SLICES
    assert quantise.choose_quantise_tile("e4m3", 100, False).columns == 128
    assert quantise.choose_quantise_tile("e4m3", 640, False).columns == 512


@each_form
@each_shape
def test_columns_are_the_rows_of_the_transposed(shape: tuple[int, int], form: str) -> None:
    x = numbers(shape)
    assert_same(quantise_columns(x, form), quantise_rows(x.T.contiguous(), form))


@each_shape
def test_a_turned_weight_holds_the_same_numbers(shape: tuple[int, int]) -> None:
    w = numbers(shape)
    plain, turned = quantise_weight(w, "e4m3"), quantise_weight(w, "e4m3", transposed=True)
    assert_same(turned, QuantTensor(plain.code.T.contiguous(), plain.scale.T.contiguous()))
    assert [list(part.shape) for part in turned] == [[shape[1], shape[0]], [-(-shape[1] // 128), -(-shape[0] // 128)]]
    assert_same(quantise_weight(w, "int8", transposed=True), quantise_rows(w.T.contiguous(), "int8"))


@pytest.mark.parametrize("way", [way for way in WAYS if not way.startswith(("rows", "columns"))])
@each_form
def test_a_stack_is_each_of_its_matrices(form: str, way: str) -> None:
    stack = numbers((2, 130, 40), torch.float16)
    each = [WAYS[way](matrix, form) for matrix in stack]
    expected = QuantTensor(*(torch.stack(parts) for parts in zip(*each, strict=True)))
    for view in (stack, stack.mT.contiguous().mT):
        assert_same(WAYS[way](view, form), expected)
        assert_same(on_card(lambda w: WAYS[way](w, form), view), expected)
    whole = torch.stack([dequantise(part, torch.float32) for part in each])
    assert torch.equal(dequantise(expected, torch.float32), whole)
    with running_on("sm86"):
        assert torch.equal(dequantise(QuantTensor(*(part.to(DEVICE) for part in expected)), torch.float32).cpu(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_form
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf], ids=str)
@pytest.mark.parametrize("is_on_card", [False, True], ids=["plain", "triton"])
def test_what_is_not_finite_spoils_its_block_and_no_other(
    bad: float, form: str, dtype: torch.dtype, is_on_card: bool
) -> None:
    x = numbers((140, 260), dtype)
    x[3, 130] = bad
    spoilt = {way: torch.zeros(140, 260, dtype=torch.bool) for way in ("rows", "columns", "weight")}
    spoilt["rows"][3, 128:256] = True
    spoilt["columns"][:128, 130] = True
    spoilt["weight"][:128, 128:256] = True
    if form == "int8":
        spoilt["rows"][3], spoilt["columns"][:, 130] = True, True
        spoilt["weight"] = spoilt["rows"]
    for way, expected in spoilt.items():
        scaled = on_card(lambda x, way=way: WAYS[way](x, form), x) if is_on_card else WAYS[way](x, form)
        with running_on("sm86"):
            found = dequantise(QuantTensor(*(part.to(DEVICE) for part in scaled)), torch.float32).cpu()
        assert torch.equal(dequantise(scaled, torch.float32).isnan(), found.isnan())
        assert torch.equal(found.isnan(), expected.T if way == "columns" else expected)


def test_a_scale_is_the_least_power_of_two_that_covers() -> None:
    exponents = torch.tensor([-117, -6, 0, 9, 118])
    full = 448.0 * torch.exp2(exponents.float())[:, None]
    for x, more in ((full, 0), (torch.nextafter(full, 2 * full), 1)):
        expected = torch.exp2(exponents.float() + more)[:, None]
        assert torch.equal(quantise_rows(x, "e4m3").scale, expected)
        assert torch.equal(on_card(lambda x: quantise_rows(x, "e4m3"), x).scale, expected)


@pytest.mark.parametrize("is_on_card", [False, True], ids=["plain", "triton"])
def test_numbers_at_the_ends_of_fp32_keep_their_scales_normal(is_on_card: bool) -> None:
    tiny = torch.tensor([[2.0**-149, -(2.0**-130), 0.0], [0.0, 0.0, -0.0], [3.4e38, 1.0, -3.4e38]])
    scaled = on_card(lambda x: quantise_rows(x, "e4m3"), tiny) if is_on_card else quantise_rows(tiny, "e4m3")
    assert scaled.scale.flatten().tolist() == [2.0**-126, 2.0**-126, 2.0**120]
    assert torch.equal(dequantise(scaled, torch.float32)[:2], torch.tensor([[0.0, -(2.0**-130), 0.0], [0.0, 0.0, 0.0]]))
    for form, options in (("int8", {}), ("e4m3", {"fp32_scales": True})):
        run = lambda x, form=form, options=options: quantise_rows(x, form, **options)  # noqa: E731
        scaled = on_card(run, tiny) if is_on_card else run(tiny)
        assert (scaled.scale >= torch.finfo(torch.float32).tiny).all()
        assert (dequantise(scaled, torch.float32)[1] == 0).all()


def test_fp32_scales_use_all_of_e4m3s_range() -> None:
    x = numbers((40, 256))
    scaled = quantise_rows(x, "e4m3", fp32_scales=True)
    absmax = x.view(40, 2, 128).abs().amax(2)
    assert torch.equal(scaled.scale, (absmax.double() / 448).float().clamp_min(2.0**-126))
    largest = (scaled.code.view(40, 2, 128) & 0x7F).amax(2)
    assert torch.equal(largest, torch.where(absmax > 0, 0x7E, 0).to(torch.uint8))


def test_int8_takes_ties_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]])
    for scaled in (quantise_rows(x, "int8"), on_card(lambda x: quantise_rows(x, "int8"), x)):
        # 127 · fp32(1/127) is 1 exactly, so ties are ties.
        assert scaled.scale.tolist() == [[1.0]]
        assert scaled.code.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@each_shape
def test_dequantising_rounds_the_product_once(shape: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    for scaled in (quantise_rows(numbers(shape), form), quantise_weight(numbers(shape), form)):
        code = scaled.code.view(torch.float8_e4m3fn) if form == "e4m3" else scaled.code
        scale = scaled.scale.repeat_interleave(-(-shape[0] // scaled.scale.shape[0]) if form == "int8" else 1, 0)
        if form == "e4m3":
            rows = torch.arange(shape[0]) // (1 if scale.shape[0] == shape[0] else 128)
            scale = scale[rows][:, torch.arange(shape[1]) // 128]
        expected = (code.float() * scale).to(dtype)
        assert torch.equal(dequantise(scaled, dtype), expected)
        with running_on("sm75"):
            found = dequantise(QuantTensor(*(part.to(DEVICE) for part in scaled)), dtype).cpu()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("is_on_card", [False, True], ids=["plain", "triton"])
def test_bytes_that_are_nan_decode_to_nan(is_on_card: bool) -> None:
    code = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scaled = QuantTensor(code, torch.tensor([[2.0], [0.5]]))
    expected = code.view(torch.float8_e4m3fn).float() * scaled.scale
    if is_on_card:
        with running_on("sm86"):
            found = dequantise(QuantTensor(*(part.to(DEVICE) for part in scaled)), torch.float32).cpu()
    else:
        found = dequantise(scaled, torch.float32)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
