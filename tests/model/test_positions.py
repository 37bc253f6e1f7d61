"""Rotary positions stay rotations; ALiBi's columns equal the brute-force penalty."""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_kernels.layers.rotary import rotate
from safetensors.torch import load, save

from lowvram.config.architecture import Rope, Yarn
from lowvram.model.attention import attend
from lowvram.model.positions import RotaryTable, add_alibi_columns, alibi_columns, frequencies, slopes
from lowvram.model.transformer import Transformer
from tests.model.variants import VARIANTS

HEADS = [1, 2, 4, 6, 8, 12]


def widen(q: torch.Tensor, k: torch.Tensor, slope_H: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return add_alibi_columns(q, k, alibi_columns(slope_H, scale, k.shape[2], k.shape[3], k.dtype))


def scores_at_lag(table: RotaryTable, lag: int, interleaved: bool, dtype: torch.dtype) -> torch.Tensor:
    """The score of one fixed query and key `lag` apart, at several places."""
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 1, 1, 16, generator=generator, dtype=dtype) for _ in range(2))
    found = []
    for place in (0, 5, 100, 1000):
        turned_q = rotate(q, table(place + lag, 1), interleaved)
        turned_k = rotate(k, table(place, 1), interleaved)
        found.append((turned_q.double() * turned_k.double()).sum())
    return torch.stack(found)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("after", ["built", "bfloat16", "half", "loaded"])
def test_a_score_depends_on_the_lag_alone_after_any_cast_or_load(after: str, interleaved: bool) -> None:
    table = RotaryTable(Rope(), 16)
    if after == "bfloat16":
        table = table.to(torch.bfloat16)
    elif after == "half":
        table = table.half()
    elif after == "loaded":
        model = Transformer(VARIANTS["gqa-rope"]).to(torch.bfloat16)
        model.load_state_dict(load(save(dict(model.state_dict()))))
        table = RotaryTable(Rope(), 16).to(torch.bfloat16)
        table.load_state_dict({}, strict=True)
        assert model.table.frequency_R.dtype == torch.float32
    assert table.frequency_R.dtype == torch.float32
    found = scores_at_lag(table, 7, interleaved, torch.float32)
    assert found.std() < 1e-4 * found.abs().max()


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_rotation_keeps_length_and_its_gradient_turns_back(interleaved: bool) -> None:
    table = RotaryTable(Rope(), 12)(4, 9)
    x = torch.randn(2, 9, 3, 17, dtype=torch.float64, requires_grad=True)
    y = rotate(x, table, interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[..., :5], x[..., :5]), "values before the rotated part stay"
    torch.autograd.gradcheck(lambda t: rotate(t, tuple(a.double() for a in table), interleaved), x)


def test_rotation_by_hand_for_one_pair() -> None:
    table = RotaryTable(Rope(), 2)(3, 1)
    turned = rotate(torch.tensor([[[[1.0, 0.0]]]]), table, interleaved=True).flatten()
    torch.testing.assert_close(turned, torch.tensor([math.cos(3.0), math.sin(3.0)]))


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones() -> None:
    plain = frequencies(Rope(), 64)
    yarn = frequencies(Rope(yarn=Yarn(factor=40.0, original_len=4096)), 64)
    torch.testing.assert_close(yarn[:8], plain[:8])
    torch.testing.assert_close(yarn[-4:], plain[-4:] / 40.0)
    assert (yarn[1:] < yarn[:-1]).all()


def test_yarn_magnitude_is_one_without_extension() -> None:
    assert Yarn(factor=1.0, original_len=10).magnitude == 1.0
    assert Yarn(factor=40.0, original_len=10).magnitude == pytest.approx(1.3689, abs=1e-4)


def brute_force(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q·k·scale − slope·distance) over the past, with every score written out, in fp64."""
    heads, groups, queries, keys = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None]
    score = q.double() @ k.double().mT * scale - slopes(heads).double()[:, None, None] * distance
    return score.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v.double()


@pytest.mark.parametrize("queries, keys", [(37, 37), (1, 37), (5, 37), (300, 300)], ids=str)
@pytest.mark.parametrize("heads", [4, 6, 8, 12])
def test_alibi_columns_equal_the_brute_force_formula(heads: int, queries: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(2, h, t, 20, generator=generator) for h, t in ((heads, queries), (2, keys), (2, keys)))
    wide_q, wide_k = widen(q, k, slopes(heads), 20**-0.5)
    found = attend(wide_q, wide_k, v, 20**-0.5)
    torch.testing.assert_close(found.double(), brute_force(q, k, v, 20**-0.5), atol=2e-5, rtol=0)


def test_alibi_in_bf16_is_as_near_as_bf16_attention_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 1500, 32, generator=generator).bfloat16() for _ in range(3))
    exact = brute_force(q, k, v, 32**-0.5)
    found = attend(*widen(q, k, slopes(8), 32**-0.5), v, 32**-0.5)
    assert (found.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16])
def test_slopes_of_a_power_of_two_are_the_geometric_series(heads: int) -> None:
    assert slopes(heads).tolist() == pytest.approx([2 ** (-8 * i / heads) for i in range(1, heads + 1)])


@pytest.mark.parametrize(
    "heads, expected", [(6, [-2, -4, -6, -8, -1, -3]), (12, [*range(-1, -9, -1), -0.5, -1.5, -2.5, -3.5])]
)
def test_slopes_of_other_counts_fill_in_between(heads: int, expected: list[float]) -> None:
    assert slopes(heads).log2().tolist() == pytest.approx(expected)


@pytest.mark.parametrize("heads", HEADS)
def test_slopes_are_positive_distinct_and_at_most_one_half_or_its_root(heads: int) -> None:
    found = slopes(heads)
    assert len(found.unique()) == heads
    assert found.min() > 0
    assert found.max() <= 2**-0.5


def test_alibi_columns_keep_widths_that_fused_kernels_take() -> None:
    for width in (8, 20, 32, 60, 64):
        q, k = widen(torch.zeros(1, 2, 3, width), torch.zeros(1, 1, 3, width), slopes(2), 1.0)
        assert q.shape[-1] == k.shape[-1]
        assert q.shape[-1] % 8 == 0
        assert q.shape[-1] - width in range(4, 12)


def test_with_equal_content_nearer_tokens_weigh_more() -> None:
    q = torch.zeros(1, 2, 6, 8)
    v = torch.eye(6)[None, None].expand(1, 2, 6, 6)
    weight = attend(*widen(q, q, slopes(2), 1.0), v, 1.0)[0, :, -1]
    assert (weight[:, 1:] > weight[:, :-1]).all()
