"""SwiGLU against autograd of its textbook form in fp64, and its cost in bytes."""

from __future__ import annotations

import math

import pytest
import torch
from lowvram_kernels.dispatch import HiddenWork, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.swiglu import gated_product, gated_product_backward, reference, swiglu

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.2e-3}


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    ("rows", "inner"),
    [pytest.param((1,), 1, id="one"), pytest.param((7,), 37, id="odd"), pytest.param((2, 5), 688, id="seeds-688")],
)
def test_values_and_both_gradients_are_the_textbooks(
    rows: tuple[int, ...], inner: int, dtype: torch.dtype, master: torch.dtype
) -> None:
    torch.manual_seed(1)
    gate_up = (torch.randn(*rows, 2 * inner) * 2).to(dtype).requires_grad_()
    down = torch.randn(11, inner).to(dtype).to(master).requires_grad_()
    truths = [t.detach().double().requires_grad_() for t in (gate_up, down.detach().to(dtype))]
    y, truth = swiglu(gate_up, down), reference(*truths)
    upstream = torch.randn(y.shape).to(dtype)
    d_gate_up, d_down = torch.autograd.grad(y, (gate_up, down), upstream)
    d_gate_up_truth, d_down_truth = torch.autograd.grad(truth, truths, upstream.double())
    assert (y.dtype, d_gate_up.dtype, d_down.dtype) == (dtype, dtype, master)
    assert relative_error(y, truth) < TOLERANCE[dtype]
    assert relative_error(d_gate_up, d_gate_up_truth) < TOLERANCE[dtype]
    assert relative_error(d_down, d_down_truth) < max(TOLERANCE[dtype], TOLERANCE[master])


def test_the_gate_comes_first_and_only_it_is_squashed() -> None:
    gate_up, down = torch.tensor([[0.0, 2.0, 5.0, 3.0]]), torch.eye(2)
    expected = torch.tensor([[0.0, 2.0 / (1.0 + torch.tensor(-2.0).exp().item()) * 3.0]])
    torch.testing.assert_close(swiglu(gate_up, down), expected, rtol=1e-6, atol=0)


def test_it_saves_gate_up_alone() -> None:
    gate_up = torch.randn(6, 48).bfloat16().requires_grad_()
    down = torch.randn(10, 24, requires_grad=True)
    assert saved_bytes(lambda: swiglu(gate_up, down), [down]) == 6 * 48 * 2


def test_the_backward_pass_hands_the_product_along() -> None:
    gate_up, d_product = torch.randn(5, 3, 14), torch.randn(5, 3, 7)
    d_gate_up, product = gated_product_backward(d_product, gate_up)
    leaf = gate_up.clone().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    (truth,) = torch.autograd.grad(gate * torch.sigmoid(gate) * up, leaf, d_product)
    assert torch.equal(product, gated_product(gate_up))
    assert relative_error(d_gate_up, truth) < 2e-6


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_saturated_gate_neither_overflows_nor_loses_its_slope(dtype: torch.dtype) -> None:
    gate = torch.tensor([-3e4, -200.0, -90.0, 0.0, 90.0, 200.0, 3e4])
    gate_up = torch.cat([gate, torch.ones(7)])[None].to(dtype).requires_grad_()
    y = swiglu(gate_up, torch.eye(7))
    y.sum().backward()
    assert gate_up.grad is not None
    torch.testing.assert_close(y[0].float(), gate.clamp_min(0.0).to(dtype).float(), rtol=0, atol=1e-30)
    slope = torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0])
    torch.testing.assert_close(gate_up.grad[0, :7].float(), slope, rtol=0, atol=1e-30)


def test_strides_do_not_matter() -> None:
    base, down = torch.randn(3, 5, 40), torch.randn(6, 10)
    strided = base[:, :, ::2].detach().requires_grad_()
    plain = base[:, :, ::2].contiguous().requires_grad_()
    torch.testing.assert_close(swiglu(strided, down), swiglu(plain, down), rtol=1e-6, atol=1e-6)
    upstream = torch.randn(5, 3, 6).transpose(0, 1)
    (a,) = torch.autograd.grad(swiglu(strided, down), strided, upstream)
    (b,) = torch.autograd.grad(swiglu(plain, down), plain, upstream.contiguous())
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", ["gate_up", "down"])
def test_a_gradient_that_nobody_asks_for_is_not_made(frozen: str) -> None:
    gate_up, down = torch.randn(3, 8), torch.randn(5, 4)
    (down if frozen == "gate_up" else gate_up).requires_grad_()
    swiglu(gate_up, down).sum().backward()
    assert (gate_up.grad is None) == (frozen == "gate_up")
    assert (down.grad is None) == (frozen == "down")


@pytest.mark.parametrize("width", [7, 6, 16], ids=["odd", "too-narrow", "too-wide"])
def test_a_gate_that_does_not_fit_down_is_named(width: int) -> None:
    with pytest.raises(ShapeError, match=r"swiglu: gate_up is \[2, "):
        swiglu(torch.ones(2, width), torch.ones(3, 4))


def test_integers_are_refused() -> None:
    with pytest.raises(ShapeError, match="floating"):
        swiglu(torch.ones(2, 8, dtype=torch.int64), torch.ones(3, 4))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (7, 74), (2, 5, 1376), (3, 2048)], ids=str)
def test_the_kernels_are_the_textbook(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    gate_up = (torch.randn(*shape, generator=generator) * 2).to(dtype).to(DEVICE)
    d_product = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(dtype).to(DEVICE)
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    truth = gate * torch.sigmoid(gate) * up
    (d_truth,) = torch.autograd.grad(truth, leaf, d_product.double())
    with running_on("sm86"):
        product, (d_gate_up, again) = gated_product(gate_up), gated_product_backward(d_product, gate_up)
        parts = gate_up.repeat_interleave(2, -1)[..., ::2]  # as other strides
        assert torch.equal(gated_product(parts), product)
    assert torch.equal(again, product)
    assert product.dtype == d_gate_up.dtype == dtype
    assert relative_error(product, truth) < 0.5 * TOLERANCE[dtype]
    assert relative_error(d_gate_up, d_truth) < 0.5 * TOLERANCE[dtype]


def test_gates_far_from_zero_neither_overflow_nor_turn_into_nan() -> None:
    gate_up = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0] + [2.0] * 5], device=DEVICE)
    with running_on("sm86"):
        product = gated_product(gate_up)
        d_gate_up, _ = gated_product_backward(torch.ones_like(product), gate_up)
    assert product.flatten().tolist() == pytest.approx([0.0, -60 * math.exp(-30), 0.0, 60.0, 400.0], abs=1e-9)
    assert d_gate_up[0, :5].tolist() == pytest.approx([0.0, -58 * math.exp(-30), 1.0, 2.0, 2.0], abs=1e-9)


def test_on_a_card_each_pass_is_one_launch_of_the_least_bytes() -> None:
    works: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], works.append):
        gate_up, d_product = torch.empty(512, 1376, dtype=torch.bfloat16), torch.empty(512, 688, dtype=torch.bfloat16)
        with LiveBytes().ignore(gate_up, d_product) as live:
            gated_product(gate_up)
            assert live.peak == d_product.nbytes
            d_gate_up, product = gated_product_backward(d_product, gate_up)
            assert live.peak == d_gate_up.nbytes + product.nbytes
    assert [work.moved_bytes for work in works] == [3 * d_product.nbytes, 6 * d_product.nbytes]
