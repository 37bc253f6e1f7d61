"""Keyed dropout: the mask is a pure function of names, and looks like chance."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.dropout import dropout, hash_keys
from torch import Tensor

from tests.kernels.measures import LiveBytes, saved_bytes

FROZEN_KEYS = [4598100691663010955, 5882419215729581197, 5867848261104019516]
FROZEN_MASK = [
    [1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1],
    [0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 0, 1],
]


def kept(keys: Tensor, purpose: int = 0, positions: int = 64, width: int = 192, p: float = 0.5) -> Tensor:
    """The mask itself as 0 and 1: [B, T, D]."""
    return dropout(torch.ones(keys.shape[0], positions, width), p, keys, purpose) * (1.0 - p)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_the_share_of_dropped_places_is_p(p: float) -> None:
    mask = kept(hash_keys(7, torch.arange(64)), p=p, positions=256)
    assert 1.0 - mask.mean().item() == pytest.approx(p, rel=0.01)
    assert mask.unique().tolist() == pytest.approx([0.0, 1.0])


def test_values_are_scaled_so_that_the_mean_stays() -> None:
    x = torch.full((2, 40, 50), 3.0)
    y = dropout(x, 0.2, hash_keys(1, torch.arange(2)), 0)
    assert set(y.unique().tolist()) == {0.0, 3.75}
    assert y.mean().item() == pytest.approx(3.0, rel=0.05)


def test_rows_columns_samples_and_purposes_are_uncorrelated() -> None:
    keys = hash_keys(3, torch.arange(32))
    mask, other = kept(keys), kept(keys, purpose=1)
    limit = 5 / (mask.numel() / 2) ** 0.5  # five standard errors
    for shift in (1, 2, 3, 16, 32):
        assert abs(correlation(mask[:, shift:], mask[:, :-shift])) < limit
        assert abs(correlation(mask[..., shift:], mask[..., :-shift])) < limit
    for shift in (1, 2, 16):
        assert abs(correlation(mask[shift:], mask[:-shift])) < limit
    assert abs(correlation(mask, other)) < limit
    assert abs(correlation(mask[:, 1:, :-1], mask[:, :-1, 1:])) < limit
    assert abs(correlation(mask, kept(hash_keys(4, torch.arange(32))))) < limit


@pytest.mark.parametrize("over", [(0, 1), (0, 2), (1, 2)], ids=["columns", "rows", "samples"])
def test_no_row_column_or_sample_is_favoured(over: tuple[int, int]) -> None:
    mask = kept(hash_keys(11, torch.arange(48)), positions=96, width=128)
    counts = mask.sum(over)
    places = mask.numel() / counts.numel()
    # Binomial counts: variance n/4.  The ratio's own standard error is sqrt(2 / counts).
    ratio = counts.var().item() / (places / 4)
    assert ratio == pytest.approx(1.0, abs=5 * (2 / counts.numel()) ** 0.5)


def test_a_samples_mask_depends_on_no_other_sample() -> None:
    keys = hash_keys(5, torch.arange(6))
    whole = kept(keys)
    assert torch.equal(whole[4:5], kept(keys[4:5]))
    assert torch.equal(whole[[5, 0]], kept(keys[[5, 0]]))


def test_a_longer_or_wider_batch_keeps_the_mask_where_both_are() -> None:
    keys = hash_keys(5, torch.arange(2))
    assert torch.equal(kept(keys, positions=40, width=70)[:, :33, :51], kept(keys, positions=33, width=51))


def test_the_mask_never_changes_between_releases() -> None:
    """A run resumed with a newer version must draw the same masks: these figures are frozen."""
    assert hash_keys(0, torch.tensor([0, 1, 2**40])).tolist() == FROZEN_KEYS
    assert kept(torch.tensor([42]), 3, 2, 16)[0].int().tolist() == FROZEN_MASK


def test_backward_uses_the_same_mask_and_scale() -> None:
    x = torch.randn(3, 7, 11, dtype=torch.float64, requires_grad=True)
    keys = hash_keys(9, torch.arange(3))
    upstream = torch.randn(7, 3, 11, dtype=torch.float64).transpose(0, 1)
    (dx,) = torch.autograd.grad(dropout(x, 0.3, keys, 2), x, upstream)
    mask = kept(keys, 2, 7, 11, 0.3).round().double()
    torch.testing.assert_close(dx, upstream * mask / 0.7, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_dropped_infinity_is_a_zero_and_the_dtype_stays(dtype: torch.dtype) -> None:
    x = torch.full((1, 8, 8), float("inf"), dtype=dtype)
    y = dropout(x, 0.5, torch.tensor([1]), 0)
    assert y.dtype == dtype
    assert not y.isnan().any()
    assert 0 < (y == 0).sum() < 64


def test_it_saves_the_keys_alone() -> None:
    x, keys = torch.randn(4, 16, 32, requires_grad=True), hash_keys(0, torch.arange(4))
    assert saved_bytes(lambda: dropout(x, 0.1, keys, 0), []) == 4 * 8


def test_the_mask_of_one_sample_at_a_time_is_made() -> None:
    x, keys = torch.randn(32, 16, 64), hash_keys(0, torch.arange(32))
    with LiveBytes().ignore(x, keys) as live:
        dropout(x, 0.1, keys, 0)
    assert live.peak < x.nbytes + 16 * 64 * 17 + 16_384


def test_nothing_is_dropped_at_zero() -> None:
    x = torch.randn(2, 3, 4)
    assert dropout(x, 0.0, torch.zeros(2, dtype=torch.int64), 0) is x


def test_keys_differ_by_seed_and_sample_and_fit_int64() -> None:
    keys = torch.cat([hash_keys(seed, torch.arange(50_000)) for seed in (0, 1, -1, 2**63)])
    assert keys.unique().numel() == 200_000
    assert keys.min() >= 0
    bits = (keys[:, None] >> torch.arange(63)) & 1
    torch.testing.assert_close(bits.double().mean(0), torch.full((63,), 0.5).double(), rtol=0.015, atol=0)
    assert hash_keys(0, torch.arange(6).view(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("x", "p", "keys", "named"),
    [
        pytest.param(torch.ones(2, 3), 0.1, torch.zeros(2, dtype=torch.int64), r"x is \[2, 3\]", id="two-dimensions"),
        pytest.param(torch.ones(2, 3, 4), 0.1, torch.zeros(3, dtype=torch.int64), r"keys \[3\]", id="keys"),
        pytest.param(torch.ones(2, 3, 4), 0.1, torch.zeros(2), "torch.float32", id="float-keys"),
        pytest.param(torch.ones(2, 3, 4), 1.0, torch.zeros(2, dtype=torch.int64), "p is 1.0", id="p-of-one"),
        pytest.param(torch.ones(2, 3, 4), -0.1, torch.zeros(2, dtype=torch.int64), "p is -0.1", id="p-below-zero"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(x: Tensor, p: float, keys: Tensor, named: str) -> None:
    with pytest.raises(ShapeError, match=named):
        dropout(x, p, keys, 0)
    with pytest.raises(ShapeError, match="int64"):
        hash_keys(0, torch.zeros(3))
