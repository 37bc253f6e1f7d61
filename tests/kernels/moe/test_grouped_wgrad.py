"""Outer products of experts' slices in one launch: any loads, zeros without rows, E4M3 that straddles slices, paper."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, Tile, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe.grouped_matmul import choose_grouped_tile, grouped_tiles
from lowvram_kernels.moe.grouped_wgrad import grouped_wgrad, reference
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_columns
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error

# Sums in fp32 of products that are exact in fp32, rounded once to the result's dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# FP8 tensor cores add with some 14 bits (DeepSeek-AI 2024, section 3.3.2), 128 products at a time here.
FP8_TOLERANCE = 1e-6 if DEVICE == "cpu" else 1e-3
# The interpreter's bf16 is wrong, its fp16 and fp32 are right.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
LOADS = {
    "uneven": (0, 17, 1, 0, 42),
    "all to the first": (60, 0, 0),
    "all to the last": (0, 0, 60),
    "no row at all": (0, 0),
}
WAYS = {"sm86": "storage", "sm89": "tensor", "sm90": "tensor", "sm120": "mxfp8"}


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """Fill what torch.empty returns with NaN: an element that nobody wrote then shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ends_of(loads: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(accumulate(loads)), device=DEVICE)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def truth(left: Tensor, right: Tensor, ends: Tensor, resident: int) -> Tensor:
    return reference(left.double(), right.double(), ends, resident, torch.float64)


def test_the_reference_is_the_sum_over_each_slice() -> None:
    left, right = draw(6, 3), draw(6, 2, seed=1)
    found = reference(left, right, torch.tensor([2, 2, 6], device=left.device), 3, torch.float32)
    assert relative_error(found[0], left[:2].mT @ right[:2]) < 1e-6
    assert found[1].abs().sum() == 0
    assert relative_error(found[2], left[2:].mT @ right[2:]) < 1e-6


@pytest.mark.parametrize("result", DTYPES, ids=lambda dtype: f"to {dtype}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loads", list(LOADS.values()), ids=list(LOADS))
def test_each_expert_gets_the_sum_over_its_rows(
    loads: tuple[int, ...], dtype: torch.dtype, result: torch.dtype
) -> None:
    left, right, ends = draw(sum(loads), 33, dtype=dtype), draw(sum(loads), 100, dtype=dtype, seed=1), ends_of(loads)
    with running_on("sm86"):
        found = grouped_wgrad(left, right, ends, len(loads), result)
    assert found.dtype == result
    for sums, expected, load in zip(found, truth(left, right, ends, len(loads)), loads, strict=True):
        assert relative_error(sums, expected) < TOLERANCE[result]
        assert load > 0 or (sums == 0).all()


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [pytest.param(1, 1, id="one number"), pytest.param(17, 688, id="688 wide"), pytest.param(140, 3, id="140 high")],
)
def test_odd_shapes_are_right_and_only_residents_are_made(outputs: int, inputs: int) -> None:
    left, right, ends = draw(60, outputs), draw(60, inputs, seed=1), ends_of(LOADS["uneven"]).int()
    with running_on("sm86"):
        found = grouped_wgrad(left, right, ends, 3, torch.float32)
    assert found.shape == (3, outputs, inputs)
    assert relative_error(found, truth(left, right, ends, 3)) < TOLERANCE[torch.float32]


EVERY_TILE = [
    pytest.param(card, way, tile, id=f"{card}-{way}-{'x'.join(map(str, tile[:3]))}")
    for card in ("sm86", "sm90")
    for way in ("half", "single")
    for tile in grouped_tiles(CARDS[card], way, is_outer=True)
]


@pytest.mark.parametrize(("card", "way", "tile"), EVERY_TILE)
def test_every_tile_gives_the_same_sums(card: str, way: str, tile: Tile) -> None:
    dtype = torch.float32 if way == "single" else torch.float16
    left, right = draw(150, tile.rows + 8, dtype=dtype), draw(150, tile.columns + 8, dtype=dtype, seed=1)
    ends = ends_of((3, 0, 147))
    with running_on(card):
        found = grouped_wgrad(left, right, ends, 3, torch.float32, tile=tile)
    assert relative_error(found, truth(left, right, ends, 3)) < TOLERANCE[torch.float32]


def test_strides_do_not_matter() -> None:
    left, right, ends = draw(18, 40).T[::2], draw(40, 66, seed=1)[::2, ::3], ends_of((7, 13))
    with running_on("sm86"):
        found = grouped_wgrad(left, right, ends, 2, torch.float32)
    assert relative_error(found, truth(left, right, ends, 2)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("side", [0, 1], ids=["left", "right"])
def test_what_is_not_a_number_stays_in_its_expert(side: int) -> None:
    sides, ends = (draw(30, 20), draw(30, 18, seed=1)), ends_of((7, 20, 0, 3))
    sides[side][6, 3] = torch.nan
    with running_on("sm86"):
        found = grouped_wgrad(*sides, ends, 4, torch.float32)
    assert found[0].isnan().sum() == (18, 20)[side]
    assert found[1:].isfinite().all()


EVERY_FP8_TILE = [
    pytest.param(card, tile, id=f"{card}-{'x'.join(map(str, tile[:3]))}")
    for card, way in WAYS.items()
    for tile in grouped_tiles(CARDS[card], way, is_outer=True)
]


def quantised(rows: int, outputs: int, inputs: int) -> tuple[QuantTensor, QuantTensor]:
    growing = torch.logspace(-1, 1, rows, device=DEVICE)[:, None]
    left = quantise_columns(draw(rows, outputs) * growing, "e4m3")
    return left, quantise_columns(draw(rows, inputs, seed=1), "e4m3")


def dequantised(scaled: QuantTensor) -> Tensor:
    return dequantise(scaled, torch.float32).mT


@pytest.mark.parametrize(("card", "tile"), EVERY_FP8_TILE)
def test_e4m3_columns_give_the_sums_of_the_numbers_they_stand_for(card: str, tile: Tile) -> None:
    left, right = quantised(330, 140, 17)
    loads = (100, 28, 0, 3, 190, 9)  # ends within a block, at its end, and two within one
    with running_on(card):
        found = grouped_wgrad(left, right, ends_of(loads), 6, torch.float32, tile=tile)
    expected = truth(dequantised(left), dequantised(right), ends_of(loads), 6)
    assert (found[2] == 0).all()
    for sums, right_sums in zip(found, expected, strict=True):
        assert relative_error(sums, right_sums) < FP8_TOLERANCE


@pytest.mark.parametrize("card", ["sm86", "sm89"])
def test_an_e4m3_block_that_is_not_a_number_spoils_those_alone_whose_rows_it_holds(card: str) -> None:
    plain, right = draw(300, 20), quantise_columns(draw(300, 17, seed=1), "e4m3")
    plain[130, 3] = torch.nan
    loads = (128, 50, 0, 50, 28, 44)
    with running_on(card):
        found = grouped_wgrad(quantise_columns(plain, "e4m3"), right, ends_of(loads), 6, torch.float32)
    assert [int(sums.isnan().sum()) for sums in found] == [0, 17, 0, 17, 17, 0]
    assert (found[2] == 0).all(), "an expert without rows within that block"


@pytest.mark.parametrize("card", [None, "sm75"])
def test_where_there_is_no_triton_the_reference_answers(card: str | None) -> None:
    left, right, ends = draw(30, 20), draw(30, 18, seed=1), ends_of((7, 20, 3))
    with override_card(Card(DEVICE) if card is None else CARDS[card]):
        found = grouped_wgrad(left, right, ends, 2, torch.float32)
        fp8 = grouped_wgrad(quantise_columns(left, "e4m3"), quantise_columns(right, "e4m3"), ends, 2, torch.float32)
    assert relative_error(found, truth(left, right, ends, 2)) < TOLERANCE[torch.float32]
    # Each side's rounding errs by 2⁻⁴ at most, a quarter of that in the mean.
    assert relative_error(fp8, truth(left, right, ends, 2)) < 2**-4


@pytest.mark.parametrize("name", list(WAYS))
def test_the_chosen_tile_is_one_that_the_gate_compiles(name: str) -> None:
    card = CARDS[name]
    for way in ("half", "single", WAYS[name]):
        found = grouped_tiles(card, way, is_outer=True)
        assert all(tile.depth <= 128 for tile in found)
        chosen = {choose_grouped_tile(card, way, rows, 512, 16, is_outer=True) for rows in (8, 100, 512)}
        assert {found[0], found[-1]} <= chosen <= set(found)


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16], ids=str)
def test_on_paper_it_tells_of_its_launch_and_allocates_the_result_alone(result: torch.dtype) -> None:
    launches: list[Launch] = []
    work: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS["sm86"], work.append, note_launch=launches.append):
        left, right = torch.empty(96, 40, dtype=torch.bfloat16), torch.empty(96, 64, dtype=torch.bfloat16)
        ends = torch.empty(8, dtype=torch.int64)
        with LiveBytes() as live:
            grouped_wgrad(left, right, ends, 2, result)
    (what,), (told,) = launches, work
    assert (what.kernel, what.expected_mma) == ("outer_kernel", "bf16")
    assert live.peak == 2 * 40 * 64 * result.itemsize
    assert 2 * 96 * 40 * 64 * 2 / 8 in told, "two of eight experts"
    assert told.moved_bytes == 2 / 8 * 96 * (40 + 64) * 2 + 2 * 40 * 64 * result.itemsize


def test_nothing_reads_the_device_and_the_op_keeps_torchs_rules() -> None:
    left, right, ends = draw(6, 4), draw(6, 5), ends_of((2, 0, 4))
    with running_on("sm86"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert grouped_wgrad(left, right, ends, 3, torch.float16).shape == (3, 4, 5)
        out, tile = torch.zeros(3, 4, 5, device=DEVICE), list(grouped_tiles(CARDS["sm86"], "single", is_outer=True)[0])
        arguments = (left, None, right, None, ends, None, None, 1, False, out, tile)
        torch.library.opcheck(
            torch.ops.lowvram_kernels.grouped_outer.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_it_repeats_itself_bit_for_bit() -> None:
    left, right, ends = draw(70, 64).half(), draw(70, 33).half(), ends_of((31, 2, 37))
    with running_on("sm86"):
        first, second = (grouped_wgrad(left, right, ends, 3, torch.float32) for _ in range(2))
    assert torch.equal(first, second)


LEFT, RIGHT, ENDS = torch.ones(6, 4), torch.ones(6, 5), torch.tensor([2, 6])
BYTES = QuantTensor(torch.zeros(4, 6, dtype=torch.uint8), torch.ones(4, 1))
MORE_BYTES = QuantTensor(torch.zeros(5, 6, dtype=torch.uint8), torch.ones(5, 1))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        pytest.param((LEFT, RIGHT[:5], ENDS, 2), r"needs \[M, O\] and \[M, I\]", id="rows"),
        pytest.param((LEFT, RIGHT.half(), ENDS, 2), "of one dtype", id="two dtypes"),
        pytest.param((LEFT.long(), RIGHT.long(), ENDS, 2), "needs fp32", id="integers"),
        pytest.param((BYTES, MORE_BYTES.code, ENDS, 2), "needs fp32", id="one scale"),
        pytest.param((BYTES, QuantTensor(MORE_BYTES.code, torch.ones(5, 2)), ENDS, 2), "1×128", id="blocks"),
        pytest.param(
            (BYTES, QuantTensor(torch.zeros(6, 5).byte().T, MORE_BYTES.scale), ENDS, 2), "contiguous", id="strides"
        ),
        pytest.param((LEFT, RIGHT, ENDS, 0), "resident is 0", id="none resident"),
        pytest.param((LEFT, RIGHT, ENDS, 3), r"E ≥ 3", id="more than there are"),
        pytest.param((LEFT, RIGHT, ENDS[None], 1), "ends is", id="ends of two dimensions"),
        pytest.param((LEFT, RIGHT.to("meta"), ENDS, 1), "they lie on", id="two devices"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(arguments: tuple, what: str) -> None:
    with pytest.raises(ShapeError, match=f"grouped_wgrad: .*{what}"):
        grouped_wgrad(*arguments, torch.float32)


def test_a_result_in_integers_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"dtype torch\.int32"):
        grouped_wgrad(LEFT, RIGHT, ENDS, 2, torch.int32)
