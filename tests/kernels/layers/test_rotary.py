"""Rotary positions with and without a norm, in plain PyTorch and by the kernels, against the textbook in fp64."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, Launch, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.rotary import reference, rotate
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# B, T, H, K and R: all of a head rotated, a part, one pair, no power of two.
SHAPES = [(2, 9, 3, 64, 32), (1, 5, 2, 96, 16), (2, 7, 1, 24, 12), (1, 3, 4, 17, 1), (3, 33, 5, 40, 20)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["×".join(map(str, shape)) for shape in SHAPES])
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
each_order = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
each_norm = pytest.mark.parametrize("has_norm", [False, True], ids=["alone", "normed"])
each_card = pytest.mark.parametrize("card", ["cpu", "sm86"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def table_of(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle_TR = (torch.arange(tokens)[:, None] + 3.0) * torch.logspace(0, -2, pairs)
    return angle_TR.cos().to(DEVICE), angle_TR.sin().to(DEVICE)


def run(card: str, *arguments: object) -> Tensor:
    if card == "cpu":
        return rotate(*arguments)  # type: ignore[arg-type]
    with running_on(card):
        return rotate(*arguments)  # type: ignore[arg-type]


@each_shape
@each_dtype
@each_order
@each_norm
@each_card
def test_values_and_gradients_are_the_textbooks(
    shape: tuple[int, ...], dtype: torch.dtype, interleaved: bool, has_norm: bool, card: str
) -> None:
    *sizes, pairs = shape
    x, dy, table = draw(*sizes, dtype=dtype), draw(*sizes, dtype=dtype, seed=1), table_of(sizes[1], pairs)
    leaves = [x, draw(sizes[-1], seed=2)] if has_norm else [x]
    truths = [leaf.double().requires_grad_() for leaf in leaves]
    wide = tuple(part.double() for part in table)
    truth = reference(truths[0], wide, interleaved, truths[1] if has_norm else None)
    expected = torch.autograd.grad(truth, truths, dy.double())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    y = run(card, leaves[0], table, interleaved, *leaves[1:])
    with running_on(card) if card != "cpu" else torch.enable_grad():
        found = torch.autograd.grad(y, leaves, dy)
    assert y.is_contiguous()
    assert y.dtype == found[0].dtype == dtype
    rounding = (2 if has_norm and card == "cpu" else 1) * TOLERANCE[dtype]  # the plain form rounds n, too
    assert relative_error(y, truth) < rounding
    assert relative_error(found[0], expected[0]) < rounding
    if has_norm:
        assert relative_error(found[1], expected[1]) < rounding


@each_norm
def test_strides_do_not_matter(has_norm: bool) -> None:
    table, weight = table_of(6, 4), [draw(8, seed=2)] if has_norm else []
    base = draw(2, 6, 3, 8)
    views = [draw(2, 6, 5, 20)[:, :, 1:4, 7:15], draw(2, 3, 6, 8).transpose(1, 2), base[:, :, :1].expand(-1, -1, 3, -1)]
    dy = draw(2, 3, 6, 8, seed=1).transpose(1, 2)
    for view in views:
        results = []
        for x, upstream in ((view, dy), (view.contiguous(), dy.contiguous())):
            leaf = x.detach().requires_grad_()
            y = run("sm86", leaf, table, False, *weight)
            with running_on("sm86"):
                results.append((y, *torch.autograd.grad(y, leaf, upstream)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@each_norm
def test_tables_and_weights_of_other_strides_are_read_as_what_they_are(has_norm: bool) -> None:
    x, (cos, sin), weight = draw(2, 6, 3, 8), table_of(12, 4), draw(16, seed=2)
    given = [(cos[::2], sin[::2]), False, *([weight[::2]] if has_norm else [])]
    plain = [tuple(part.contiguous() for part in given[0]), False, *(part.contiguous() for part in given[2:])]
    assert torch.equal(run("sm86", x, *given), run("sm86", x, *plain))


@each_norm
@each_card
def test_only_tables_are_saved_and_with_a_norm_the_values_and_a_number_a_head(has_norm: bool, card: str) -> None:
    x, table, weight = draw(2, 8, 3, 16).requires_grad_(), table_of(8, 8), draw(16, seed=2).requires_grad_()
    tables = 2 * 8 * 8 * 4
    kept = saved_bytes(lambda: run(card, x, table, False, *([weight] if has_norm else [])), [weight])
    assert kept == tables + has_norm * (x.nbytes + 2 * 8 * 3 * 4)


@each_norm
def test_on_a_card_it_is_one_launch_each_way_and_allocates_the_results_alone(has_norm: bool) -> None:
    works: list[HiddenWork] = []
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append, note_launch=launches.append):
        x, table = torch.empty(4, 512, 12, 64, dtype=torch.bfloat16).requires_grad_(), (torch.empty(512, 32),) * 2
        weight = torch.empty(64).requires_grad_()
        with LiveBytes().ignore(x, *table, weight) as live:
            y = rotate(x, table, False, *([weight] if has_norm else []))
            assert live.peak == x.nbytes + has_norm * 4 * 512 * 12 * 4
            torch.autograd.grad(y, (x, weight) if has_norm else x, y)
    assert launches[0].kernel == "rotary_kernel"
    assert len(launches) == 2 + has_norm
    assert works[0].moved_bytes == 2 * x.nbytes + 2 * 512 * 32 * 4 + has_norm * (64 * 4 + 4 * 512 * 12 * 4)


@pytest.mark.parametrize(
    ("shape", "table", "weight"),
    [((2, 3, 8), (3, 4), None), ((1, 3, 2, 8), (4, 4), None), ((1, 3, 2, 8), (3, 5), None), ((1, 3, 2, 8), (3, 4), 7)],
)
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, ...], table: tuple[int, int], weight: int | None) -> None:
    with pytest.raises(ShapeError, match=r"need|\[D\]"):
        rotate(torch.ones(shape), (torch.ones(table),) * 2, False, None if weight is None else torch.ones(weight))
