"""Linear with a master of another dtype: truth, and no copy of the weights kept."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul.linear import linear, reference

from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "shape", [pytest.param((7,), id="vector"), pytest.param((3, 37), id="odd"), pytest.param((2, 5, 16), id="batch")]
)
def test_values_and_both_gradients_are_the_textbooks(
    shape: tuple[int, ...], dtype: torch.dtype, master: torch.dtype
) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(13, shape[-1]).to(dtype).to(master).requires_grad_()
    used = weight.detach().to(dtype)  # the truth multiplies what the op multiplies: the cast master
    truths = [t.detach().double().requires_grad_() for t in (x, used)]
    y, truth = linear(x, weight), reference(*truths)
    upstream = torch.randn(y.shape).to(dtype)
    dx, dweight = torch.autograd.grad(y, (x, weight), upstream)
    dx_truth, dweight_truth = torch.autograd.grad(truth, truths, upstream.double())
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, master)
    assert relative_error(y, truth) < TOLERANCE[dtype]
    assert relative_error(dx, dx_truth) < TOLERANCE[dtype]
    assert relative_error(dweight, dweight_truth) < max(TOLERANCE[dtype], TOLERANCE[master])


def test_it_saves_x_and_the_master_alone() -> None:
    x = torch.randn(6, 24).bfloat16().requires_grad_()
    weight = torch.randn(10, 24, requires_grad=True)
    assert saved_bytes(lambda: linear(x, weight), [weight]) == 6 * 24 * 2
    assert saved_bytes(lambda: linear(x, weight), []) == 6 * 24 * 2 + 10 * 24 * 4


def test_the_cast_copy_dies_with_the_product() -> None:
    x, weight = torch.randn(6, 24).bfloat16().requires_grad_(), torch.randn(10, 24, requires_grad=True)
    with LiveBytes().ignore(x, weight) as live:
        y = linear(x, weight)
    assert live.now == y.nbytes
    assert live.peak == y.nbytes + weight.numel() * 2


def test_strides_do_not_matter() -> None:
    x, weight = torch.randn(9, 4, 6).bfloat16().movedim(0, -1), torch.randn(9, 5).mT
    a, b = weight.detach().requires_grad_(), weight.contiguous().requires_grad_()
    linear(x, a).sum().backward()
    linear(x.contiguous(), b).sum().backward()
    assert torch.equal(linear(x, a), linear(x.contiguous(), b))
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_that_nobody_asks_for_is_not_made(frozen: str) -> None:
    x, weight = torch.randn(3, 4).bfloat16(), torch.randn(5, 4)
    (weight if frozen == "x" else x).requires_grad_()
    linear(x, weight).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        pytest.param(torch.ones(2, 4), torch.ones(3, 5), id="width"),
        pytest.param(torch.ones(2, 4), torch.ones(4), id="one-dimension"),
        pytest.param(torch.ones(2, 4), torch.ones(3, 4, dtype=torch.int8), id="integer"),
    ],
)
def test_arguments_that_cannot_be_right_are_named(x: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"linear: .*weight"):
        linear(x, weight)
