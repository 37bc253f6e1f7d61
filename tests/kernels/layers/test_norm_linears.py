"""A norm and its projections as one op: values, gradients, and that the normalised rows are not kept."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Card, override_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.norm_linears import norm_linears, reference
from lowvram_kernels.layers.rms_norm import add_rms_norm, rms_norm
from lowvram_kernels.layers.rms_norm import reference as norm_reference

from tests.kernels.cards import DEVICE, running_on
from tests.kernels.measures import relative_error, saved_bytes

SHAPES = {"one-row": ((1, 8), [3]), "odd": ((2, 7, 13), [5, 1, 9]), "even": ((4, 32, 64), [64, 16])}
MODES = {
    "fp32": (torch.float32, torch.float32, 1e-5),
    "bf16-under-fp32": (torch.bfloat16, torch.float32, 2e-2),
    "bf16": (torch.bfloat16, torch.bfloat16, 2e-2),
    "fp16-under-fp32": (torch.float16, torch.float32, 4e-3),
}


def draw(shape: tuple[int, ...], outputs: list[int], dtype: torch.dtype, master: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(outputs))
    leaves = [torch.randn(shape, generator=generator).to(dtype)]
    leaves.append((1 + 0.3 * torch.randn(shape[-1], generator=generator)).to(master))
    leaves += [torch.randn(o, shape[-1], generator=generator).to(master) for o in outputs]
    return [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_reference_in_fp64(shape: str, mode: str) -> None:
    size, outputs = SHAPES[shape]
    dtype, master, tolerance = MODES[mode]
    leaves = draw(size, outputs, dtype, master)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours, truth = norm_linears(leaves[0], leaves[1], leaves[2:])[1], reference(exact[0], exact[1], exact[2:])
    upstream = [torch.randn_like(y) for y in ours]
    got = torch.autograd.grad(ours, leaves, upstream)
    wanted = torch.autograd.grad(truth, exact, [u.double() for u in upstream])
    for y, t in zip(ours, truth, strict=True):
        assert y.dtype == dtype
        assert relative_error(y, t) < tolerance
    for leaf, a, b in zip(leaves, got, wanted, strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a, b) < tolerance


def test_it_equals_the_norm_followed_by_the_products() -> None:
    x, weight, first, second = draw((6, 24), [10, 4], torch.float32, torch.float32)
    normed = rms_norm(x, weight)
    for y, matrix in zip(norm_linears(x, weight, [first, second])[1], (first, second), strict=True):
        assert torch.equal(y, normed @ matrix.T)


def test_only_x_and_one_fp32_per_row_are_kept() -> None:
    x, weight, *projections = draw((50, 64), [64, 32, 32], torch.bfloat16, torch.float32)
    kept = saved_bytes(lambda: norm_linears(x, weight, projections)[1][0], [weight, *projections])
    assert kept == 50 * 64 * 2 + 50 * 4


@pytest.mark.parametrize("wanted", [[0], [1], [2], [0, 3], [1, 2]], ids=str)
def test_gradients_that_nobody_needs_are_not_made(wanted: list[int]) -> None:
    leaves = [leaf.detach() for leaf in draw((5, 12), [6, 4], torch.float32, torch.float32)]
    full = [leaf.clone().requires_grad_() for leaf in leaves]
    for place in wanted:
        leaves[place].requires_grad_()
    sum(y.square().sum() for y in norm_linears(leaves[0], leaves[1], leaves[2:])[1]).backward()
    sum(y.square().sum() for y in norm_linears(full[0], full[1], full[2:])[1]).backward()
    for place, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (place in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, full[place].grad)


def test_a_view_with_gaps_between_its_rows_is_read_right() -> None:
    wide = torch.randn(3, 4, 20, requires_grad=True)
    x = wide[..., 2:14]
    weight, matrix = torch.rand(12, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    (y,) = norm_linears(x, weight, [matrix])[1]
    (copied,) = norm_linears(x.contiguous(), weight, [matrix])[1]
    torch.testing.assert_close(y, copied)
    for a, b in zip(*(torch.autograd.grad(z.sum(), [wide, weight, matrix]) for z in (y, copied)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "projections", [[], [torch.zeros(3, 7)], [torch.zeros(8)], [torch.zeros(3, 8, dtype=torch.int64)]], ids=range(4)
)
def test_projections_that_do_not_fit_are_refused(projections: list[torch.Tensor]) -> None:
    with pytest.raises(ShapeError, match=r"norm_linears: projections are .*\[2, 8\]"):
        norm_linears(torch.zeros(2, 8), torch.ones(8), projections)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("card", [None, "sm86"], ids=["plain", "kernel"])
def test_a_residual_goes_on_with_the_stream_and_its_gradient_is_added(card: str | None, dtype: torch.dtype) -> None:
    x, weight, *projections = (leaf.detach().to(DEVICE) for leaf in draw((7, 40), [16, 24], dtype, torch.float32))
    added, d_stream = (torch.randn(7, 40).to(dtype).to(DEVICE) for _ in range(2))
    dys = [torch.randn(7, outputs).to(dtype).to(DEVICE) for outputs in (16, 24)]
    leaves = [leaf.requires_grad_() for leaf in (x, added, weight, *projections)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = exact[0] + exact[1]
    expected = [truth, *reference(truth, exact[2], exact[3:])]
    with running_on(card) if card else override_card(Card(DEVICE)):
        stream, ys = norm_linears(leaves[0], leaves[2], leaves[3:], added=leaves[1])
        found = torch.autograd.grad([stream, *ys], leaves, [d_stream, *dys])
        # Where only the stream goes on, its gradient is that of both parts.
        only, _ = norm_linears(leaves[0], leaves[2], leaves[3:], added=leaves[1])
        alone = torch.autograd.grad(only, leaves[:2], torch.ones_like(only))
    wanted = torch.autograd.grad(expected, exact, [d_stream.double(), *(dy.double() for dy in dys)])
    bound = 2e-6 if dtype == torch.float32 else 4e-3
    for own, right in zip([stream, *ys, *found], [*expected, *wanted], strict=True):
        assert relative_error(own, right) < bound
    assert torch.equal(found[0], found[1])
    assert all((gradient == 1).all() for gradient in alone)


@pytest.mark.parametrize("card", [None, "sm86"], ids=["plain", "kernel"])
def test_a_norm_of_a_sum_is_the_norm_of_what_is_stored(card: str | None) -> None:
    x, added, weight = torch.randn(5, 3, 48).half(), torch.randn(5, 3, 48).half(), torch.rand(48)
    leaves = [leaf.to(DEVICE).requires_grad_() for leaf in (x, added, weight)]
    upstream = [torch.randn(5, 3, 48).half().to(DEVICE) for _ in range(2)]
    with running_on(card) if card else override_card(Card(DEVICE)):
        stream, y = add_rms_norm(*leaves)
        assert torch.equal(stream, leaves[0] + leaves[1])
        assert torch.equal(y, rms_norm(stream, leaves[2]))
        found = torch.autograd.grad([stream, y], leaves, upstream)
        apart = torch.autograd.grad(rms_norm(stream.detach().requires_grad_(), leaves[2]), leaves[2], upstream[1])
    assert torch.equal(found[2], apart[0])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    total = exact[0] + exact[1]
    wanted = torch.autograd.grad([total, norm_reference(total, exact[2])], exact, [u.double() for u in upstream])
    assert relative_error(found[0], wanted[0]) < 2e-3
    assert torch.equal(found[0], found[1])
    with pytest.raises(ShapeError, match="one shape and dtype"):
        add_rms_norm(leaves[0], leaves[1].float(), leaves[2])
