"""Gradients of weights go into the sums that exist, in fp32, and to autograd where there are none."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import simulate_card
from lowvram_kernels.layers.norm_linears import norm_linears
from lowvram_kernels.layers.swiglu import swiglu
from lowvram_kernels.matmul.fp32_sums import add_product_, adding_to_grads, reference
from lowvram_kernels.matmul.linear import linear
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import relative_error


def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(24, 40), (16, 40), (8, 12), (10, 40)]
    return [(0.1 * torch.randn(*shape, generator=generator)).to(DEVICE).requires_grad_() for shape in shapes]


def backward(all_weights: list[Tensor], seed: int, dtype: torch.dtype) -> None:
    """Run backward through each op that has weights of another dtype than its rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 40, generator=generator).to(dtype).to(DEVICE)
    gate_up, other, down, last = all_weights
    _, (rows, beside) = norm_linears(x, torch.ones(40, device=DEVICE), [gate_up, other])
    total = swiglu(rows, down).float().square().sum() + beside.float().square().sum()
    (total + linear(x, last).float().square().sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("card", [None, "sm86"], ids=["plain", "kernel"])
def test_sums_over_backward_passes_are_autograds_to_the_bit(card: str | None, dtype: torch.dtype) -> None:
    own, plain = weights(), weights()
    with running_on(card) if card else torch.enable_grad():
        for seed in range(3):
            with adding_to_grads():
                backward(own, seed, dtype)
            backward(plain, seed, dtype)
    assert all(weight.grad.isfinite().all() for weight in plain)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(own, plain, strict=True))


def test_a_sum_stays_where_it_is_and_one_that_is_not_fp32_is_left_to_autograd() -> None:
    own = weights()
    with adding_to_grads():
        backward(own, 0, torch.float16)
        places = [weight.grad.data_ptr() for weight in own]
        backward(own, 1, torch.float16)
    assert [weight.grad.data_ptr() for weight in own] == places
    low = [weight.detach().to(torch.bfloat16).requires_grad_() for weight in weights()]
    again = [weight.detach().clone().requires_grad_() for weight in low]
    for seed in range(2):
        with adding_to_grads():
            backward(low, seed, torch.float16)
        backward(again, seed, torch.float16)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(low, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_product_is_added_or_written_over_whatever_was_there(dtype: torch.dtype) -> None:
    a, b = torch.randn(6, 20).to(dtype).to(DEVICE), torch.randn(20, 9).to(dtype).to(DEVICE)
    total = torch.full((6, 9), torch.nan, device=DEVICE)
    add_product_(total, a, b, is_first=True)
    assert relative_error(total, a.double() @ b.double()) < 2e-3
    before = total.clone()
    add_product_(total, a, b)
    assert relative_error(total, reference(before.double(), a.double(), b.double())) < 2e-3


def test_on_a_card_a_product_and_its_sum_are_one_launch_without_a_temporary() -> None:
    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), simulate_card(CARDS["sm120"]):
        total, a, b = (
            torch.empty(6, 9),
            torch.empty(6, 20, dtype=torch.bfloat16),
            torch.empty(20, 9, dtype=torch.bfloat16),
        )
        with Names():
            add_product_(total, a, b, is_first=True)
            add_product_(total, a, b)
    assert seen == ["aten::mm", "aten::addmm"]
