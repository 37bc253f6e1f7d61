"""RMSNorm against autograd of its textbook form in fp64, and its cost in bytes."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.rms_norm import reference, rms_norm

from tests.kernels.measures import relative_error, saved_bytes

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}
SHAPES = [
    pytest.param((5,), id="one-vector"),
    pytest.param((1, 1), id="one-value"),
    pytest.param((3, 37), id="odd"),
    pytest.param((2, 5, 384), id="batch"),
    pytest.param((2, 3, 2, 24), id="heads"),
]


def with_gradients(shape: tuple[int, ...], dtype: torch.dtype, master: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x, weight = torch.randn(shape).to(dtype), (torch.rand(shape[-1]) + 0.5).to(master)
    return [x.requires_grad_(), weight.requires_grad_()]


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_both_gradients_are_the_textbooks(
    shape: tuple[int, ...], dtype: torch.dtype, master: torch.dtype
) -> None:
    x, weight = with_gradients(shape, dtype, master)
    truths = [t.detach().double().requires_grad_() for t in (x, weight)]
    y, truth = rms_norm(x, weight), reference(*truths)
    upstream = torch.randn(shape).to(dtype)
    dx, dweight = torch.autograd.grad(y, (x, weight), upstream)
    dx_truth, dweight_truth = torch.autograd.grad(truth, truths, upstream.double())
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, master)
    assert relative_error(y, truth) < TOLERANCE[dtype]
    # A single value is its own norm: dx is a difference that all but cancels, so its error is absolute.
    assert relative_error(dx, dx_truth) < TOLERANCE[dtype] or shape[-1] == 1
    assert relative_error(dweight, dweight_truth) < max(TOLERANCE[dtype], TOLERANCE[master])


def test_rows_leave_with_unit_root_mean_square() -> None:
    x = torch.randn(7, 129) * torch.logspace(-2, 3, 7)[:, None]
    torch.testing.assert_close(rms_norm(x, torch.ones(129)).square().mean(-1), torch.ones(7), rtol=2e-2, atol=0)
    assert not torch.allclose(rms_norm(x + 5.0, torch.ones(129)).mean(-1), torch.zeros(7), atol=1e-3)


def test_fp32_is_the_norm_that_exported_models_run() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm(384, eps=1e-6)
    torch.manual_seed(2)
    torch.nn.init.uniform_(llama.weight, 0.5, 2.0)
    x = torch.randn(64, 384)
    torch.testing.assert_close(rms_norm(x, llama.weight, 1e-6), llama(x), rtol=1e-6, atol=1e-6)


def test_scaling_a_row_leaves_the_result_and_divides_the_gradient() -> None:
    x, weight = with_gradients((6, 50), torch.float32, torch.float32)
    upstream = torch.randn(6, 50)
    (small,) = torch.autograd.grad(rms_norm(x, weight, 0.0), x, upstream)
    (large,) = torch.autograd.grad(rms_norm(x * 8.0, weight, 0.0), x, upstream)
    torch.testing.assert_close(rms_norm(x * 8.0, weight, 0.0), rms_norm(x, weight, 0.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(large, small, rtol=1e-5, atol=1e-6)  # 8 from the chain rule, 1/8 from the norm


@pytest.mark.parametrize("transform", ["transposed", "sliced", "expanded"])
def test_strides_do_not_matter(transform: str) -> None:
    base = torch.randn(4, 6, 10)
    x = {"transposed": base.mT, "sliced": base[:, ::2, 1:9], "expanded": base[:1].expand(3, 6, 10)}[transform]
    weight = torch.rand(x.shape[-1])
    upstream = torch.randn(x.shape[-1], *x.shape[:-1]).movedim(0, -1)
    a, b = x.detach().requires_grad_(), x.clone(memory_format=torch.contiguous_format).requires_grad_()
    torch.testing.assert_close(rms_norm(a, weight), rms_norm(b, weight), rtol=1e-6, atol=1e-6)
    (da,) = torch.autograd.grad(rms_norm(a, weight), a, upstream)
    (db,) = torch.autograd.grad(rms_norm(b, weight), b, upstream.contiguous())
    torch.testing.assert_close(da, db, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 3e4], ids=["zeros", "tiny", "near-fp16s-limit"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_extreme_rows_stay_finite(scale: float, dtype: torch.dtype) -> None:
    x = (torch.randn(4, 40).clamp(-2, 2) * scale).to(dtype).requires_grad_()
    weight = torch.ones(40, requires_grad=True)
    y = rms_norm(x, weight)
    y.backward(torch.ones_like(y))
    assert y.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_it_saves_x_and_one_fp32_per_row() -> None:
    x, weight = with_gradients((3, 11, 64), torch.bfloat16, torch.float32)
    assert saved_bytes(lambda: rms_norm(x, weight), [weight]) == 3 * 11 * 64 * 2 + 3 * 11 * 4


def test_a_gradient_that_nobody_asks_for_is_not_made() -> None:
    x, weight = with_gradients((5, 8), torch.float32, torch.float32)
    rms_norm(x.detach(), weight).sum().backward()
    assert (x.grad, weight.grad is None) == (None, False)
    weight.grad = None
    rms_norm(x, weight.detach()).sum().backward()
    assert (x.grad is None, weight.grad) == (False, None)


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(1, 5), torch.ones(5, dtype=torch.int64)], ids=str)
def test_a_weight_that_cannot_be_right_is_named(weight: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"rms_norm: .*weight"):
        rms_norm(torch.ones(2, 5), weight)
