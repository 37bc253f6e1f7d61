"""What quantising allocates, launches, moves and refuses, on paper, compiled and at the edge of memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowvram_kernels import dispatch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.quant import blocks, quantise
from lowvram_kernels.quant.quantise import (
    FORMATS,
    QuantTensor,
    dequantise,
    quantise_columns,
    quantise_rows,
    quantise_weight,
    quantise_weight_both,
)
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on, unwritten
from tests.kernels.measures import LiveBytes

N, K = 300, 688
# What is made of bf16 [300, 688] on a card: code and scale.
RESULTS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "rows-e4m3": (lambda x: quantise_rows(x, "e4m3"), N * K + N * 6 * 4),
    "columns-e4m3": (lambda x: quantise_columns(x, "e4m3"), N * K + K * 3 * 4),
    "weight-e4m3": (lambda x: quantise_weight(x, "e4m3"), N * K + 3 * 6 * 4),
    "turned-e4m3": (lambda x: quantise_weight(x, "e4m3", transposed=True), N * K + 3 * 6 * 4),
    "both-e4m3": (lambda x: quantise_weight_both(x, "e4m3"), 2 * (N * K + 3 * 6 * 4)),
    "rows-int8": (lambda x: quantise_rows(x, "int8"), N * K + N * 4),
    "columns-int8": (lambda x: quantise_columns(x, "int8"), N * K + K * 4),
    "weight-int8": (lambda x: quantise_weight(x, "int8"), N * K + N * 4),
}
each_result = pytest.mark.parametrize("name", list(RESULTS))
each_card = pytest.mark.parametrize("card", list(CARDS))


class Paper:
    """What was launched and moved on paper, and the bytes that were alive."""

    def __init__(self, card: Card, run: Callable[[], Any], *given: Tensor) -> None:
        self.launches: list[Launch] = []
        self.work: list[HiddenWork] = []

        def note(what: Launch) -> None:
            self.launches.append(what._replace(arguments=()))  # which would keep them alive

        with simulate_card(card, note=self.work.append, note_launch=note), LiveBytes().ignore(*given) as live:
            self.result = run()
            self.kept = live.now
        self.peak = live.peak


def on_meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


@each_result
@each_card
def test_a_card_allocates_the_results_and_launches_once(name: str, card: str) -> None:
    run, result_bytes = RESULTS[name]
    x = on_meta(N, K)
    paper = Paper(CARDS[card], lambda: run(x), x)
    assert paper.peak == paper.kept == result_bytes
    assert len(paper.launches) == 1
    assert paper.work == [HiddenWork(0.0, N * K * 2 + result_bytes, 1.0)]


def test_int8_columns_launch_twice_and_keep_an_absmax_for_each_slice() -> None:
    x = on_meta(3000, 688)
    paper = Paper(CARDS["sm89"], lambda: quantise_columns(x, "int8"), x)
    absmax_bytes, result_bytes = 6 * 688 * 4, 3000 * 688 + 688 * 4  # six slices of 512
    assert [what.kernel for what in paper.launches] == ["absmax_kernel", "int8_slices_kernel"]
    assert paper.peak == absmax_bytes + result_bytes
    assert paper.kept == result_bytes
    x_bytes = 3000 * 688 * 2
    moved = [x_bytes + absmax_bytes, x_bytes + absmax_bytes + result_bytes]
    assert [work.moved_bytes for work in paper.work] == moved


@pytest.mark.parametrize("form", FORMATS)
def test_dequantising_on_a_card_makes_its_result_alone(form: str) -> None:
    x = on_meta(4, N, K)
    scaled = Paper(CARDS["sm86"], lambda: quantise_weight(x, form)).result
    paper = Paper(CARDS["sm86"], lambda: dequantise(scaled, torch.bfloat16), *scaled)
    assert paper.peak == 4 * N * K * 2
    assert paper.work[0].moved_bytes == sum(t.numel() * t.element_size() for t in (*scaled, paper.result))
    assert [what.grid for what in paper.launches] == [(10, 6, 4)]


def test_cards_round_by_themselves_from_capability_8_9_on() -> None:
    x = on_meta(N, K)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_IS_INTERPRETED", False)
        found = {
            name: Paper(card, lambda: quantise_rows(x, "e4m3")).launches[0].constants["NATIVE"]
            for name, card in CARDS.items()
        }
    assert found == {"sm75": False, "sm80": False, "sm86": False, "sm89": True, "sm90": True, "sm120": True}


@pytest.mark.parametrize("platform", ["cpu", "mps"])
@pytest.mark.parametrize("shape", [(1500, 688), (1100, 1000)], ids=["edges", "parts"])
def test_the_peak_of_plain_pytorch_on_paper_is_its_peak_in_memory(shape: tuple[int, int], platform: str) -> None:
    def run(device: str) -> int:
        x = torch.zeros(shape, dtype=torch.float16, device=device)
        with LiveBytes().ignore(x) as live:
            for form in FORMATS:
                scaled = quantise_columns(x, form)
                dequantise(scaled, torch.bfloat16)
                quantise_rows(x, form)
        return live.peak

    with simulate_card(Card(platform)):
        expected = run("meta")
    with override_card(Card(platform)):
        assert run("cpu") == expected > 0


@pytest.mark.parametrize("platform, promised", [("cpu", 8), ("mps", 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_pytorch_has_no_more_at_work_than_promised(dtype: torch.dtype, platform: str, promised: int) -> None:
    x = torch.zeros(2048, blocks.CHUNK // 512, dtype=dtype)
    with override_card(Card(platform)):
        scaled = [quantise_rows(x, form) for form in FORMATS]
        runs: list[Callable[[], Any]] = [
            *(lambda form=form: quantise_rows(x, form) for form in FORMATS),
            lambda: quantise_weight(x, "e4m3", fp32_scales=True),
            *(lambda part=part: dequantise(part, torch.float32) for part in scaled),
        ]
        for run in runs:
            with LiveBytes().ignore(x, *scaled[0], *scaled[1]) as live:
                result = run()
                at_work = live.peak - live.now
            del result
            assert 0 < at_work <= promised * blocks.CHUNK * 1.05  # what belongs to each block comes on top


@pytest.mark.parametrize("card", [Card("cpu"), Card("cuda", (8, 6))], ids=["plain", "triton"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_compiler_takes_everything_as_one_graph(form: str, card: Card) -> None:
    def round_trip(x: Tensor) -> tuple[Tensor, ...]:
        scaled = (
            quantise_rows(x, form),
            quantise_columns(x, form),
            quantise_weight(x, form),
            *quantise_weight_both(x, form),
        )
        return tuple(dequantise(part, torch.float32) for part in scaled)

    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with override_card(card):
        torch._dynamo.reset()
        found = torch.compile(round_trip, backend="eager", fullgraph=True)(x)
        expected = round_trip(x)
    assert len(found) == 5
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_no_gradient_is_kept() -> None:
    x = torch.randn(3, 200, device=DEVICE, requires_grad=True)
    for card in (Card("cpu"), Card("cuda", (8, 6))):
        with override_card(card):
            scaled = [quantise_rows(x, "e4m3"), quantise_columns(x, "int8"), quantise_weight(x, "e4m3")]
            assert not any(part.requires_grad for parts in scaled for part in parts)


GUARD = 300


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return unwritten memory and what lies behind it, which nothing may touch."""
    count = torch.Size(shape).numel()
    whole = unwritten(count + GUARD, dtype=dtype)
    return whole[:count].view(shape), whole[count:]


@pytest.mark.parametrize("shape", [(17, 100), (130, 300)], ids=str)
def test_kernels_write_all_of_their_results_and_nothing_else(shape: tuple[int, int]) -> None:
    rows, width = shape
    wide, tall = -(-width // 128), -(-rows // 128)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with running_on("sm86") as device:
        x = x.to(device)
        code, code_end = guarded(rows, width, dtype=torch.uint8)
        turned, turned_end = guarded(width, rows, dtype=torch.uint8)
        int8, int8_end = guarded(rows, width, dtype=torch.int8)
        scale, scale_end = guarded(rows, wide, dtype=torch.float32)
        block, block_end = guarded(tall, wide, dtype=torch.float32)
        turned_block, turned_block_end = guarded(wide, tall, dtype=torch.float32)
        row, row_end = guarded(rows, 1, dtype=torch.float32)
        absmax, absmax_end = guarded(1, rows, dtype=torch.int32)
        back, back_end = guarded(rows, width, dtype=torch.float32)
        quantise._launch_e4m3_rows(x, code, scale, False, [*quantise.choose_quantise_tile("e4m3", width, False)])
        quantise._launch_dequantise(code, scale, back, 1)
        quantise.launch_e4m3_blocks(x, code, block, turned, turned_block, False)
        quantise._launch_absmax(x, absmax, [*quantise._INT8_SLICES[0]])
        quantise._launch_int8_slices(x, absmax, int8, row, [*quantise._INT8_SLICES[0]])
        quantise._launch_int8_rows(x, int8, row, [*quantise.choose_quantise_tile("int8", width, False)])
    ends = (code_end, turned_end, int8_end, scale_end, block_end, turned_block_end, row_end, absmax_end, back_end)
    for end in ends:
        assert torch.equal(end.nan_to_num(7.0), unwritten(GUARD, dtype=end.dtype).nan_to_num(7.0))
    for part in (scale, block, turned_block, row, back):
        assert part.isfinite().all()
    assert torch.equal(absmax.view(torch.float32)[0], x.abs().amax(1))
    assert torch.equal(turned, code.T)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "format": (lambda: quantise_rows(torch.ones(2, 2), "fp8"), "format is 'fp8'; needs one of e4m3, int8"),
    "fp32 scales of int8": (lambda: quantise_columns(torch.ones(2, 2), "int8", True), "format is 'int8'"),
    "one axis": (lambda: quantise_rows(torch.ones(2), "int8"), "[2] torch.float32; needs [N, K]"),
    "a stack of rows": (lambda: quantise_columns(torch.ones(2, 2, 2), "int8"), "[2, 2, 2]"),
    "four axes": (lambda: quantise_weight(torch.ones(2, 2, 2, 2), "e4m3"), "needs [N, K] or [E, O, I]"),
    "nothing": (lambda: quantise_weight_both(torch.ones(0, 2), "e4m3"), "[0, 2] torch.float32; needs"),
    "integers": (lambda: quantise_weight(torch.ones(2, 2, dtype=torch.int32), "int8"), "torch.int32; needs"),
    "doubles": (lambda: quantise_rows(torch.ones(2, 2, dtype=torch.float64), "int8"), "torch.float64; needs"),
    "codes": (lambda: dequantise(QuantTensor(torch.ones(2, 2), torch.ones(2, 1)), torch.float32), "code is [2, 2]"),
    "scales": (
        lambda: dequantise(QuantTensor(torch.ones(200, 300, dtype=torch.uint8), torch.ones(200, 2)), torch.float32),
        "scale is [200, 2] torch.float32; this code needs [200, 3] or [2, 3], fp32",
    ),
    "scales of rows": (
        lambda: dequantise(QuantTensor(torch.ones(2, 300, dtype=torch.int8), torch.ones(2, 3)), torch.float32),
        "this code needs [2, 1], fp32",
    ),
    "half a scale": (
        lambda: dequantise(QuantTensor(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1).half()), torch.float32),
        "torch.float16; this code needs",
    ),
    "turned codes": (
        lambda: dequantise(QuantTensor(torch.ones(2, 3, dtype=torch.int8).T, torch.ones(3, 1)), torch.float32),
        "contiguous",
    ),
    "dtype": (
        lambda: dequantise(QuantTensor(torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 1)), torch.float64),
        "dtype is torch.float64; needs fp32, bf16 or fp16",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.parametrize("card", [Card("cpu"), Card("cuda", (8, 6))], ids=["plain", "triton"])
def test_what_does_not_fit_is_refused_by_name(name: str, card: Card) -> None:
    run, message = REFUSED[name]
    with override_card(card), pytest.raises(ShapeError, match=re.escape(message)):
        run()
