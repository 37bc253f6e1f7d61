"""Kept codes are those that are made at use, are read only where they are in use, and joined ones are one product."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from lowvram_kernels.dispatch import Launch, simulate_card
from lowvram_kernels.layers.norm_linears import norm_linears
from lowvram_kernels.matmul.kept_codes import KeptCodes, codes_of, joined_codes
from lowvram_kernels.quant.quantise import QuantTensor, quantise_weight
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error

each_form = pytest.mark.parametrize("form", ["e4m3", "int8"])
each_card = pytest.mark.parametrize("card", ["sm86", "cpu"])


def weights_of(*outputs: int, inputs: int = 200) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(height, inputs, generator=generator, device="cpu") for height in outputs)


def assert_same(found: QuantTensor, expected: QuantTensor) -> None:
    assert torch.equal(found.code.cpu(), expected.code)
    assert torch.equal(found.scale.cpu(), expected.scale)


@each_card
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_codes_are_those_made_at_use(form: str, card: str, dtype: torch.dtype) -> None:
    (weight,), stack = weights_of(130), torch.randn(3, 40, 136).to(dtype)
    weight = weight.to(dtype)
    with nullcontext() if card == "cpu" else running_on(card):
        own = [each.to("cpu" if card == "cpu" else DEVICE, copy=True) for each in (weight, stack)]
        codes = KeptCodes(own, form)
        codes.refresh()
        for master, plain in zip(own, (weight, stack), strict=True):
            assert codes_of(master, form).code is not codes_of(master, form).code, "nobody uses them"
            with codes.in_use():
                for transposed in (False, True):
                    found = codes_of(master, form, transposed)
                    assert found.code is codes_of(master, form, transposed).code
                    assert_same(found, quantise_weight(plain, form, transposed))
            with codes.in_use():
                master += 1.0
                assert_same(codes_of(master, form), quantise_weight(plain, form))  # nobody has made them again
            assert joined_codes([master]) is None


@each_card
def test_joined_codes_are_those_of_the_weights_below_each_other(card: str) -> None:
    group = weights_of(256, 128, 40)
    whole = torch.cat(group)
    with nullcontext() if card == "cpu" else running_on(card):
        own = tuple(weight.to("cpu" if card == "cpu" else DEVICE) for weight in group)
        codes = KeptCodes(own, "e4m3", [own], [own])
        codes.refresh()
        with codes.in_use():
            for transposed in (False, True):
                found = joined_codes(own, transposed)
                assert found is not None
                assert_same(found, quantise_weight(whole, "e4m3", transposed))
                for weight, plain in zip(own, group, strict=True):
                    assert_same(codes_of(weight, "e4m3", transposed), quantise_weight(plain, "e4m3", transposed))


def test_what_a_group_may_not_share_is_not_joined() -> None:
    group = weights_of(256, 128, 40)
    with KeptCodes(group, "e4m3", [group]).in_use():
        assert joined_codes(group) is None, "their products may not be views of one"
        assert joined_codes(group, transposed=True) is not None
    narrow = weights_of(64, 128)
    for weights, form in ((group, "int8"), (narrow, "e4m3")):
        with KeptCodes(weights, form, [weights], [weights]).in_use():
            assert joined_codes(weights) is None
            assert joined_codes(weights, transposed=True) is None


@pytest.mark.parametrize("is_viewed", [True, False])
@pytest.mark.parametrize("frozen", [None, 1], ids=["all learn", "one is frozen"])
def test_joined_projections_give_the_products_and_gradients_of_each(is_viewed: bool, frozen: int | None) -> None:
    group = tuple(weight.requires_grad_(index != frozen) for index, weight in enumerate(weights_of(128, 128, 72)))
    x, gain = weights_of(37)[0].requires_grad_(), torch.ones(200, requires_grad=True)
    learning = [x, gain, *(weight for weight in group if weight.requires_grad)]

    def run() -> list[Tensor]:
        _, ys = norm_linears(x, gain, list(group), matmul_format="e4m3")
        upstream = [y.detach() + index for index, y in enumerate(ys)]
        return [*ys, *torch.autograd.grad(ys, learning, upstream)]

    codes = KeptCodes(group, "e4m3", [group], [group] if is_viewed else [])
    codes.refresh()
    for card in ("cpu", "sm86"):
        with nullcontext() if card == "cpu" else running_on(card):
            apart = run()
            with codes.in_use():
                joined = run()
        for own, other in zip(joined[:3], apart[:3], strict=True):
            assert torch.equal(own, other)
        for own, other in zip(joined[3:], apart[3:], strict=True):
            assert relative_error(own, other) < 1e-6, "dx is summed in another order"


def test_a_refresh_reads_each_weight_once_and_keeps_two_bytes_a_number() -> None:
    launches: list[Launch] = []
    with torch.device("meta"), simulate_card(CARDS["sm120"], note_launch=launches.append):
        group = torch.empty(256, 512), torch.empty(128, 512)
        with LiveBytes().ignore(*group) as live:
            codes = KeptCodes(group, "e4m3", [group], [group])
            assert live.now == 384 * 512 * 2 + 2 * 3 * 4 * 4
            codes.refresh()
            assert live.peak == live.now
    assert [what.kernel for what in launches] == ["e4m3_blocks_kernel"] * 2
