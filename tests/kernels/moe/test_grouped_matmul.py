"""Slices times their experts' matrices in one launch: any loads, ranges, turned, decoded, in E4M3, on paper."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, Tile, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe import grouped_matmul as module
from lowvram_kernels.moe.grouped_matmul import choose_grouped_tile, grouped_matmul, grouped_tiles, reference
from lowvram_kernels.moe.idle import Stack, new_idle, read_copy, write_copy_
from lowvram_kernels.quant import e4m3
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, join_parts, parts_of, quantise_rows, quantise_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.cards import CARDS, DEVICE, running_on, unwritten
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
    "one row each": (1, 1, 1, 1, 1),
    "no row at all": (0, 0),
    "one expert": (33,),
}
each_load = pytest.mark.parametrize("loads", list(LOADS.values()), ids=list(LOADS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_side = pytest.mark.parametrize("is_turned", [False, True], ids=["as it lies", "turned"])


def ends_of(loads: tuple[int, ...]) -> Tensor:
    return torch.tensor(list(accumulate(loads)), device=DEVICE)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def draw_stack(count: int, outputs: int, inputs: int, dtype: torch.dtype, is_turned: bool) -> Tensor:
    if is_turned:
        return draw(count, inputs, outputs, dtype=dtype, seed=1).mT
    return draw(count, outputs, inputs, dtype=dtype, seed=1)


def draw_blocks(count: int, outputs: int, inputs: int) -> Tensor:
    """Matrices whose size changes by block of 128 outputs and inputs, so that no two neighbours' scales are equal."""
    blocks = torch.arange(outputs)[:, None] // 128 * 2.0 - torch.arange(inputs) // 128 * 3.0
    return draw(count, outputs, inputs, seed=1) * torch.exp2(blocks).to(DEVICE)


def truth(rows: Tensor, stack: Tensor, ends: Tensor, first: int = 0) -> Tensor:
    return reference(rows.double(), stack.double(), ends, first)


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        pytest.param(33, 100, id="odd"),
        pytest.param(1, 1, id="one number"),
        pytest.param(17, 688, id="688 terms"),
        pytest.param(300, 64, id="several tiles across"),
    ],
)
@each_side
@each_dtype
def test_each_slice_is_multiplied_by_its_matrix(outputs: int, inputs: int, is_turned: bool, dtype: torch.dtype) -> None:
    loads = LOADS["uneven"]
    rows, stack, ends = draw(60, inputs, dtype=dtype), draw_stack(5, outputs, inputs, dtype, is_turned), ends_of(loads)
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends, out=unwritten(60, outputs, dtype=dtype))
    assert relative_error(y, truth(rows, stack, ends)) < TOLERANCE[dtype]


@each_load
@each_dtype
def test_any_loads_are_right(loads: tuple[int, ...], dtype: torch.dtype) -> None:
    ends = ends_of(loads)
    rows, stack = draw(sum(loads), 20, dtype=dtype), draw(len(loads), 19, 20, dtype=dtype)
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends, out=unwritten(sum(loads), 19, dtype=dtype))
    assert y.isfinite().all()
    assert relative_error(y, truth(rows, stack, ends)) < TOLERANCE[dtype]


def test_every_row_finds_its_tile_whatever_the_loads() -> None:
    generator = torch.Generator().manual_seed(3)
    for seed in range(9):
        limit = (2, 17, 40)[seed % 3]
        loads = tuple(torch.randint(0, limit, (1 + seed,), generator=generator).tolist())
        rows, stack = draw(sum(loads), 3, seed=seed), draw(len(loads), 2, 3)
        with running_on("sm86"):
            few = grouped_tiles(CARDS["sm86"], "single")[-1]
            y = grouped_matmul(rows, stack, ends_of(loads), out=unwritten(sum(loads), 2, dtype=torch.float32), tile=few)
        assert relative_error(y, truth(rows, stack, ends_of(loads))) < TOLERANCE[torch.float32]


EVERY_TILE = [
    pytest.param(card, way, tile, id=f"{card}-{way}-{'x'.join(map(str, tile[:3]))}")
    for card in ("sm86", "sm90")
    for way in ("half", "decode", "single")
    for tile in grouped_tiles(CARDS[card], way)
]


@pytest.mark.parametrize(("card", "way", "tile"), EVERY_TILE)
def test_every_tile_gives_the_same_product(card: str, way: str, tile: Tile) -> None:
    dtype = torch.float32 if way == "single" else torch.float16
    outputs = tile.columns + 8
    rows, ends = draw(tile.rows + 12, 136, dtype=dtype), ends_of((3, 0, tile.rows + 9))
    stack = draw(3, outputs, 136, dtype=torch.float32 if way == "decode" else dtype, seed=1)
    with running_on(card):
        y = grouped_matmul(rows, stack, ends, out=unwritten(len(rows), outputs, dtype=dtype), tile=tile)
    assert relative_error(y, truth(rows, stack.to(dtype), ends)) < TOLERANCE[dtype]


def test_strides_and_the_ends_dtype_do_not_matter() -> None:
    rows, stack = draw(20, 60).T[::2], draw(6, 18, 60).transpose(0, 1)[::3, :, ::3]
    ends, rows = ends_of((9, 0, 20, 1, 0, 0)).int(), rows.reshape(30, 20).T.contiguous().T
    assert not rows.is_contiguous()
    assert not stack.is_contiguous()
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends)
    assert relative_error(y, truth(rows, stack, ends)) < TOLERANCE[torch.float32]


@each_side
def test_a_range_of_experts_writes_its_own_rows_only(is_turned: bool) -> None:
    rows, ends = draw(60, 24), ends_of((5, 17, 1, 0, 37))
    stack = draw_stack(5, 18, 24, torch.float32, is_turned)
    out = unwritten(60, 18, dtype=torch.float32)
    with running_on("sm86"):
        for first, last, written in ((2, 4, (22, 23)), (0, 2, (0, 23)), (4, 5, (0, 60))):
            assert grouped_matmul(rows, stack[first:last], ends, first, out=out) is out
            is_written = out.isfinite().all(1)
            assert is_written[written[0] : written[1]].all()
            assert out.isfinite().sum() == (written[1] - written[0]) * 18
    assert relative_error(out, truth(rows, stack, ends)) < TOLERANCE[torch.float32]


def test_what_is_not_a_number_stays_in_its_row() -> None:
    rows, stack, ends = draw(30, 20), draw(3, 18, 20), ends_of((7, 20, 3))
    rows[6, 3], rows[26, 19], stack[2, 5, 0] = torch.nan, torch.inf, torch.nan
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends, out=unwritten(30, 18, dtype=torch.float32))
    expected = truth(rows, stack, ends)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert y.isfinite().sum() == 30 * 18 - 2 * 18 - 3
    assert relative_error(y.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)) < TOLERANCE[torch.float32]


def copies_of(masters: Tensor, form: str, is_turned: bool) -> tuple[Stack, list[Tensor]]:
    """Copies as `grouped_matmul` takes them, [C, N, K], and the numbers that they stand for."""
    stack = new_idle(*masters.shape, form, DEVICE)
    for index, master in enumerate(masters):
        write_copy_(stack, index, master)
    numbers = [read_copy(stack, index, torch.float32) for index in range(len(masters))]
    if not is_turned:
        return stack, numbers
    code, scale = parts_of(stack)
    return join_parts(code.mT, None if scale is None else scale.mT), [number.mT for number in numbers]


@each_side
@each_dtype
@pytest.mark.parametrize("form", ["bf16", "int8", "e4m3"])
def test_idle_copies_are_decoded_to_the_numbers_that_they_stand_for(
    form: str, dtype: torch.dtype, is_turned: bool
) -> None:
    rows, ends = draw(40, 140 if is_turned else 200, dtype=dtype), ends_of((3, 30, 0, 7))
    stack, numbers = copies_of(draw_blocks(2, 140, 200) * 0.02, form, is_turned)
    whole = torch.stack([number.to(dtype) for number in numbers])
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends, first=1)[3:33]
        same = grouped_matmul(rows, whole, ends, first=1, tile=choose_grouped_tile(CARDS["sm86"], "half", 10, 1, 1))[
            3:33
        ]
    assert relative_error(y, truth(rows, whole, ends, 1)[3:33]) < TOLERANCE[dtype]
    if DEVICE == "cuda":  # which adds up operands from registers and from shared memory in another order
        assert relative_error(y, same) < TOLERANCE[dtype]
    elif dtype != torch.float32:  # whose tile may be another
        assert torch.equal(y, same)


@each_side
def test_a_copy_that_is_not_a_number_spoils_what_it_touches(is_turned: bool) -> None:
    rows, ends = draw(9, 140 if is_turned else 200), ends_of((9,))
    stack, numbers = copies_of(draw(1, 140, 200), "e4m3", is_turned)
    stack.code[0, 7, 11] = 0xFF
    numbers[0][7, 11] = torch.nan
    with running_on("sm86"):
        y = grouped_matmul(rows, stack, ends)
    expected = truth(rows, numbers[0][None], ends)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y.isnan().sum() == 9


def quantise_stack(stack: Tensor) -> QuantTensor:
    parts = [quantise_weight(matrix, "e4m3") for matrix in stack]
    return QuantTensor(torch.stack([part.code for part in parts]), torch.stack([part.scale for part in parts]))


EVERY_FP8_TILE = [
    pytest.param(card, tile, id=f"{card}-{'x'.join(map(str, tile[:3]))}")
    for card, way in (("sm86", "storage"), ("sm89", "tensor"), ("sm90", "tensor"), ("sm120", "mxfp8"))
    for tile in grouped_tiles(CARDS[card], way)
]


@pytest.mark.parametrize(("card", "tile"), EVERY_FP8_TILE)
def test_e4m3_products_are_those_of_the_numbers_they_stand_for(card: str, tile: Tile) -> None:
    rows = quantise_rows(draw(50, 200) * torch.logspace(-3, 3, 50, device=DEVICE)[:, None], "e4m3")
    stack, ends = quantise_stack(draw_blocks(3, 140, 200)), ends_of((20, 0, 30))
    with running_on(card):
        y = grouped_matmul(rows, stack, ends, out=unwritten(50, 140, dtype=torch.float32), tile=tile)
    numbers = torch.stack([dequantise(QuantTensor(*pair), torch.float32) for pair in zip(*stack, strict=True)])
    expected = truth(dequantise(rows, torch.float32), numbers, ends)
    for row in (slice(0, 20), slice(20, 50)):  # whose magnitudes differ
        assert relative_error(y[row], expected[row]) < FP8_TOLERANCE


@pytest.mark.parametrize("card", ["sm86", "sm89"])
def test_an_e4m3_block_that_is_not_a_number_stays_in_its_row(card: str) -> None:
    plain, ends = draw(50, 200), ends_of((20, 30))
    plain[3, 150] = torch.nan
    rows, stack = quantise_rows(plain, "e4m3"), quantise_stack(draw(2, 16, 200))
    with running_on(card):
        y = grouped_matmul(rows, stack, ends, dtype=torch.float16)
    assert y.isnan().sum() == 16
    assert y[3].isnan().all()


@pytest.mark.parametrize("card", [None, "sm75"])
def test_where_there_is_no_triton_the_reference_answers(card: str | None) -> None:
    rows, stack, ends = draw(30, 20), draw(2, 18, 20), ends_of((7, 20, 3))
    out = torch.full((30, 18), 5.0, device=DEVICE)
    with override_card(Card(DEVICE) if card is None else CARDS[card]):
        grouped_matmul(rows, stack, ends, 1, out=out)
        fp8 = grouped_matmul(quantise_rows(rows, "e4m3"), quantise_stack(stack), ends, 1, torch.float32)
    assert (out[:7] == 5.0).all()
    assert relative_error(out[7:], truth(rows, stack, ends, 1)[7:]) < TOLERANCE[torch.float32]
    # Each side's rounding errs by 2⁻⁴ at most, a quarter of that in the mean.
    assert relative_error(fp8[7:], truth(rows, stack, ends, 1)[7:]) < 2**-4


WAYS = {"sm86": "storage", "sm89": "tensor", "sm90": "tensor", "sm120": "mxfp8"}


@pytest.mark.parametrize("name", list(WAYS))
def test_the_chosen_tile_is_one_that_the_gate_compiles(name: str) -> None:
    card = CARDS[name]
    for way in ("half", "decode", "single", WAYS[name]):
        found = grouped_tiles(card, way)
        assert all(tile.depth <= 128 and 128 % min(tile.columns, 128) == 0 for tile in found)
        chosen = {choose_grouped_tile(card, way, rows, 1376, 16) for rows in (0.3, 5, 50, 200, 3000)}
        assert {found[0], found[-1]} <= chosen <= set(found)
        assert choose_grouped_tile(card, way, 4096, 16, 1).rows < 4096, "few programs take small tiles"


def test_only_plain_stacks_take_tiles_wider_than_a_block_of_scales() -> None:
    assert max(tile.columns for tile in grouped_tiles(CARDS["sm90"], "half")) == 256
    for way in ("decode", "tensor", "storage", "mxfp8"):
        assert all(tile.columns <= module.BLOCK for card in CARDS.values() for tile in grouped_tiles(card, way))


def note(card: str, form: str | None, first: int = 0) -> tuple[Launch, HiddenWork, int]:
    """What paper tells of one product, and the bytes that it allocates."""
    launches: list[Launch] = []
    work: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS[card], work.append, note_launch=launches.append):
        rows, ends = torch.empty(96, 64, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int64)
        stack = torch.empty(2, 40, 64, dtype=torch.bfloat16) if form is None else new_idle(2, 40, 64, form)
        with LiveBytes() as live:
            result = grouped_matmul(rows, stack, ends, first)
        assert result.is_meta
    (what,), (told,) = launches, work
    return what, told, live.peak


@pytest.mark.parametrize(("form", "code_bytes"), [(None, 2), ("int8", 1), ("e4m3", 1)])
@pytest.mark.parametrize("card", ["sm86", "sm120"])
def test_on_paper_it_tells_of_its_launch_and_allocates_the_result_alone(
    card: str, form: str | None, code_bytes: int
) -> None:
    what, told, peak = note(card, form, first=3)
    assert (what.kernel, what.expected_mma, what.constants["FIRST"]) == ("multiply_kernel", "bf16", 3)
    assert peak == 96 * 40 * 2
    products = 2 * 96 * 40 * 64 * 2 / 8  # two of eight experts
    assert products in told
    scale_bytes = {None: 0, "int8": 2 * 40 * 4, "e4m3": 2 * 4}[form]
    assert told.moved_bytes == 2 / 8 * 96 * (40 + 64) * 2 + 2 * 40 * 64 * code_bytes + scale_bytes
    assert what.grid == ((96 // what.constants["BLOCK_M"] + 2) * 1,)


def test_nothing_reads_the_device_and_the_op_keeps_torchs_rules() -> None:
    rows, stack, ends = draw(6, 4), draw(3, 5, 4), ends_of((2, 0, 4))
    with running_on("sm86"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert grouped_matmul(rows, stack, ends).shape == (6, 5)
        out, tile = torch.zeros(6, 5, device=DEVICE), list(grouped_tiles(CARDS["sm86"], "single")[-1])
        arguments = (rows, None, stack, None, ends, None, 1, 0, out, tile)
        torch.library.opcheck(
            torch.ops.lowvram_kernels.grouped_matmul.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_it_repeats_itself_bit_for_bit() -> None:
    rows, stack, ends = draw(70, 64).half(), draw(3, 33, 64).half(), ends_of((31, 2, 37))
    with running_on("sm86"):
        first, second = (grouped_matmul(rows, stack, ends) for _ in range(2))
    assert torch.equal(first, second)


ROWS, STACK, ENDS = torch.ones(6, 4), torch.ones(2, 5, 4), torch.tensor([2, 6])
BYTES = QuantTensor(torch.zeros(6, 4, dtype=torch.uint8), torch.ones(6, 1))
BYTE_STACK = QuantTensor(torch.zeros(2, 5, 4, dtype=torch.uint8), torch.ones(2, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        pytest.param((ROWS[0], STACK, ENDS), r"rows are \[4\]", id="rows are a vector"),
        pytest.param((ROWS, STACK.mT, ENDS), r"needs \[M, K\] and \[C, N, K\]", id="turned without .mT"),
        pytest.param((ROWS, STACK, ENDS, -1), "first", id="before the first"),
        pytest.param((ROWS, STACK, ENDS, 1), r"ends is \[2\].*E ≥ 3", id="past the last"),
        pytest.param((ROWS, STACK, ENDS.float()), "ends is", id="floating ends"),
        pytest.param((ROWS.long(), STACK, ENDS), "rows without a scale", id="integer rows"),
        pytest.param((ROWS, STACK.double(), ENDS), "a stack is fp32", id="fp64 stack"),
        pytest.param((ROWS, BYTE_STACK.code, ENDS), r"scale needs \[2, 1, 1\]", id="bytes without scales"),
        pytest.param(
            (ROWS, QuantTensor(STACK.char(), torch.ones(2, 4, 1)), ENDS), r"scale needs \[2, 5, 1\]", id="int8"
        ),
        pytest.param((ROWS, QuantTensor(BYTE_STACK.code, torch.ones(2, 1, 1).half()), ENDS), "fp32", id="fp16 scales"),
        pytest.param((BYTES, STACK, ENDS), "an E4M3 stack", id="E4M3 by plain numbers"),
        pytest.param((QuantTensor(BYTES.code, torch.ones(6, 2)), BYTE_STACK, ENDS), r"scales \[M, 1\]", id="blocks"),
        pytest.param((BYTES, BYTE_STACK, ENDS, 0, torch.int64), "out is", id="integer result"),
        pytest.param((ROWS, STACK, ENDS, 0, None, torch.ones(5, 6).T), "out is", id="out is turned"),
        pytest.param((ROWS, STACK, ENDS, 0, None, torch.ones(6, 4)), "out is", id="out is narrow"),
        pytest.param((ROWS, STACK.to("meta"), ENDS), "the stack lies on meta", id="two devices"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(arguments: tuple, what: str) -> None:
    with pytest.raises(ShapeError, match=f"grouped_matmul: .*{what}"):
        grouped_matmul(*arguments)


def test_the_reference_decodes_as_the_copies_do() -> None:
    stack, numbers = copies_of(draw(2, 140, 200), "e4m3", False)
    found = module.dequantise_operand(*stack, torch.float32, module.BLOCK)
    assert torch.equal(found, torch.stack(numbers))
    assert torch.equal(
        found[0, :128, :128], e4m3.decode(stack.code[0, :128, :128], torch.float32) * stack.scale[0, 0, 0]
    )
