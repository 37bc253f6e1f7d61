"""The chunked loss against fp64, in bytes, and where 16 bits are hardest: confident and extreme rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, Launch, card_of, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.loss.linear_cross_entropy import chunk_rows, held_tile, linear_cross_entropy, reference
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSS_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(params=["plain", "kernel"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Take the plain form on a processor, or the kernel's path; gives the device for tensors."""
    if request.param == "plain":
        yield "cpu"
        return
    with running_on("sm86") as device:
        yield device


def compare(
    device: str, x: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None, upstream: float = 1.0
) -> None:
    """Hold the loss and both gradients against fp64 on the numbers that the op multiplies."""
    x, weight, targets = x.to(device), weight.to(device), targets.to(device)
    dtype, used = x.dtype, weight.to(x.dtype)
    mine = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    truths = [x.double().requires_grad_(), used.double().requires_grad_()]
    loss, truth = linear_cross_entropy(*mine, targets, chunk), reference(*truths, targets)
    gradients = torch.autograd.grad(loss * upstream, mine)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert [g.dtype for g in gradients] == [dtype, weight.dtype]
    if dtype == torch.bfloat16 and x.shape[0] == 1:
        # No other rows average its rounding, 2⁻⁸ at most of each: of the logits, which are differences in the loss, and
        # of the greatest and the summed probability, whose logarithms it holds.
        greatest = (x.double() @ used.double().mT).abs().max().item()
        assert abs(loss.item() - truth.item()) < 2**-8 * (greatest + 2)
    else:
        assert relative_error(loss, truth) < LOSS_TOLERANCE[dtype]
    for gradient, expected in zip(gradients, torch.autograd.grad(truth * upstream, truths), strict=True):
        assert relative_error(gradient, expected) < GRADIENT_TOLERANCE[gradient.dtype if dtype.itemsize > 2 else dtype]


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary", "chunk"),
    [
        pytest.param(37, 5, 11, None, id="odd"),
        pytest.param(64, 24, 301, 16, id="even-chunks"),
        pytest.param(65, 24, 301, 16, id="a-last-chunk-of-one"),
        pytest.param(40, 8, 33, 1, id="a-row-at-a-time"),
        pytest.param(40, 8, 33, 100, id="chunk-beyond-the-rows"),
        pytest.param(12, 8, 32, None, id="a-vocabulary-held-in-registers"),
        pytest.param(12, 8, 1056, 8, id="held-in-parts"),
    ],
)
def test_loss_and_both_gradients_are_the_textbooks(
    device: str, rows: int, width: int, vocabulary: int, chunk: int | None, dtype: torch.dtype, master: torch.dtype
) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(master) / width**0.5
    targets = torch.randint(0, vocabulary, (rows,)).masked_fill_(torch.rand(rows) < 0.2, -100)
    compare(device, x, weight, targets, chunk, upstream=0.37)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["untrained", "spread", "confident", "from-unsure-to-confident", "confidently-wrong"])
def test_a_large_vocabulary_keeps_its_precision(device: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    is_kernel = card_of(torch.device(device)).platform == "cuda"
    rows, width, vocabulary = (40, 64, 4_096) if is_kernel else (150, 64, 32_768)  # the interpreter is slow
    targets = torch.randint(0, vocabulary, (rows,))
    weight = torch.randn(vocabulary, width)
    if kind in ("untrained", "spread"):
        x = torch.randn(rows, width) * {"untrained": 0.02, "spread": 0.4}[kind]
    else:  # the target's, or a wrong, logit stands at up to 20 above some 2.5 of noise
        weight = F.normalize(weight)
        height = torch.linspace(0, 20, rows)[:, None] if kind == "from-unsure-to-confident" else 20.0
        x = weight[targets if kind != "confidently-wrong" else (targets + 1) % vocabulary] * height
    compare(device, x.to(dtype), weight.to(dtype).float(), targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_thousands_give_a_finite_loss_and_gradient(device: str, dtype: torch.dtype) -> None:
    x = torch.tensor([[1000.0], [-1000.0], [0.0], [30.0]]).to(dtype)
    weight = torch.linspace(-8, 8, 17)[:, None].contiguous()
    compare(device, x, weight, torch.tensor([0, 0, 3, 16]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_cost_the_logarithm_of_the_vocabulary(dtype: torch.dtype) -> None:
    x, weight = torch.zeros(6, 8, dtype=dtype), torch.randn(1000, 8)
    loss = linear_cross_entropy(x, weight, torch.arange(6))
    assert loss.item() == pytest.approx(6 * torch.tensor(1000.0).log().item(), rel=LOSS_TOLERANCE[dtype])


@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_when_every_target_is_ignored_loss_and_gradients_are_zero(dtype: torch.dtype, chunk: int | None) -> None:
    x, weight = torch.randn(7, 5).to(dtype).requires_grad_(), torch.randn(11, 5, requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.full((7,), -1), chunk, ignore_index=-1)
    loss.backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (loss.item(), x.grad.abs().sum().item(), weight.grad.abs().sum().item()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("rows", [0, 1], ids=["no-row", "one-row"])
def test_few_rows_are_a_batch_too(device: str, rows: int) -> None:
    x, targets = torch.randn(rows, 5).bfloat16(), torch.zeros(rows, dtype=torch.int64)
    compare(device, x, torch.randn(11, 5).bfloat16().float(), targets)


def test_strides_do_not_matter(device: str) -> None:
    torch.manual_seed(3)
    x, weight, targets = torch.randn(6, 20).mT, torch.randn(5, 6, 2)[:, :, 0], torch.arange(40)[::2] % 5
    compare(device, x, weight, targets, 7)
    compare(device, x, torch.randn(6, 5).mT, targets, 7)
    compare(device, x, weight, torch.arange(20).repeat_interleave(2)[::2] % 5, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_change_the_result_by_rounding_only(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, weight, targets = torch.randn(50, 16).to(dtype), torch.randn(90, 16), torch.arange(50)
    results = []
    for chunk in (50, 13):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        results.append(torch.autograd.grad(linear_cross_entropy(*leaves, targets, chunk), leaves))
    for whole, parts in zip(*results, strict=True):
        assert relative_error(parts, whole) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_a_gradient_that_nobody_asks_for_is_not_made(frozen: str) -> None:
    x, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6)
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    expected = {"x": 9 * 4 * 4, "weight": 6 * 4 * 4, "both": 0}[frozen]
    assert saved_bytes(lambda: linear_cross_entropy(x, weight, targets, 4), []) == expected
    if frozen != "both":
        linear_cross_entropy(x, weight, targets).backward()
        assert (x.grad is None) == (frozen == "x")


@pytest.mark.parametrize(("chunk", "bytes_of_dweight"), [(None, 2), (10, 4)], ids=["one-chunk", "chunks"])
def test_it_saves_the_two_gradients(chunk: int | None, bytes_of_dweight: int) -> None:
    x, weight = torch.randn(30, 8).bfloat16().requires_grad_(), torch.randn(50, 8, requires_grad=True)
    kept = saved_bytes(lambda: linear_cross_entropy(x, weight, torch.arange(30), chunk), [x, weight])
    assert kept == 30 * 8 * 2 + 50 * 8 * bytes_of_dweight


@pytest.mark.parametrize(("dtype", "bytes_per_logit"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 6)])
def test_logits_never_exist_whole(dtype: torch.dtype, bytes_per_logit: int) -> None:
    rows, width, vocabulary, chunk = 512, 8, 4096, 64
    x, weight = torch.randn(rows, width).to(dtype).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()
    with LiveBytes().ignore(x, weight) as live:
        linear_cross_entropy(x, weight, torch.arange(rows), chunk).backward()
    of_weight_size = vocabulary * width * (4 + 2 * dtype.itemsize)  # the sum, one chunk's part, the cast master
    assert live.largest <= chunk * vocabulary * 4
    assert live.peak <= chunk * vocabulary * bytes_per_logit + of_weight_size + rows * (width * dtype.itemsize + 64)
    assert live.peak < rows * vocabulary * dtype.itemsize / 2


def test_without_a_gradient_only_a_chunk_of_logits_lives() -> None:
    x, weight = torch.randn(512, 8), torch.randn(4096, 8)
    with LiveBytes().ignore(x, weight) as live:
        linear_cross_entropy(x, weight, torch.arange(512), 64)
    assert live.peak <= 64 * 4096 * 4 + 512 * 64


@pytest.mark.parametrize("target", [-1, 9], ids=["negative", "beyond-the-vocabulary"])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        linear_cross_entropy(torch.ones(2, 4), torch.ones(9, 4), torch.tensor([3, target]))


def test_a_second_backward_is_refused_not_wrong() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    loss = linear_cross_entropy(x, torch.randn(9, 4), torch.arange(6)) * 2.0
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("rows", "vocabulary", "dtype", "expected"),
    [
        pytest.param(4096, 16_384, torch.bfloat16, 1024, id="thousand-rows"),
        pytest.param(4096, 64_000, torch.bfloat16, 256, id="32-MiB-in-equal-chunks"),
        pytest.param(4096, 10**6, torch.float32, 128, id="never-below-128"),
        pytest.param(1025, 1000, torch.float32, 513, id="no-tiny-last-chunk"),
        pytest.param(0, 1000, torch.float32, 1, id="no-rows"),
    ],
)
def test_the_default_chunk_is_bounded_both_ways(rows: int, vocabulary: int, dtype: torch.dtype, expected: int) -> None:
    assert chunk_rows(rows, vocabulary, dtype) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"x": torch.ones(2, 3, 4)}, r"x is \[2, 3, 4\]", id="three-dimensions"),
        pytest.param({"weight": torch.ones(5, 3)}, r"weight \[5, 3\]", id="width"),
        pytest.param({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets \[4\]", id="number-of-targets"),
        pytest.param({"targets": torch.zeros(3, dtype=torch.int32)}, "targets torch.int32", id="int32-targets"),
        pytest.param({"x": torch.ones(3, 4, dtype=torch.float64)}, "x is torch.float64", id="fp64"),
        pytest.param({"chunk": 0}, "chunk is 0", id="empty-chunk"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(change: dict[str, object], named: str) -> None:
    right = {"x": torch.ones(3, 4), "weight": torch.ones(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ShapeError, match=named):
        linear_cross_entropy(**{**right, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [-1, 9], ids=["negative", "beyond-the-vocabulary"])
def test_a_target_outside_the_vocabulary_makes_the_kernels_loss_nan_and_reads_nothing_else(target: int) -> None:
    x, weight = torch.ones(2, 4, device=DEVICE).requires_grad_(), torch.ones(9, 4, device=DEVICE)
    with running_on("sm86"):
        loss = linear_cross_entropy(x, weight, torch.tensor([3, target], device=DEVICE))
        (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan()
    assert dx[0].isfinite().all()
    assert dx[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_row_that_is_held_in_registers_is_known_unknown_or_ignored_by_itself(dtype: torch.dtype) -> None:
    x, weight = torch.ones(5, 4, device=DEVICE, dtype=dtype), torch.ones(32, 4, device=DEVICE, dtype=dtype)
    x[4] = torch.nan
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    with running_on("sm86"):
        for targets, is_finite in (([3, 0, 31, 4, -100], True), ([3, 32, 9, 4, -100], False)):
            loss = linear_cross_entropy(*leaves, torch.tensor(targets, device=DEVICE))
            dx, _ = torch.autograd.grad(loss, leaves)
            assert loss.isfinite() == is_finite
            assert dx[[0, 2, 3]].isfinite().all()
            assert dx[1].isfinite().all() == is_finite
            assert not dx[4].any(), "of an ignored row, whatever it holds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["read-twice", "held"])
def test_what_is_not_a_number_is_in_the_kernels_loss(dtype: torch.dtype) -> None:
    for place in ((0, 1), (1, 1)):  # in a row of x, and in a weight that is no target's
        x, weight = (torch.ones(count, 4, device=DEVICE, dtype=dtype) for count in (2, 32))
        (x if place[0] else weight)[place] = torch.nan
        with running_on("sm86"):
            assert linear_cross_entropy(x, weight, torch.tensor([3, 4], device=DEVICE)).isnan()


@pytest.mark.parametrize("rows", [64, 512], ids=["chunks", "one-chunk"])
def test_on_a_card_a_chunk_is_four_launches_and_holds_its_logits_once(rows: int) -> None:
    works: list[HiddenWork] = []
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append, note_launch=launches.append):
        x, weight = torch.empty(512, 8, dtype=torch.bfloat16).requires_grad_(), torch.empty(4096, 8).requires_grad_()
        targets = torch.empty(512, dtype=torch.int64)
        with LiveBytes().ignore(x, weight, targets) as live:
            loss = linear_cross_entropy(x, weight, targets, rows)
            sums = 2 if rows == 512 else 4
            assert live.peak == rows * 4096 * 2 + 4096 * 8 * (2 + sums) + x.nbytes + 512 * 4 + 4
            loss.backward()
    assert len(launches) == 512 // rows
    assert works[0].moved_bytes == 2 * rows * 4096 * 2 + 2 * rows * 8 * 2 + rows * (8 + 4)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "reads"),
    [(4096, torch.float16, 1), (4094, torch.float16, 2), (4096, torch.float32, 2), (65_568, torch.bfloat16, 2)],
    ids=["held", "unaligned", "fp32", "too-long"],
)
def test_logits_are_read_once_where_registers_hold_them(vocabulary: int, dtype: torch.dtype, reads: int) -> None:
    launches: list[Launch] = []
    works: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS["sm86"], works.append, note_launch=launches.append):
        x, weight = torch.empty(8, 4, dtype=dtype).requires_grad_(), torch.empty(vocabulary, 4, dtype=dtype)
        linear_cross_entropy(x, weight, torch.empty(8, dtype=torch.int64))
    assert launches[0].kernel == ("held_loss_kernel" if reads == 1 else "loss_kernel")
    assert works[0].moved_bytes // (8 * vocabulary * dtype.itemsize) == reads + 1


@pytest.mark.parametrize("card", ["sm75", "sm86"])
@pytest.mark.parametrize("vocabulary", [32, 1024, 8192, 8224, 32_768, 49_152, 65_536])
def test_a_row_is_held_by_threads_of_few_pairs(vocabulary: int, card: str) -> None:
    tile = held_tile(vocabulary, torch.bfloat16, CARDS[card])
    if card == "sm75" and vocabulary > 32_768:
        assert tile is None
        return
    assert tile is not None
    assert tile.rows * tile.columns >= vocabulary // 2 > (tile.rows - 1) * tile.columns
    assert tile.rows * tile.columns <= (16 if vocabulary <= 32_768 else 32) * 32 * tile.warps <= 32 * 1024
