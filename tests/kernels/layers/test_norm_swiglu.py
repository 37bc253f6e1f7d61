"""A norm and its SwiGLU layer as one op: the bits of two ops, the textbook's gradients, no more memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lowvram_kernels.dispatch import Launch, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.norm_linears import norm_linears
from lowvram_kernels.layers.norm_swiglu import norm_swiglu, reference
from lowvram_kernels.layers.swiglu import swiglu
from lowvram_kernels.matmul.fp32_sums import adding_to_grads
from lowvram_kernels.matmul.kept_codes import KeptCodes
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

Form = Callable[..., tuple[Tensor, Tensor]]


def two_ops(x: Tensor, gain: Tensor, gate_up: Tensor, down: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    stream, (projected,) = norm_linears(x, gain, [gate_up], matmul_format="e4m3", added=added)
    return stream, swiglu(projected, down, "e4m3")


def one_op(x: Tensor, gain: Tensor, gate_up: Tensor, down: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    return norm_swiglu(x, gain, gate_up, down, matmul_format="e4m3", added=added)


def given(dtype: torch.dtype = torch.float16, rows: int = 37, width: int = 72, inner: int = 256) -> list[Tensor]:
    """Return x, what is added to it, the norm's weight and both matrices."""
    torch.manual_seed(4)
    x, added = (torch.randn(rows, width).to(dtype) for _ in range(2))
    tensors = x, added, 1.0 + 0.1 * torch.randn(width), torch.randn(2 * inner, width), torch.randn(width, inner)
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


def results(form: Form, tensors: list[Tensor], adds: bool) -> list[Tensor]:
    x, added, gain, gate_up, down = tensors
    stream, y = form(x, gain, gate_up, down, added if adds else None)
    learning = [x, *([added] if adds else []), gain, gate_up, down]
    upstream = [torch.ones_like(stream), y.detach() * 1e-3]
    return [stream, y, *torch.autograd.grad([stream, y], learning, upstream)]


@pytest.mark.parametrize("adds", [False, True], ids=["alone", "of a sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keeps", [False, True], ids=["at use", "kept codes"])
def test_it_gives_the_bits_of_the_two_ops(dtype: torch.dtype, adds: bool, keeps: bool) -> None:
    tensors = given(dtype)
    with running_on("sm86"):
        expected = results(two_ops, tensors, adds)
        codes = KeptCodes(tensors[3:], "e4m3")
        codes.refresh()
        if keeps:
            with codes.in_use():
                found = results(one_op, tensors, adds)
        else:
            found = results(one_op, tensors, adds)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_its_gradients_are_near_the_textbooks() -> None:
    tensors = given()
    truths = [tensor.detach().double().requires_grad_() for tensor in tensors]
    with running_on("sm86"):
        _, y = one_op(tensors[0], *tensors[2:], tensors[1])
        found = torch.autograd.grad(y, tensors, 1e-3 * y.detach())
    truth = reference(truths[0] + truths[1], *truths[2:])
    expected = torch.autograd.grad(truth, truths, 1e-3 * truth.detach())
    assert 0.0 < relative_error(y, truth) < 0.07
    for own, right in zip(found, expected, strict=True):
        assert relative_error(own, right) < 0.13, "four products of E4M3 in a row"


def test_it_keeps_what_the_two_ops_keep_and_backward_holds_less() -> None:
    def peak(form: Form) -> tuple[int, int]:
        with torch.device("meta"), simulate_card(CARDS["sm120"]):
            tensors = [torch.empty(512, 768, dtype=torch.bfloat16), torch.empty(768)]
            tensors += [torch.empty(4096, 768), torch.empty(768, 2048)]
            x, *weights = (tensor.requires_grad_() for tensor in tensors)
            kept = saved_bytes(lambda: form(x, *weights, None)[1], weights)
            sums = [torch.empty_like(weight) for weight in weights]
            for weight, total in zip(weights, sums, strict=True):
                weight.grad = total
            _, y = form(x, *weights, None)
            d_y = torch.empty_like(y)
            with LiveBytes().ignore(d_y, *weights, *sums) as live, adding_to_grads():
                y.backward(d_y)
            return kept, live.peak

    (own_kept, own_peak), (kept, other_peak) = peak(one_op), peak(two_ops)
    assert own_kept == kept
    assert own_peak < other_peak


@pytest.mark.parametrize("frozen", [2, 3, 4], ids=["norm", "gate_up", "down"])
def test_a_layer_of_which_a_part_is_frozen_is_two_ops(frozen: int) -> None:
    tensors = given()
    tensors[frozen].requires_grad_(False)
    with running_on("sm86"):
        _, y = one_op(tensors[0], *tensors[2:], tensors[1])
        y.sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [index == frozen for index in range(5)]


def test_a_width_of_no_whole_blocks_is_two_ops_and_readers_see_the_same() -> None:
    for inner in (200, 256):
        tensors = given(inner=inner)
        with running_on("sm86"):
            learning = one_op(tensors[0], *tensors[2:], tensors[1])
            with torch.no_grad():
                reading = one_op(tensors[0], *tensors[2:], tensors[1])
            expected = two_ops(tensors[0], *tensors[2:], tensors[1])
        for own, read, other in zip(learning, reading, expected, strict=True):
            assert torch.equal(own, other)
            assert torch.equal(read, other)


def test_a_gradient_of_the_stream_alone_goes_through() -> None:
    tensors = given()
    with running_on("sm86"):
        stream, _ = one_op(tensors[0], *tensors[2:], tensors[1])
        stream.sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [False, False, True, True, True]
    assert torch.equal(tensors[0].grad, torch.ones_like(stream))  # type: ignore[arg-type]


def test_it_adds_to_sums_that_exist() -> None:
    tensors = given()
    with running_on("sm86"):
        for _ in range(2):
            with adding_to_grads():
                one_op(tensors[0], *tensors[2:], tensors[1])[1].sum().backward()
        once = results(one_op, tensors, True)
        y = one_op(tensors[0], *tensors[2:], tensors[1])[1]
        once = list(torch.autograd.grad(y.sum(), tensors))
    for tensor, gradient in zip(tensors, once, strict=True):
        assert torch.equal(tensor.grad, gradient + gradient)  # type: ignore[arg-type]


def test_no_number_between_its_parts_is_written_to_be_rounded() -> None:
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], note_launch=launches.append):
        tensors = [torch.empty(512, 768, dtype=torch.bfloat16), torch.empty(768)]
        tensors += [torch.empty(4096, 768), torch.empty(768, 2048)]
        x, *weights = (tensor.requires_grad_() for tensor in tensors)
        _, y = norm_swiglu(x, *weights, matmul_format="e4m3")
        y.backward(torch.empty_like(y))
    found = [what.kernel for what in launches if what.kernel != "mxfp8_kernel"]
    assert found == [
        "rms_norm_codes_kernel",
        "e4m3_blocks_kernel",
        "swiglu_codes_kernel",
        "e4m3_blocks_kernel",
        "e4m3_both_ways_kernel",
        "e4m3_blocks_kernel",
        "swiglu_backward_codes_kernel",
        "e4m3_blocks_kernel",
        "rms_norm_backward_kernel",
        "sum_parts_kernel",
        "normed_columns_kernel",
    ]
    assert len(launches) - len(found) == 6


def test_what_does_not_fit_is_named_as_by_the_two_ops() -> None:
    x, added, gain, gate_up, down = given()
    with running_on("sm86"):
        with pytest.raises(ShapeError, match="norm_linears: projections are"):
            norm_swiglu(x, gain, gate_up[:, 1:], down, matmul_format="e4m3")
        with pytest.raises(ShapeError, match="swiglu: gate_up is"):
            norm_swiglu(x, gain, gate_up, down[:, 1:], matmul_format="e4m3")
        with pytest.raises(ShapeError, match="rms_norm: x is"):
            norm_swiglu(x, gain, gate_up, down, matmul_format="e4m3", added=added[1:])
