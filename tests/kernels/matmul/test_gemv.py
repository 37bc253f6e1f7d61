"""A few rows times an 8-bit weight on every kind of card: near the truth, the same twice, right on paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from lowvram_kernels.dispatch import Card, Launch, Tile, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.gemv import (
    choose_gemv_tile,
    choose_splits,
    gemv,
    gemv_tiles,
    kernel_of,
    multiply_bands,
    reference,
)
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_rows, quantise_weight
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error

# N, I, O: one number, each kernel and group of rows, edges of bands, rows of a weight that are no multiple of 16.
SHAPES = [(1, 1, 1), (1, 688, 17), (2, 100, 9), (3, 257, 5), (7, 130, 6), (16, 300, 10)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["×".join(map(str, shape)) for shape in SHAPES])
each_form = pytest.mark.parametrize("form", ["e4m3", "int8"])
# The interpreter stores bf16 wrong.
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
# Half of the last bit of a number that is rounded once.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
FEW, SIXTEEN = "few_rows_kernel", "sixteen_rows_kernel"


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers about 1 whose size changes by block of 128, so that scales differ."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.exp2(torch.arange(shape[1]) // 128 % 3 * 3.0 - 4.0)


def operands(
    shape: tuple[int, int, int], form: str, dtype: torch.dtype, by_rows: bool = False
) -> tuple[Tensor, QuantTensor]:
    rows, inputs, outputs = shape
    quantise = quantise_rows if by_rows else quantise_weight
    weight = quantise(random(outputs, inputs, seed=1), form)
    return random(rows, inputs).to(DEVICE, dtype), QuantTensor(*(part.to(DEVICE) for part in weight))


def assert_near(y: Tensor, x: Tensor, weight: QuantTensor) -> None:
    """Hold y against fp64 of the decoded weight.

    Sums of I terms in fp32, scaled once or twice, err by some √I + 2 roundings of the terms' sizes where errors have
    random signs (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").
    """
    w_OI = dequantise(weight, torch.float32).double()
    truth, sizes = x.double() @ w_OI.mT, x.double().abs() @ w_OI.abs().mT
    bound = 2.0**-24 * (math.sqrt(x.shape[1]) + 2.0) * sizes.norm() + ROUNDING[y.dtype] * truth.norm()
    assert float((y.double() - truth).norm()) <= float(bound)


@pytest.mark.parametrize("card", ["sm75", "sm86", "sm89", "sm120"])
@each_form
@each_dtype
@each_shape
def test_every_card_multiplies_what_the_codes_stand_for(
    card: str, form: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    x, weight = operands(shape, form, dtype)
    with running_on(card):
        y = gemv(x, weight)
    assert y.dtype == dtype
    assert_near(y, x, weight)


@each_form
@each_shape
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_a_processor_decodes_and_multiplies(form: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = operands(shape, form, dtype)
    with override_card(Card("cpu")):
        y = gemv(x, weight)
    assert torch.equal(y, reference(x, weight))
    # INT8's decoded weight is rounded to dtype, and so is the sum: each once.
    truth = x.double() @ dequantise(weight, torch.float32).double().mT
    assert relative_error(y, truth) < 8 * ROUNDING[dtype]


@pytest.mark.parametrize("by_rows", [False, True], ids=["128×128", "1×128"])
@pytest.mark.parametrize("rows, kernel", [(1, FEW), (2, FEW), (4, FEW), (13, SIXTEEN)])
def test_scales_of_either_kind_of_block_are_taken(rows: int, kernel: str, by_rows: bool) -> None:
    x, weight = operands((rows, 150, 132), "e4m3", torch.float16, by_rows)
    with running_on("sm86"):
        y = multiply_bands(x, weight, kernel, gemv_tiles(kernel)[0], 1)
    assert_near(y, x, weight)


FORCED = [
    pytest.param(kernel, tile, splits, id=f"{kernel}-{tile.columns}-{splits}")
    for kernel in (FEW, SIXTEEN)
    for tile in gemv_tiles(kernel)
    for splits in (1, 2, 3)
]


@pytest.mark.parametrize("kernel, tile, splits", FORCED)
@each_form
def test_every_tile_and_split_gives_the_same_product(kernel: str, tile: Tile, splits: int, form: str) -> None:
    x, weight = operands((2, 610, 18), form, torch.float16)
    with running_on("sm86"):
        y = multiply_bands(x, weight, kernel, tile, splits)
        again = multiply_bands(x, weight, kernel, tile, splits)
    assert_near(y, x, weight)
    assert torch.equal(y, again)


@each_form
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("splits", [1, 2])
def test_what_is_not_finite_comes_out_as_nan(form: str, rows: int, splits: int) -> None:
    w = random(6, 300, seed=1)
    w[4, 290] = torch.nan
    weight = QuantTensor(*(part.to(DEVICE) for part in quantise_rows(w, form)))
    x = random(rows, 300).to(DEVICE, torch.float16)
    x[1, 3] = torch.inf
    with running_on("sm86") as _:
        kernel = kernel_of(CARDS["sm86"], rows, x.dtype)
        y = multiply_bands(x, weight, kernel, gemv_tiles(kernel)[-1], splits)
    assert y[:, 4].isnan().all()
    assert not y[1].isfinite().any()
    assert y[0, [0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize("card", [CARDS["sm86"], Card("cpu")], ids=["sm86", "cpu"])
def test_rows_and_scales_may_lie_turned_in_memory(card: Card) -> None:
    x, weight = operands((5, 140, 130), "e4m3", torch.float16)
    turned = QuantTensor(weight.code, weight.scale.mT.contiguous().mT)
    assert not turned.scale.is_contiguous()
    with override_card(card):
        y = gemv(x.mT.contiguous().mT, turned)
    assert_near(y, x, weight)


@pytest.mark.parametrize("card", [CARDS["sm89"], Card("cpu")], ids=["sm89", "cpu"])
@each_form
def test_no_rows_make_no_launch(card: Card, form: str) -> None:
    x, weight = operands((3, 130, 5), form, torch.float16)
    with override_card(card):
        assert gemv(x[:0], weight).shape == (0, 5)
        assert gemv(x, QuantTensor(weight.code[:0], weight.scale[:0])).shape == (3, 0)


def rehearse(card: Card, rows: int, dtype: torch.dtype, outputs: int = 512) -> tuple[list[Launch], int]:
    launches: list[Launch] = []
    weight = QuantTensor(*(part.to("meta") for part in quantise_weight(random(outputs, 1408), "e4m3")))
    x = torch.empty(rows, 1408, dtype=dtype, device="meta")
    with simulate_card(card, note_launch=launches.append), LiveBytes() as live:
        assert gemv(x, weight).shape == (rows, outputs)
    return launches, live.peak


@pytest.mark.parametrize(
    "card, rows, dtype, kernel, expected_mma",
    [
        ("sm75", 16, torch.float16, FEW, ""),
        ("sm86", 1, torch.float16, FEW, ""),
        ("sm86", 2, torch.float16, SIXTEEN, "f16"),
        ("sm89", 16, torch.bfloat16, SIXTEEN, "bf16"),
        ("sm120", 16, torch.float32, FEW, ""),
    ],
)
def test_on_paper_a_card_launches_its_own_kernel(
    card: str, rows: int, dtype: torch.dtype, kernel: str, expected_mma: str
) -> None:
    launches, peak = rehearse(CARDS[card], rows, dtype)
    assert [(what.kernel, what.expected_mma) for what in launches] == [
        (kernel, expected_mma),
        ("add_splits_kernel", ""),
    ]
    splits = launches[0].grid[1]
    assert splits > 1
    assert launches[1].constants["SPLITS"] == splits
    y_bytes = rows * 512 * dtype.itemsize
    assert peak == y_bytes + splits * rows * 512 * 4


def test_a_card_that_is_full_splits_nothing() -> None:
    launches, peak = rehearse(CARDS["sm86"], 1, torch.float16, outputs=2048)
    assert [what.kernel for what in launches] == [FEW]
    assert peak == 2048 * 2


def test_bands_and_splits_fill_the_card() -> None:
    card = CARDS["sm86"]  # 48 multiprocessors, eight warps wanted on each
    large, small = gemv_tiles(FEW)
    assert choose_gemv_tile(card, FEW, 48 * 32) == large
    assert choose_gemv_tile(card, FEW, 48 * 32 - 16) == small
    assert choose_splits(card, small, 48 * 32, 10**5) == 1
    assert choose_splits(card, small, 48 * 8, 10**5) == 4
    # A split has four blocks of 128 at least, and none is empty.
    assert choose_splits(card, small, 4, 128 * 9) == 2
    assert choose_splits(card, small, 4, 127) == 1
    assert choose_splits(card, small, 4, 128 * 50) == -(-50 // -(-50 // 12))


def test_a_compiled_graph_holds_the_product_whole() -> None:
    x, weight = operands((3, 1408, 4), "e4m3", torch.float32)

    def multiply(x: Tensor, *parts: Tensor) -> Tensor:
        return gemv(x, QuantTensor(*parts)) * 2.0

    with running_on("sm86"):
        compiled = torch.compile(multiply, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, *weight), multiply(x, *weight))
    torch.compiler.reset()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, w: (x.repeat(6, 1), w), r"x has 18 rows; takes 16 at most, scaled_matmul takes more"),
        (lambda x, w: (x[:, :100], w), r"x is \[3, 100\].*needs \[N, I\]"),
        (lambda x, w: (x[0], w), r"x is \[300\]"),
        (lambda x, w: (x.double(), w), r"torch.float64.*needs \[N, I\] fp32, bf16 or fp16"),
        (lambda x, w: (x.to("meta"), w), r"on the weight's device"),
        (lambda x, w: (x, QuantTensor(w.code.mT, w.scale)), r"weight: code is \[300, 140\]"),
        (
            lambda x, w: (x, QuantTensor(w.code, w.scale[:1])),
            r"weight: scale is \[1, 3\].*needs \[2, 3\] or \[140, 3\]",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(
    change: Callable[[Tensor, QuantTensor], tuple[Tensor, QuantTensor]], message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        gemv(*change(*operands((3, 300, 140), "e4m3", torch.float32)))
