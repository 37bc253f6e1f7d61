"""MLA's queries, keys and values, in plain PyTorch and by the kernels, against the textbook in fp64."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.attention.mla_heads import mla_heads_, reference
from lowvram_kernels.dispatch import HiddenWork, Launch, simulate_card
from lowvram_kernels.errors import ShapeError
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
# B, T, H, N, R and V: values as wide as keys and narrower, all of a key rotated, one pair, many heads.
SHAPES = [(2, 5, 3, 64, 16, 96), (1, 3, 2, 24, 4, 17), (2, 4, 1, 0, 8, 16), (1, 2, 20, 5, 1, 7), (2, 3, 5, 100, 6, 112)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["×".join(map(str, shape)) for shape in SHAPES])
each_card = pytest.mark.parametrize("card", ["cpu", "sm86"])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def inputs_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    batch, tokens, heads, unrotated, pairs, values = shape
    angle_TR = (torch.arange(tokens)[:, None] + 3.0) * torch.logspace(0, -2, pairs)
    sizes = [(heads, unrotated + 2 * pairs), (heads, unrotated + values), (2 * pairs,)]
    leaves = [draw(batch, tokens, *size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)]
    return leaves, (angle_TR.cos().to(DEVICE), angle_TR.sin().to(DEVICE))


def run(card: str, leaves: list[Tensor], table: tuple[Tensor, Tensor], dys: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the three results and the three gradients."""
    with running_on(card) if card != "cpu" else torch.enable_grad():
        made = mla_heads_(*leaves, table)
        return *made, *torch.autograd.grad(made, leaves, dys)


@each_shape
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@each_card
def test_values_and_gradients_are_the_textbooks(shape: tuple[int, ...], dtype: torch.dtype, card: str) -> None:
    leaves, table = inputs_of(shape, dtype)
    dys = [draw(*leaves[0].shape, dtype=dtype, seed=seed) for seed in (3, 4, 5)]
    truths = [leaf.double().requires_grad_() for leaf in leaves]
    wide = (table[0].double(), table[1].double())
    made = reference(*truths, wide)
    expected = *made, *torch.autograd.grad(made, truths, [dy.double() for dy in dys])
    found = run(card, [leaf.requires_grad_() for leaf in leaves], table, dys)
    # The plain form adds up heads in 16 bits.
    rounding = TOLERANCE[dtype] * (4 if card == "cpu" else 1)
    for own, truth in zip(found, expected, strict=True):
        assert own.dtype == dtype
        assert own.shape == truth.shape
        assert relative_error(own, truth) < rounding
    assert not found[2][..., shape[-1] :].any()


def test_strides_do_not_matter() -> None:
    shape = (2, 3, 4, 8, 4, 16)
    plain, table = inputs_of(shape)
    joined = torch.cat([part.flatten(2) for part in plain], -1)
    views = list(joined.split([64, 96, 8], -1))
    views = [views[0].unflatten(-1, (4, 16)), views[1].unflatten(-1, (4, 24)), views[2]]
    dys = [draw(2, 4, 3, 16, seed=seed).transpose(1, 2) for seed in (3, 4, 5)]
    by_columns = [part.transpose(1, -1).contiguous().transpose(1, -1) for part in plain]
    dense = [dy.contiguous() for dy in dys]
    results = [
        run("sm86", [leaf.detach().clone().requires_grad_() for leaf in plain], table, dense),
        run("sm86", [leaf.detach().requires_grad_() for leaf in by_columns], table, [dy.expand_as(dy) for dy in dys]),
        run("sm86", [leaf.detach().requires_grad_() for leaf in views], table, dys),
    ]
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


def test_on_a_card_queries_stay_where_they_are_and_the_numbers_beside_them_as_they_are() -> None:
    (q, kv, k_rope), table = inputs_of((2, 3, 4, 8, 4, 16))
    beside = torch.cat([q.flatten(2), k_rope], -1)
    views = beside.split([64, 8], -1)
    with running_on("sm86"):
        queries, _, _ = mla_heads_(views[0].unflatten(-1, (4, 16)), kv, views[1], table)
    assert queries.data_ptr() == beside.data_ptr()
    assert torch.equal(beside[..., 64:], k_rope)
    assert torch.equal(queries[..., :8], q[..., :8])


@each_card
def test_only_tables_are_saved(card: str) -> None:
    leaves, table = inputs_of((2, 8, 3, 16, 8, 32))
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def make() -> Tensor:
        with running_on(card) if card != "cpu" else torch.enable_grad():
            return mla_heads_(*leaves, table)[1]

    assert saved_bytes(make, []) == 2 * 8 * 8 * 4


def test_on_a_card_it_is_one_launch_each_way_and_allocates_the_results_alone() -> None:
    works: list[HiddenWork] = []
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append, note_launch=launches.append):
        q, kv, k_rope = (
            torch.empty(4, 512, *size, dtype=torch.bfloat16).requires_grad_() for size in ((8, 96), (8, 160), (32,))
        )
        table = (torch.empty(512, 16),) * 2
        with LiveBytes().ignore(q, kv, k_rope, *table) as live:
            made = mla_heads_(q, kv, k_rope, table)
            assert live.peak == 2 * q.nbytes
            dys = [torch.empty_like(part) for part in made]
            live.ignore(*dys)
            before = live.now
            torch.autograd.grad(made, (q, kv, k_rope), dys)
            assert live.peak == before + q.nbytes + kv.nbytes + k_rope.nbytes
    assert [what.kernel for what in launches] == ["mla_heads_kernel", "mla_heads_backward_kernel"]
    few = k_rope.nbytes + 2 * 512 * 16 * 4
    assert works[0].moved_bytes == kv.nbytes + 2 * q.nbytes + 2 * q.nbytes // 3 + few
    assert works[1].moved_bytes == kv.nbytes + 4 * q.nbytes + few


@pytest.mark.parametrize("wrong", ["kv", "k_rope", "table", "wide values"])
def test_shapes_that_do_not_fit_are_named(wrong: str) -> None:
    (q, kv, k_rope), table = inputs_of((2, 3, 4, 8, 4, 16))
    kv = kv[:, :, 1:] if wrong == "kv" else torch.cat([kv, kv], -1) if wrong == "wide values" else kv
    k_rope = k_rope[..., 1:] if wrong == "k_rope" else k_rope
    table = (table[0][1:], table[1][1:]) if wrong == "table" else table
    with pytest.raises(ShapeError, match=r"mla_heads_: q is \[2, 3, 4, 16\], .* need"):
        mla_heads_(q, kv, k_rope, table)
