"""A product of codes that is added to a sum by the kernel that makes it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.scaled_matmul import scaled_matmul

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.matmul.test_scaled_matmul import block_scaled_products, each_form, operands, random, to_device

__all__ = ["block_scaled_products"]  # the fixture


@pytest.mark.parametrize("card", [*CARDS, "cpu"])
@each_form
def test_a_product_is_added_to_a_sum_in_its_place(card: str, form: str) -> None:
    a, b = operands((130, 300, 150), form)
    device = "cpu" if card == "cpu" else DEVICE
    before = random(130, 150, seed=7).to(device)
    total = before.clone()
    with nullcontext() if card == "cpu" else running_on(card):
        own = [to_device(each, device) for each in (a, b)]
        product = scaled_matmul(*own, torch.float32)
        assert scaled_matmul(*own, torch.float32, total=total) is total
    # One kernel computes both: a sum in fp32 of the very product.
    assert torch.equal(total, before + product)


def test_a_sum_that_does_not_fit_is_named() -> None:
    a, b = operands((4, 128, 6), "e4m3")
    for total in (torch.zeros(4, 5), torch.zeros(4, 6).bfloat16(), torch.zeros(6, 4).mT):
        with pytest.raises(ShapeError, match=r"total is .*; needs \[4, 6\] torch.float32, contiguous"):
            scaled_matmul(a, b, torch.float32, total=total)
