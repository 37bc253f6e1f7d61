"""Queries, keys and values widened for ALiBi, in plain PyTorch and by the kernels: copies, so equal to the bit."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.attention.widened_heads import reference, widened_heads
from lowvram_kernels.dispatch import HiddenWork, Launch, simulate_card
from lowvram_kernels.errors import ShapeError
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, saved_bytes

# B, T, H, G, K and C.
SHAPES = [(2, 5, 8, 2, 32, 8), (1, 3, 3, 1, 17, 7), (2, 4, 40, 20, 12, 4), (1, 2, 2, 2, 64, 8), (1, 3, 5, 5, 120, 16)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["×".join(map(str, shape)) for shape in SHAPES])
each_card = pytest.mark.parametrize("card", ["cpu", "sm86"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Return queries, keys and values, and both columns."""
    batch, tokens, heads, groups, width, columns = shape
    leaves = [draw(batch, tokens, n, width, dtype=dtype, seed=seed) for seed, n in enumerate((heads, groups, groups))]
    return leaves, [draw(heads, columns, dtype=dtype, seed=3), draw(tokens, columns, dtype=dtype, seed=4)]


def run(card: str, leaves: list[Tensor], columns: list[Tensor], dys: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the three results and the three gradients."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with running_on(card) if card != "cpu" else torch.enable_grad():
        made = widened_heads(*leaves, *columns)
        return *made, *torch.autograd.grad(made, leaves, dys)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_card
def test_values_and_gradients_are_those_that_were_given(shape: tuple[int, ...], dtype: torch.dtype, card: str) -> None:
    leaves, columns = inputs_of(shape, dtype)
    wide = reference(*leaves, *columns)
    dys = [draw(*part.shape, dtype=dtype, seed=seed) for seed, part in enumerate(wide, 5)]
    expected = *wide, *(dy[..., : shape[4]] for dy in dys)
    for own, truth in zip(run(card, leaves, columns, dys), expected, strict=True):
        assert own.dtype == dtype
        assert torch.equal(own, truth)


def test_strides_do_not_matter() -> None:
    leaves, columns = inputs_of((2, 3, 4, 2, 16, 8))
    views = torch.cat([leaf.flatten(2) for leaf in leaves], -1).split([64, 32, 32], -1)
    views = [view.unflatten(-1, (-1, 16)) for view in views]
    by_columns = [leaf.transpose(1, -1).contiguous().transpose(1, -1) for leaf in leaves]
    sparse = [torch.stack([column, column]).movedim(0, -1)[..., 0] for column in columns]
    dys = [draw(2, heads, 3, 24, seed=heads).transpose(1, 2) for heads in (4, 2, 2)]
    expected = run("sm86", leaves, columns, [dy.contiguous() for dy in dys])
    for others in ((views, columns), (by_columns, sparse)):
        found = run("sm86", *others, dys)
        assert all(torch.equal(own, truth) for own, truth in zip(found, expected, strict=True))


@each_card
def test_nothing_is_saved(card: str) -> None:
    leaves, columns = inputs_of((2, 8, 3, 1, 16, 8))

    def make() -> Tensor:
        with running_on(card) if card != "cpu" else torch.enable_grad():
            return widened_heads(*(leaf.requires_grad_() for leaf in leaves), *columns)[1]

    assert saved_bytes(make, []) == 0


def test_on_a_card_it_is_one_launch_each_way_and_gradients_lie_beside_each_other() -> None:
    works: list[HiddenWork] = []
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append, note_launch=launches.append):
        leaves = [torch.empty(4, 512, count, 32, dtype=torch.bfloat16).requires_grad_() for count in (8, 2, 2)]
        columns = [torch.empty(count, 8, dtype=torch.bfloat16) for count in (8, 512)]
        narrow = sum(leaf.nbytes for leaf in leaves)
        with LiveBytes().ignore(*leaves, *columns) as live:
            made = widened_heads(*leaves, *columns)
            assert live.peak == narrow * 40 // 32
            dys = [torch.empty_like(part) for part in made]
            before = live.now
            found = torch.autograd.grad(made, leaves, dys)
            assert live.peak == before + narrow
    assert [what.kernel for what in launches] == ["widened_heads_kernel", "narrowed_heads_kernel"]
    assert works[0].moved_bytes == narrow + narrow * 40 // 32 + 520 * 8 * 2
    assert works[1].moved_bytes == 2 * narrow
    assert [part.storage_offset() for part in found] == [0, 8 * 32, 10 * 32]
    assert len({part.untyped_storage()._cdata for part in found}) == 1


@pytest.mark.parametrize("wrong", ["keys", "values", "columns", "dtype"])
def test_what_does_not_fit_is_named(wrong: str) -> None:
    (q, k, v), (q_HC, k_TC) = inputs_of((2, 3, 4, 2, 16, 8))
    k = k[..., 1:] if wrong == "keys" else k
    v = v[:, :, 1:] if wrong in ("keys", "values") else v
    k_TC = k_TC[1:] if wrong == "columns" else k_TC.half() if wrong == "dtype" else k_TC
    with pytest.raises(ShapeError, match=r"widened_heads: given are \[2, 3, 4, 16\].*needed"):
        widened_heads(q, k, v, q_HC, k_TC)
