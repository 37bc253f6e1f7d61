"""Products in low precision and their gradients: near the textbook's, deterministic, and nothing more is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers import norm_linears, swiglu
from lowvram_kernels.matmul import quant_linear
from lowvram_kernels.matmul.fp32_sums import adding_to_grads
from lowvram_kernels.matmul.linear import linear
from lowvram_kernels.matmul.quant_linear import (
    along_columns,
    along_rows,
    backward_input,
    backward_weight,
    forward,
    gradient_operands,
)
from torch import Tensor

from tests.kernels.cards import running_on
from tests.kernels.measures import relative_error, saved_bytes

# A number of three bits behind its leading one errs by up to 1/16, 2.6 % in the root mean square of an even spread; a
# product has two such operands.  INT8: a step of a 127th of a row's largest number, some 4 σ of it.
BOUND = {"e4m3": 0.045, "int8": 0.02}
SHAPES = [
    pytest.param((1, 300, 200), id="one row"),
    pytest.param((37, 100, 688), id="odd"),
    pytest.param((200, 256, 384), id="whole blocks"),
]
each_form = pytest.mark.parametrize("form", list(BOUND))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_form
@pytest.mark.parametrize("shape", SHAPES)
def test_all_three_products_are_near_the_textbooks(
    form: quant_linear.MatmulFormat, shape: tuple[int, int, int]
) -> None:
    rows, outputs, inputs = shape
    x, weight = numbers(rows, inputs), 0.02 * numbers(outputs, inputs, seed=1)
    dy = 1e-5 * numbers(rows, outputs, seed=2)
    found = (
        forward(along_rows(x, form), weight, form, torch.float32),
        backward_input(along_rows(dy, form), weight, form, torch.float32),
        backward_weight(along_columns(dy, form), along_columns(x, form), weight),
    )
    for own, truth in zip(found, quant_linear.reference(x.double(), weight.double(), dy.double()), strict=True):
        assert own.shape == truth.shape
        assert 0.0 < relative_error(own, truth) < BOUND[form]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_products_are_the_librarys(dtype: torch.dtype) -> None:
    x, weight, dy = numbers(7, 33).to(dtype), numbers(5, 33, seed=1), numbers(7, 5, seed=2).to(dtype)
    used = weight.to(dtype)
    assert torch.equal(forward(along_rows(x, "plain"), weight, "plain", dtype), x @ used.mT)
    assert torch.equal(backward_input(along_rows(dy, "plain"), weight, "plain", dtype), dy @ used)
    assert torch.equal(backward_weight(dy, x, torch.empty(0)), (dy.mT @ x).float())


def ops(
    form: quant_linear.MatmulFormat,
) -> dict[str, tuple[Callable[..., Tensor], list[Tensor], Callable[..., Tensor]]]:
    """Name each op that multiplies: itself, its arguments, its textbook."""
    x, gain = numbers(6, 40), 1.0 + 0.1 * numbers(40, seed=3)
    near, far, down = numbers(24, 40, seed=4), numbers(9, 40, seed=5), numbers(40, 12, seed=6)

    def both(x: Tensor, gain: Tensor, near: Tensor, far: Tensor, of: Callable[..., list[Tensor]]) -> Tensor:
        return torch.cat(of(x, gain, [near, far]), dim=-1)

    def joined(*given: Tensor) -> Tensor:
        return both(*given, of=lambda x, w, p: norm_linears.norm_linears(x, w, p, matmul_format=form)[1])

    def joined_truth(*given: Tensor) -> Tensor:
        return both(*given, of=norm_linears.reference)

    return {
        "linear": (lambda x, w: linear(x, w, form), [x, near], lambda x, w: x @ w.mT),
        "norm_linears": (joined, [x, gain, near, far], joined_truth),
        "swiglu": (lambda x, w: swiglu.swiglu(x, w, form), [numbers(5, 24, seed=7), down], swiglu.reference),
    }


@each_form
@pytest.mark.parametrize("name", ["linear", "norm_linears", "swiglu"])
def test_every_op_and_gradient_is_near_the_textbooks(form: quant_linear.MatmulFormat, name: str) -> None:
    op, given, textbook = ops(form)[name]
    own = [tensor.clone().requires_grad_() for tensor in given]
    truths = [tensor.double().requires_grad_() for tensor in given]
    y, truth = op(*own), textbook(*truths)
    upstream = numbers(*y.shape, seed=9)
    found, expected = torch.autograd.grad(y, own, upstream), torch.autograd.grad(truth, truths, upstream.double())
    assert 0.0 < relative_error(y, truth) < BOUND[form]
    for gradient, right in zip(found, expected, strict=True):
        # Through swiglu one product's error goes into the next.
        assert relative_error(gradient, right) < 2 * BOUND[form]


@each_form
@pytest.mark.parametrize("name", ["linear", "norm_linears", "swiglu"])
def test_a_low_precision_keeps_for_backward_what_the_plain_form_keeps(
    form: quant_linear.MatmulFormat, name: str
) -> None:
    def kept(form: quant_linear.MatmulFormat) -> int:
        op, given, _ = ops(form)[name]
        given = [given[0].bfloat16().requires_grad_(), *(tensor.requires_grad_() for tensor in given[1:])]
        return saved_bytes(lambda: op(*given), given[1:])

    assert kept(form) == kept("plain")


@each_form
@pytest.mark.parametrize("name", ["linear", "norm_linears", "swiglu"])
def test_gradients_are_added_to_sums_that_exist_and_given_otherwise(form: quant_linear.MatmulFormat, name: str) -> None:
    op, given, _ = ops(form)[name]
    own = [tensor.clone().requires_grad_() for tensor in given]
    weights = own[-1:] if name != "norm_linears" else own[1:]
    op(*own).square().sum().backward()
    first = [tensor.grad.clone() for tensor in own]  # type: ignore[union-attr]
    places = [tensor.grad.data_ptr() for tensor in weights]  # type: ignore[union-attr]
    with adding_to_grads():
        op(*own).square().sum().backward()
    for tensor, once in zip(own, first, strict=True):
        assert torch.equal(tensor.grad, once + once)  # type: ignore[arg-type]
    assert [tensor.grad.data_ptr() for tensor in weights] == places  # type: ignore[union-attr]


@pytest.mark.parametrize("card", ["sm86", "cpu"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@each_form
def test_a_gradients_operands_are_those_of_two_calls(
    form: quant_linear.MatmulFormat, needs: tuple[bool, bool], card: str
) -> None:
    dy = numbers(130, 70)
    with nullcontext() if card == "cpu" else running_on(card):
        found = gradient_operands(dy, form, *needs)
        expected = along_rows(dy, form), along_columns(dy, form)
    for own, right, is_needed in zip(found, expected, needs, strict=True):
        if is_needed:
            assert all(torch.equal(a, b) for a, b in zip(own, right, strict=True))
        else:
            assert own is dy


@each_form
def test_the_same_numbers_give_the_same_bits(form: quant_linear.MatmulFormat) -> None:
    def step() -> list[Tensor]:
        x, weight = numbers(50, 129).bfloat16().requires_grad_(), numbers(70, 129, seed=1).requires_grad_()
        y = linear(x, weight, form)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, weight))]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@each_form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_never_becomes_a_plausible_number(form: quant_linear.MatmulFormat, bad: float) -> None:
    x, weight = numbers(4, 300), numbers(6, 300, seed=1)
    x[2, 7] = bad
    y = linear(x, weight, form)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.nightly
@each_form
def test_dynamo_goes_through_forward_and_backward(form: quant_linear.MatmulFormat) -> None:
    x, weight = numbers(8, 40).bfloat16().requires_grad_(), numbers(12, 40, seed=1).requires_grad_()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    eager, traced = linear(x, weight, form), compiled(x, weight, form)
    assert torch.equal(eager, traced)
    upstream = torch.ones_like(eager)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (eager, traced)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["linear", "norm_linears", "swiglu"])
def test_an_unknown_form_is_named(name: str) -> None:
    op, given, _ = ops("fp4")[name]  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=f"{name}: matmul_format is 'fp4'; needs one of plain, e4m3, int8"):
        op(*given)
