"""Grouped products and outer products of int8: exact, any loads, every tile, NaN where a scale is, paper."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, Tile, choose, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe import grouped_wgrad as outer_module
from lowvram_kernels.moe.grouped_matmul import choose_grouped_tile, grouped_matmul, grouped_tiles
from lowvram_kernels.moe.grouped_wgrad import grouped_wgrad
from lowvram_kernels.quant.quantise import (
    MOST_INT8,
    QuantTensor,
    fill_lines,
    quantise_columns,
    quantise_rows,
    quantise_weight,
)
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on, unwritten
from tests.kernels.measures import LiveBytes, relative_error

# Sums are exact; then come int32 to fp32, two products with scales and the result: four roundings.
TOLERANCE = {torch.float32: 4 * 2.0**-24, torch.float16: 2.0**-11}
LOADS = {
    "uneven": (0, 17, 1, 0, 42),
    "all to the first": (60, 0, 0),
    "all to the last": (0, 0, 60),
    "one row each": (1, 1, 1),
    "no row at all": (0, 0),
}
each_load = pytest.mark.parametrize("loads", list(LOADS.values()), ids=list(LOADS))
NAMES = ("sm86", "sm89", "sm90", "sm120")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill what torch.empty returns with NaN: an element that nobody wrote then shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ends_of(loads: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(accumulate(loads)), device=DEVICE)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Rows of magnitudes from 1/10 to 10: whoever takes another row's scale errs."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-1, 1, shape[-2])[:, None]).to(DEVICE)


def draw_columns(rows: int, width: int, seed: int = 0) -> QuantTensor:
    return quantise_columns(draw(width, rows, seed=seed).T, "int8")


def numbers(scaled: QuantTensor) -> Tensor:
    return scaled.code.double() * scaled.scale.double()


def products(rows: QuantTensor, stack: QuantTensor, ends: Tensor) -> Tensor:
    """The textbook, slice by slice: fp64 [M, N]."""
    x, matrices, starts = numbers(rows), numbers(stack), [0, *ends.tolist()]
    parts = [x[starts[e] : starts[e + 1]] @ matrices[e].T for e in range(len(matrices))]
    return torch.cat([*parts, x.new_zeros(len(x) - starts[-1], matrices.shape[1])])


def sums(left: QuantTensor, right: QuantTensor, ends: Tensor, resident: int) -> Tensor:
    """The textbook, slice by slice: fp64 [W, O, I]."""
    starts = [0, *ends.tolist()]
    slices = [slice(starts[expert], starts[expert + 1]) for expert in range(resident)]
    return torch.stack([numbers(left)[:, place] @ numbers(right)[:, place].T for place in slices])


def assert_near(found: Tensor, truth: Tensor) -> None:
    """Hold each row by itself, since their magnitudes differ."""
    assert found.shape == truth.shape
    error = (found.double() - truth).norm(dim=-1)
    assert (error <= TOLERANCE[found.dtype] * truth.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        pytest.param(33, 100, id="odd"),
        pytest.param(1, 1, id="one number"),
        pytest.param(17, 688, id="688 terms"),
        pytest.param(140, 17, id="17 terms, two tiles across"),
    ],
)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_each_slice_is_multiplied_by_its_matrix(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    rows, ends = quantise_rows(draw(60, inputs), "int8"), ends_of(LOADS["uneven"])
    stack = quantise_weight(draw(5, outputs, inputs, seed=1), "int8")
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends, out=unwritten(60, outputs, dtype=dtype))
    assert_near(y, products(rows, stack, ends))


@each_load
def test_any_loads_give_right_products_and_sums(loads: tuple[int, ...]) -> None:
    ends, count = ends_of(loads).int(), len(loads)
    rows = quantise_rows(draw(max(sum(loads), 1), 20), "int8")
    rows = QuantTensor(*(part[: sum(loads)] for part in rows))
    stack = quantise_weight(draw(count, 19, 20, seed=1), "int8")
    left, right = (
        QuantTensor(s.code[:, : sum(loads)].contiguous(), s.scale)
        for s in (draw_columns(61, 33), draw_columns(61, 17, 1))
    )
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends, out=unwritten(sum(loads), 19, dtype=torch.float32))
        gradients = grouped_wgrad(left, right, ends, count, torch.float32)
    assert_near(y, products(rows, stack, ends))
    assert_near(gradients, sums(left, right, ends, count))
    assert all((gradient == 0).all() for gradient, load in zip(gradients, loads, strict=True) if load == 0)


def each_tile(is_outer: bool) -> list:
    found = {tile: name for name in NAMES for tile in grouped_tiles(CARDS[name], "int8", is_outer)}
    return [pytest.param(name, tile, id="x".join(map(str, tile))) for tile, name in found.items()]


@pytest.mark.parametrize(("card", "tile"), each_tile(is_outer=False))
def test_every_tile_gives_the_same_product(card: str, tile: Tile) -> None:
    rows, outputs = tile.rows + 12, tile.columns + 8
    left, ends = quantise_rows(draw(rows, 136), "int8"), ends_of((3, 0, rows - 3))
    stack = quantise_weight(draw(3, outputs, 136, seed=1), "int8")
    with running_on(card):
        y = grouped_matmul(left, stack, ends, out=unwritten(rows, outputs, dtype=torch.float32), tile=tile)
    assert_near(y, products(left, stack, ends))


@pytest.mark.parametrize(("card", "tile"), each_tile(is_outer=True))
def test_every_tile_gives_the_same_sums(card: str, tile: Tile) -> None:
    left, right, ends = draw_columns(300, tile.rows + 8), draw_columns(300, 17, 1), ends_of((100, 28, 0, 3, 160, 9))
    with running_on(card):
        found = grouped_wgrad(left, right, ends, 6, torch.float32, tile=tile)
    assert_near(found, sums(left, right, ends, 6))


def test_a_range_of_experts_writes_its_own_rows_only() -> None:
    rows, ends = quantise_rows(draw(60, 24), "int8"), ends_of((5, 17, 1, 0, 37))
    whole = quantise_weight(draw(5, 18, 24, seed=1), "int8")
    out = unwritten(60, 18, dtype=torch.float32)
    with running_on("sm86"):
        grouped_matmul(rows, QuantTensor(*(part[1:3] for part in whole)), ends, first=1, out=out)
    assert_near(out[5:23], products(rows, whole, ends)[5:23])
    assert out[:5].isnan().all()
    assert out[23:].isnan().all()


def test_residents_alone_get_gradients() -> None:
    left, right, ends = draw_columns(60, 33), draw_columns(60, 100, 1), ends_of(LOADS["uneven"])
    with running_on("sm86"):
        found = grouped_wgrad(left, right, ends, 3, torch.float16)
    assert_near(found, sums(left, right, ends, 3))


def test_sums_are_exact_whole_numbers() -> None:
    # 127²·1500 has 25 bits, which fp32 sums would not hold; ends of 127 and 1 tell a missing term.
    code = torch.full((2, 1501), 127, dtype=torch.int8, device=DEVICE)
    code[:, -1] = 1
    rows, stack = (
        QuantTensor(code, torch.ones(2, 1, device=DEVICE)),
        QuantTensor(code[None], torch.ones(1, 2, 1, device=DEVICE)),
    )
    expected = float(torch.tensor(1500 * 127**2 + 1, dtype=torch.float32))
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends_of((2,)), dtype=torch.float32)
        gradient = grouped_wgrad(rows, rows, ends_of((1501,)), 1, torch.float32)
    assert (y == expected).all()
    assert (gradient == expected).all()


def test_a_slice_too_long_for_int32_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outer_module._TERMS <= MOST_INT8
    left, right, loads = draw_columns(700, 20), draw_columns(700, 17, 1), (3, 600, 0, 97)
    tile = grouped_tiles(CARDS["sm86"], "int8", is_outer=True)[-1]
    assert outer_module._TERMS % tile.depth == 0
    with running_on("sm86"):
        whole = grouped_wgrad(left, right, ends_of(loads), 4, torch.float32, tile=tile)
        monkeypatch.setattr(outer_module, "_TERMS", 2 * tile.depth)
        in_parts = grouped_wgrad(left, right, ends_of(loads), 4, torch.float32, tile=tile)
    assert_near(whole, sums(left, right, ends_of(loads), 4))
    assert relative_error(in_parts, whole) < TOLERANCE[torch.float32]


def test_what_is_not_a_number_stays_in_its_row_or_column_and_out_of_empty_slices() -> None:
    plain, weight = draw(30, 20), draw(3, 18, 20, seed=1)
    plain[6, 3], plain[26, 19], weight[2, 5, 0] = torch.nan, torch.inf, torch.nan
    rows, stack, ends = quantise_rows(plain, "int8"), quantise_weight(weight, "int8"), ends_of((7, 20, 3))
    left, right = quantise_columns(plain, "int8"), draw_columns(30, 17, 1)
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends, out=unwritten(30, 18, dtype=torch.float32))
        found = [grouped_wgrad(*pair, ends_of((7, 0, 23)), 3, torch.float32) for pair in ((left, right), (right, left))]
    is_bad = torch.zeros(30, 18, dtype=torch.bool, device=DEVICE)
    is_bad[[6, 26]], is_bad[27:, 5] = True, True
    assert torch.equal(y.isnan(), is_bad)
    for gradients in (found[0], found[1].mT):
        assert gradients[[0, 2]][:, [3, 19]].isnan().all()
        assert gradients.isnan().sum() == 2 * 2 * 17
        assert (gradients[1] == 0).all()


@pytest.mark.parametrize("card", [None, "sm75"])
def test_where_there_is_no_triton_the_reference_answers(card: str | None) -> None:
    rows, stack, ends = (
        quantise_rows(draw(30, 20), "int8"),
        quantise_weight(draw(2, 18, 20), "int8"),
        ends_of((7, 20, 3)),
    )
    left, right, out = draw_columns(30, 20), draw_columns(30, 18, 1), torch.full((30, 18), 5.0, device=DEVICE)
    with override_card(Card(DEVICE) if card is None else CARDS[card]):
        grouped_matmul(rows, stack, ends[1:], out=out)
        gradients = grouped_wgrad(left, right, ends, 3, torch.float32)
    truth = products(rows, stack, ends[1:])
    # Its numbers are decoded first, and so are its sums fp32.
    assert relative_error(out, truth) < 1e-6
    assert relative_error(gradients, sums(left, right, ends, 3)) < 1e-6


@pytest.mark.parametrize("name", list(CARDS))
def test_every_card_that_launches_has_int8_and_its_chosen_tiles_fit(name: str) -> None:
    card = CARDS[name]
    assert (choose("grouped_matmul", card).backend == "triton") == (choose("int8_matmul", card).backend == "tensor")
    if name == "sm75":
        return
    for is_outer in (False, True):
        found = grouped_tiles(card, "int8", is_outer)
        assert 2 <= len(found) <= 5
        assert all((t.rows + t.columns) * t.depth * t.stages <= card.shared_bytes for t in found)
        chosen = {choose_grouped_tile(card, "int8", rows, 1376, 16, is_outer) for rows in (0.3, 5, 50, 200, 3000)}
        assert {found[0], found[-1]} <= chosen <= set(found)


def note(
    rows: QuantTensor, stack: QuantTensor, columns: tuple[QuantTensor, QuantTensor]
) -> tuple[list[Launch], list[HiddenWork], list[int]]:
    """What paper tells of a product and of sums for 2 of 8 experts, and the bytes that each allocates."""
    launches: list[Launch] = []
    work: list[HiddenWork] = []
    peaks = []
    ends = torch.empty(8, dtype=torch.int64, device="meta")
    with simulate_card(CARDS["sm86"], work.append, note_launch=launches.append):
        for run in (
            lambda: grouped_matmul(rows, stack, ends),
            lambda: grouped_wgrad(*columns, ends, 2, torch.bfloat16),
        ):
            with LiveBytes() as live:
                run()
            peaks.append(live.peak)
    return launches, work, peaks


def meta(*shape: int) -> QuantTensor:
    code = torch.empty(*shape, dtype=torch.int8, device="meta")
    return QuantTensor(code, torch.empty(*shape[:-1], 1, device="meta"))


def test_on_paper_it_tells_of_its_launch_and_allocates_the_result_alone() -> None:
    launches, work, peaks = note(meta(96, 64), meta(2, 40, 64), (meta(40, 96), meta(64, 96)))
    assert [what.kernel for what in launches] == ["multiply_int8_kernel", "outer_int8_kernel"]
    assert {what.expected_mma for what in launches} == {"s8"}
    assert peaks == [96 * 40 * 2, 2 * 40 * 64 * 2]
    assert [told.low_flops for told in work] == [2 * 96 * 40 * 64 * 2 / 8] * 2, "two of eight experts"
    assert work[0].moved_bytes == 2 / 8 * (96 * (64 + 4) + 96 * 40 * 2) + 2 * 40 * (64 + 4)
    assert work[1].moved_bytes == 2 / 8 * (40 + 64) * (96 + 4) + 2 * 40 * 64 * 2
    assert launches[1].constants["IS_LONG"] is False


def test_rows_that_end_within_16_bytes_are_copied_and_long_slices_told() -> None:
    launches, _, peaks = note(meta(96, 100), meta(2, 40, 100), (meta(4, 2**17 + 1), meta(6, 2**17 + 1)))
    assert launches[0].arguments[0].shape == (96, 112)
    assert launches[0].arguments[2].shape == (2, 40, 112)
    assert launches[1].constants["IS_LONG"] is True
    assert peaks[0] == 96 * 40 * 2 + (96 + 2 * 40) * 112
    assert peaks[1] == 2 * 4 * 6 * 2 + (4 + 6) * (2**17 + 16)


def test_e4m3_too_is_read_in_whole_lines() -> None:
    rows = quantise_rows(draw(20, 100), "e4m3")
    stack = quantise_weight(draw(1, 18, 100, seed=1), "e4m3")
    filled = [QuantTensor(fill_lines(part.code), part.scale) for part in (rows, stack)]
    assert [part.code.shape[-1] for part in filled] == [112, 112]
    with running_on("sm86"):
        short, whole = (grouped_matmul(*pair, ends_of((20,)), dtype=torch.float32) for pair in ((rows, stack), filled))
    assert torch.equal(short, whole)


CODES, STACK, ENDS = meta(6, 4), meta(2, 5, 4), torch.empty(2, dtype=torch.int64, device="meta")
LONG = MOST_INT8 + 1
TURNED = QuantTensor(meta(4, 6).code.T, CODES.scale)


@pytest.mark.parametrize(
    ("rows", "stack", "what"),
    [
        pytest.param(CODES, STACK.code.float(), "int8 rows", id="plain stack"),
        pytest.param(
            CODES, QuantTensor(STACK.code, torch.empty(2, 1, 4, device="meta")), r"one of \[C, N, 1\]", id="turned"
        ),
        pytest.param(
            QuantTensor(CODES.code, torch.empty(6, 4, device="meta")), STACK, r"\[M, 1\]", id="scales of blocks"
        ),
        pytest.param(QuantTensor(CODES.code, CODES.scale.half()), STACK, r"\[M, 1\]", id="fp16 scales"),
        pytest.param(
            QuantTensor(CODES.code.float(), CODES.scale), STACK.code.float(), r"\[M, 1\]", id="plain with scales"
        ),
        pytest.param(TURNED, STACK, "all contiguous", id="strides"),
        pytest.param(CODES.code, STACK, "rows without a scale", id="rows without scales"),
        pytest.param(
            CODES, QuantTensor(STACK.code.byte(), torch.empty(2, 1, 1, device="meta")), "int8", id="E4M3 stack"
        ),
        pytest.param(meta(6, LONG), meta(2, 5, LONG), "at most", id="int32 overflows"),
    ],
)
def test_products_that_cannot_be_right_are_named(rows: QuantTensor, stack: QuantTensor, what: str) -> None:
    with pytest.raises(ShapeError, match=f"grouped_matmul: .*{what}"):
        grouped_matmul(rows, stack, ENDS)


@pytest.mark.parametrize(
    ("left", "right", "what"),
    [
        pytest.param(meta(4, 6), meta(5, 7), r"scaled \[O, M\]", id="rows"),
        pytest.param(meta(4, 6), meta(5, 6).code, "int8 of rows", id="one scale"),
        pytest.param(
            meta(4, 6), QuantTensor(meta(5, 6).code, torch.empty(5, 2, device="meta")), "int8 of rows", id="blocks"
        ),
        pytest.param(meta(4, 6), QuantTensor(meta(6, 5).code.T, meta(5, 6).scale), "contiguous", id="strides"),
        pytest.param(
            meta(4, 6), QuantTensor(meta(5, 6).code.byte(), meta(5, 6).scale), "of one dtype", id="E4M3 by int8"
        ),
    ],
)
def test_sums_that_cannot_be_right_are_named(left: QuantTensor, right: QuantTensor, what: str) -> None:
    with pytest.raises(ShapeError, match=f"grouped_wgrad: .*{what}"):
        grouped_wgrad(left, right, ENDS, 2, torch.float32)
