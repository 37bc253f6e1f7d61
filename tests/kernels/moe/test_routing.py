"""Routing: the textbook's choices, weights and gradients, by the kernels and by plain PyTorch; rows without numbers."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe.routing import reference, route
from torch import Tensor

from tests.kernels.cards import DEVICE, running_on
from tests.kernels.measures import relative_error, saved_bytes

# Tokens, width, experts, choices: what no tile divides, one of everything, as many choices as experts, many experts.
SHAPES = [(41, 37, 5, 2), (1, 1, 1, 1), (70, 64, 8, 8), (33, 100, 60, 6)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["×".join(map(str, shape)) for shape in SHAPES])
each_path = pytest.mark.parametrize("card", ["sm86", None], ids=["kernels", "plain"])
FACTOR = 2.5


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and bias whose scores differ by far more than rounding."""
    tokens, width, experts, _ = shape
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(experts, width, generator=generator) / width**0.5
    bias = 0.3 * torch.randn(experts, generator=generator)
    return x.to(dtype).to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)


def by_expert(weights: Tensor, ids: Tensor, experts: int) -> Tensor:
    """Return each expert's weight, 0 where it is not chosen: the order of the choices means nothing."""
    return torch.zeros(len(ids), experts, dtype=torch.float64, device=ids.device).scatter(1, ids, weights.double())


@each_path
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_choices_weights_and_gradients_are_the_textbooks(
    shape: tuple[int, int, int, int], dtype: torch.dtype, card: str | None
) -> None:
    x, weight, bias = draw(shape, dtype)
    experts, choices = shape[2:]
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    truths = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = by_expert(*reference(*truths, bias.double(), choices, FACTOR), experts)
    with running_on(card) if card else override_card(Card(DEVICE)):
        weights, ids = route(*leaves, bias, choices, FACTOR)
        found = by_expert(weights, ids, experts)
        upstream = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        gradients = torch.autograd.grad(found, leaves, upstream)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)
    assert torch.equal(found > 0, expected > 0)
    assert relative_error(found, expected) < 1e-6
    assert [gradient.dtype for gradient in gradients] == [dtype, torch.float32]
    for gradient, right in zip(gradients, torch.autograd.grad(expected, truths, upstream), strict=True):
        bound = 2e-5 if gradient.dtype == torch.float32 else 4e-3
        assert relative_error(gradient, right) < bound or right.abs().max() < 1e-9  # one choice's weight is constant


@each_path
def test_a_token_that_is_not_a_number_still_has_experts(card: str | None) -> None:
    x, weight, bias = draw(SHAPES[0])
    x[3], x[7, 0] = torch.nan, torch.inf
    with running_on(card) if card else override_card(Card(DEVICE)):
        weights, ids = route(x, weight, bias, 2, 1.0)
    assert ids.min() >= 0
    assert ids.max() < 5
    assert (ids[:, 0] != ids[:, 1]).all()
    assert weights[3].isnan().all()
    assert weights[[0, 1, 2, 4, 5, 6]].isfinite().all()


def test_equal_scores_go_to_the_first_experts_and_the_chosen_scores_alone_are_kept() -> None:
    x, weight, bias = draw((40, 16, 8, 3))
    with running_on("sm86"):
        _, ids = route(x, torch.zeros_like(weight), torch.zeros_like(bias), 3, 1.0)
        learning = weight.requires_grad_()
        kept = saved_bytes(lambda: route(x.requires_grad_(), learning, bias, 3, 1.0)[0], [learning])
    assert torch.equal(ids.cpu(), torch.tensor([[0, 1, 2]] * 40))
    assert kept == x.numel() * 4 + 40 * 3 * 12


@pytest.mark.parametrize(
    ("change", "what"),
    [({"weight": (5, 9)}, "needs? "), ({"bias": (4,)}, "bias"), ({"top_k": 6}, "1 to 5"), ({"top_k": 0}, "top_k is 0")],
)
def test_arguments_that_cannot_be_right_are_named(change: dict, what: str) -> None:
    weight, bias = torch.ones(change.get("weight", (5, 8))), torch.ones(change.get("bias", (5,)))
    with pytest.raises(ShapeError, match=what.replace("needs? ", "they need")):
        route(torch.ones(3, 8), weight, bias, change.get("top_k", 2), 1.0)
