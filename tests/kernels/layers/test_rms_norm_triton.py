"""RMSNorm's kernels against the textbook in fp64, and against the plain form; their launches and bytes on a card."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, Launch, simulate_card
from lowvram_kernels.layers import rms_norm as op
from lowvram_kernels.layers.norm_linears import norm_linears
from lowvram_kernels.layers.rms_norm import WIDEST, gradients, normalise, reference, rms_norm
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error

# One rounding of the result, in units of the last place; sums are in fp32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
EPS = 1e-6
# One number, widths on both sides of a tile's, rows that no tile divides, several warps on a row.
SHAPES = [(1, 1), (33, 24), (7, 512), (5, 513), (130, 100), (3, 1100), (2, 5, 3, 64)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["×".join(map(str, shape)) for shape in SHAPES])
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@each_shape
@each_dtype
@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
def test_values_and_both_gradients_are_the_textbooks(
    shape: tuple[int, ...], dtype: torch.dtype, master: torch.dtype
) -> None:
    x, dy, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[-1], dtype=master, seed=2)
    truths = [tensor.double().requires_grad_() for tensor in (x, weight)]
    truth = reference(*truths, EPS)
    expected = torch.autograd.grad(truth, truths, dy.double())
    leaves = [tensor.requires_grad_() for tensor in (x, weight)]
    with running_on("sm86"):
        y = rms_norm(*leaves, EPS)
        found = torch.autograd.grad(y, leaves, dy)
    assert [tensor.dtype for tensor in (y, *found)] == [dtype, dtype, master]
    assert relative_error(y, truth) < TOLERANCE[dtype]
    assert relative_error(found[0], expected[0]) < TOLERANCE[dtype] or shape[-1] == 1  # where dx all but cancels
    assert relative_error(found[1], expected[1]) < TOLERANCE[master]


@each_dtype
def test_a_known_scale_gives_the_same_bits_and_one_gradient_those_of_both(dtype: torch.dtype) -> None:
    x, dy, weight = draw(37, 300, dtype=dtype), draw(37, 300, dtype=dtype, seed=1), draw(300, seed=2)
    with running_on("sm86"):
        y, rstd, _ = normalise(x, weight, EPS)
        again, same, _ = normalise(x, weight, 0.0, rstd)
        dx, dweight = gradients(dy, x, weight, rstd, (True, True))
        alone = gradients(dy, x, weight, rstd, (True, False)), gradients(dy, x, weight, rstd, (False, True))
    assert same is rstd
    assert torch.equal(again, y)
    assert alone[0][1] is None
    assert alone[1][0] is None
    assert torch.equal(alone[0][0], dx)
    assert torch.equal(alone[1][1], dweight)


@pytest.mark.parametrize("transform", ["transposed", "sliced", "expanded"])
def test_strides_do_not_matter(transform: str) -> None:
    base, dy = draw(6, 20, 16), draw(6, 16, 20, seed=1).mT
    x = {"transposed": draw(6, 16, 20).mT, "sliced": draw(6, 20, 40)[..., 3:19], "expanded": base[:1].expand(6, -1, -1)}
    weight = draw(16, seed=2)
    with running_on("sm86"):
        y, rstd, _ = normalise(x[transform], weight, EPS)
        found = gradients(dy, x[transform], weight, rstd, (True, True))
        plain, same, _ = normalise(x[transform].contiguous(), weight, EPS)
        expected = gradients(dy.contiguous(), x[transform].contiguous(), weight, same, (True, True))
    assert torch.equal(y, plain)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_not_a_number_stays_in_its_row() -> None:
    x, weight = draw(40, 50), draw(50, seed=2)
    x[3, 7], x[20, 0] = torch.nan, torch.inf
    with running_on("sm86"):
        y, rstd, _ = normalise(x, weight, EPS)
        dx, dweight = gradients(draw(40, 50, seed=1), x, weight, rstd, (True, True))
    assert torch.equal(y.isnan().any(1).nonzero().flatten().cpu(), torch.tensor([3, 20]))
    assert torch.equal(dx.isnan().any(1).nonzero().flatten().cpu(), torch.tensor([3, 20]))
    assert dweight.isnan().all()


def test_every_share_of_the_rows_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy, weight = draw(203, 70), draw(203, 70, seed=1), draw(70, seed=2)
    expected = (dy.double() * reference(x.double(), torch.ones(70, device=DEVICE).double(), EPS)).sum(0)
    for programs in (1, 7, 203):
        monkeypatch.setattr(op, "_PROGRAMS", programs)
        with running_on("sm86"):
            _, rstd, _ = normalise(x, weight, EPS)
            _, dweight = gradients(dy, x, weight, rstd, (False, True))
        assert relative_error(dweight, expected) < TOLERANCE[torch.float32]


def test_rows_that_no_program_holds_and_no_rows_take_the_plain_form() -> None:
    with running_on("sm86"):
        for shape in ((2, WIDEST + 1), (0, 16)):
            x, weight = draw(*shape).requires_grad_(), draw(shape[1], seed=2)
            y = rms_norm(x, weight, EPS)
            assert y.shape == x.shape
            assert torch.allclose(y, reference(x, weight, EPS), rtol=1e-5)
            y.sum().backward()


def test_on_a_card_it_is_one_launch_forward_and_one_and_a_sum_backward_and_allocates_results_alone() -> None:
    works: list[HiddenWork] = []
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append, note_launch=launches.append):
        x, weight = torch.empty(4096, 768, dtype=torch.bfloat16), torch.empty(768)
        with LiveBytes().ignore(x, weight) as live:
            y, rstd, _ = normalise(x, weight, EPS)
            forward_bytes = live.peak
            dx, dweight = gradients(y, x, weight, rstd, (True, True))
    programs = launches[1].grid[0]
    assert programs <= 48 * op._PROGRAMS
    assert forward_bytes == x.nbytes + 4096 * 4
    assert live.peak == 2 * x.nbytes + 4096 * 4 + programs * 768 * 4 + 768 * 4
    assert [work.moved_bytes for work in works] == [
        2 * x.nbytes + 4 * 768 + 4 * 4096,
        3 * x.nbytes + 4 * 768 + 4 * 4096 + 4 * 768 * programs,
        4 * 768 * (programs + 1),
    ]
    assert dx is not None
    assert dweight is not None


def test_a_norm_and_its_projections_are_the_plain_forms() -> None:
    x, weight, projections = draw(33, 40), draw(40, seed=2), [draw(24, 40, seed=3), draw(8, 40, seed=4)]
    dys = [draw(33, 24, seed=5), draw(33, 8, seed=6)]
    results = []
    for card in ("sm86", None):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, *projections)]
        if card is None:
            ys = norm_linears(leaves[0], leaves[1], leaves[2:], EPS)[1]
        else:
            with running_on(card):
                ys = norm_linears(leaves[0], leaves[1], leaves[2:], EPS)[1]
        with running_on(card) if card else torch.enable_grad():
            results.append([*ys, *torch.autograd.grad(ys, leaves, dys)])
    assert all(relative_error(one, other) < 2e-6 for one, other in zip(*results, strict=True))
