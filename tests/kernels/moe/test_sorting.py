"""Choices sorted by expert, rows brought back to their tokens, and SwiGLU times a routing weight."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe import sorting, weighted_swiglu
from lowvram_kernels.moe.sorting import combine, sort_choices
from lowvram_kernels.moe.weighted_swiglu import weighted_product, weighted_product_backward

from tests.kernels.cards import DEVICE, running_on
from tests.kernels.measures import relative_error

each_path = pytest.mark.parametrize("card", ["sm86", None], ids=["kernels", "plain"])


def path(card: str | None):
    return running_on(card) if card else override_card(Card(DEVICE))


@each_path
@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "share"),
    [(41, 2, 5, 16), (1, 1, 1, 1024), (700, 4, 64, 256), (300, 3, 130, 64)],
)
@pytest.mark.parametrize("has_slots", [False, True], ids=["own order", "slots"])
def test_every_choice_has_the_place_of_a_stable_sort(
    tokens: int,
    choices: int,
    experts: int,
    share: int,
    has_slots: bool,
    card: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sorting, "_SHARE", share)
    generator = torch.Generator().manual_seed(experts)
    # Some experts are never chosen.
    ids = (torch.rand(tokens, choices, generator=generator).square() * experts).long().to(DEVICE)
    slots = torch.randperm(experts, generator=generator).to(DEVICE) if has_slots else None
    truth = sorting.reference(ids, experts, slots)
    with path(card):
        found = sort_choices(ids, experts, slots)
    for own, right in zip(found, truth, strict=True):
        assert torch.equal(own.to(right.dtype).cpu(), right.cpu())
    assert found.load.dtype == torch.float32


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_return_to_their_tokens_with_what_is_added(dtype: torch.dtype, card: str | None) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 5, (37, 3), generator=generator).to(DEVICE)
    rows = torch.randn(111, 300, generator=generator).to(dtype).to(DEVICE)
    added = torch.randn(37, 300, generator=generator).to(dtype).to(DEVICE)
    with path(card):
        place = sort_choices(ids, 5).place
        alone, both = combine(rows, place, 3), combine(rows, place, 3, added)
    truth = rows.double()[place.long()].view(37, 3, 300).sum(1)
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    assert relative_error(alone, truth) < bound
    assert relative_error(both, truth + added.double()) < 2 * bound


@each_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [13, 300])
def test_the_weighted_products_values_and_gradients_are_the_textbooks(
    width: int, dtype: torch.dtype, card: str | None
) -> None:
    generator = torch.Generator().manual_seed(width)
    gate_up = torch.randn(42, 2 * width, generator=generator).to(dtype).to(DEVICE)
    weights = torch.rand(21, 2, generator=generator).to(DEVICE)
    dh = torch.randn(42, width, generator=generator).to(dtype).to(DEVICE)
    ids = torch.randint(0, 5, (21, 2), generator=generator).to(DEVICE)
    with path(card):
        order = sort_choices(ids, 5).order
        h = weighted_product(gate_up, weights, order)
        alone = weighted_product_backward(dh.clone(), gate_up, weights, order, False)
        found = weighted_product_backward(dh.clone(), gate_up, weights, order, True)
    truths = [gate_up.double().requires_grad_(), weights.double().requires_grad_()]
    truth = weighted_swiglu.reference(*truths, order.long())
    expected = torch.autograd.grad(truth, truths, dh.double())
    bound = 2e-6 if dtype == torch.float32 else 1.2e-2
    assert relative_error(h, truth) < bound
    for own, right in zip(found, (expected[0], truth, expected[1]), strict=True):
        assert relative_error(own, right) < bound
    assert alone[2] is None
    assert torch.equal(alone[0], found[0])
    assert found[2] is not None
    assert found[2].shape == weights.shape


def test_ids_and_slots_that_cannot_be_right_are_named() -> None:
    with pytest.raises(ShapeError, match="ids are"):
        sort_choices(torch.zeros(3, 2, dtype=torch.int32), 5)
    with pytest.raises(ShapeError, match="slots are"):
        sort_choices(torch.zeros(3, 2, dtype=torch.int64), 5, torch.zeros(4, dtype=torch.int64))
