"""Gradients of weights go into the sums that exist, in fp32, and to autograd where there are none."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, simulate_card
from lowvram_kernels.layers.norm_linears import norm_linears
from lowvram_kernels.layers.swiglu import swiglu
from lowvram_kernels.matmul import fp32_sums
from lowvram_kernels.matmul.fp32_sums import add_product_, adding_to_grads, product_for, reference
from lowvram_kernels.matmul.linear import linear
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error


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
    works: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append):
        total, (a, b) = torch.empty(6, 9), (torch.empty(6, 20).bfloat16(), torch.empty(20, 9).bfloat16())
        with LiveBytes().ignore(total, a, b) as live:
            add_product_(total, a, b, is_first=True)
            add_product_(total, a, b)
            assert live.peak == 0
            first = product_for(total, a, b)
    assert first is not None
    assert live.peak == first.nbytes == total.nbytes
    assert [work.product_flops for work in works] == [2 * 6 * 20 * 9] * 3
    assert [work.moved_bytes for work in works] == [(6 + 9) * 20 * 2 + times * total.nbytes for times in (1, 2, 1)]


@pytest.mark.parametrize(
    ("card", "dtype", "widens"),
    [
        ("sm75", torch.bfloat16, False),  # torch refuses it below 8.0
        ("sm75", torch.float16, True),
        ("sm80", torch.bfloat16, True),
        ("sm120", torch.float32, False),
    ],
)
def test_the_library_sums_in_fp32_what_the_card_can(card: str, dtype: torch.dtype, widens: bool) -> None:
    with torch.device("meta"), simulate_card(CARDS[card]):
        assert fp32_sums._widens(torch.empty(2, 3, dtype=dtype)) == widens


def test_a_torch_that_cannot_adds_a_product_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp32_sums, "_HAS_FP32_SUMS", False)
    with torch.device("meta"), simulate_card(CARDS["sm120"]):
        total, (a, b) = torch.empty(6, 9), (torch.empty(6, 20).bfloat16(), torch.empty(20, 9).bfloat16())
        with LiveBytes().ignore(total, a, b) as live:
            add_product_(total, a, b)
    assert live.peak == 6 * 9 * 2
