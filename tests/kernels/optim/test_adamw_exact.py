"""AdamW with exact moments: the textbook's on fp32 weights, and on bf16 ones close to fp32 masters."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.optim.adamw8 import Moments, adamw8_, build_maps, new_moments, reference
from torch import Tensor

from tests.kernels.measures import relative_error

MAPS = build_maps()
SHAPES = [pytest.param((67, 91), id="odd"), pytest.param((3, 40, 32), id="stack"), pytest.param((300,), id="vector")]
RATE, BETAS, DECAY = 2e-5, (0.9, 0.95), 0.1
# Of fp32, over some dozen operations.
ROUNDING = 1e-5
# A step of the rate above is 1/200 of a bf16 gap at 1.  Fifty of them are drawn as coins: one element's error is a
# multiple of the way it goes, that of a mean of 4,096 elements is a 64th of that.
NEAR_MASTERS = 0.1


def take(weight: Tensor, gradient: Tensor, moments: Moments, step: int, rate: float = RATE) -> None:
    adamw8_(weight, gradient, moments, MAPS, torch.tensor(float(step)), rate, BETAS, decay=DECAY, seed=4)


def gradient_of(shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return 0.01 * (1.0 + torch.randn(shape, generator=generator))


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_moments_make_the_textbooks_steps(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape)
    start, moments = weight.double(), new_moments(weight, exact=True)
    exact, m, v = start, torch.zeros(shape).double(), torch.zeros(shape).double()
    for step in range(1, 31):
        gradient = gradient_of(shape, step)
        take(weight, gradient, moments, step, 1e-2)
        exact, m, v = reference(exact, gradient.double(), m, v, step, 1e-2, BETAS, decay=DECAY)
    assert relative_error(weight.double() - start, exact - start) < ROUNDING
    assert relative_error(moments.code_m, m) < ROUNDING
    assert relative_error(moments.code_v, v) < ROUNDING


def test_exact_moments_take_eight_bytes_a_parameter_and_a_part_is_a_view() -> None:
    moments = new_moments(torch.ones(3, 256, dtype=torch.bfloat16), exact=True)
    assert sum(tensor.nbytes for tensor in moments) == 3 * 256 * 8
    assert moments.is_exact
    part = moments.part(256, 512)
    part.code_v.fill_(1.0)
    assert moments.code_v.sum(1).tolist() == [0.0, 256.0, 0.0]
    assert [tensor.numel() for tensor in part] == [256, 256, 0, 0]


@pytest.mark.parametrize("rate", [RATE, 2e-3])
def test_bf16_weights_follow_fp32_masters_where_those_of_torch_stall(rate: float) -> None:
    shape = (64, 64)
    masters = torch.ones(shape)
    ours, theirs = masters.bfloat16(), torch.nn.Parameter(masters.bfloat16())
    of_masters, of_ours = (new_moments(weight, exact=True) for weight in (masters, ours))
    torchs = torch.optim.AdamW([theirs], lr=rate, betas=BETAS, weight_decay=DECAY, fused=True)
    for step in range(1, 51):
        gradient = gradient_of(shape, step)
        take(masters, gradient, of_masters, step, rate)
        take(ours, gradient, of_ours, step, rate)
        theirs.grad = gradient.bfloat16()
        torchs.step()
    way, moved, stalled = (1.0 - weight.detach().double() for weight in (masters, ours, theirs))
    assert torch.equal(of_ours.code_m, of_masters.code_m)
    assert moved.mean().item() == pytest.approx(way.mean().item(), rel=NEAR_MASTERS)
    if rate == RATE:
        assert stalled.abs().max() == 0.0
    else:
        # A gap below 1 is 2⁻⁸, two of these steps: what is smaller than half of it never counts.
        assert stalled.mean() < (1.0 - 3 * NEAR_MASTERS) * way.mean()


def test_an_element_of_a_bf16_weight_errs_by_coins_and_not_by_a_drift() -> None:
    shape, rate, steps = (128, 128), 1e-3, 50
    torch.manual_seed(2)
    masters = (1.0 + torch.rand(shape)).bfloat16().float()
    ours = masters.bfloat16()
    of_masters, of_ours = (new_moments(weight, exact=True) for weight in (masters, ours))
    for step in range(1, steps + 1):
        take(masters, gradient_of(shape, step), of_masters, step, rate)
        take(ours, gradient_of(shape, step), of_ours, step, rate)
    off = ours.double() - masters.double()
    # A step moves at most this share of a gap, and its coin has a variance of share · (1 − share) gaps².
    gap = 2.0**-7
    share = 1.15 * rate / gap
    spread = gap * (steps * share * (1.0 - share)) ** 0.5
    assert 0.5 * spread < off.std() < 1.1 * spread
    assert off.mean().abs() < 5 * spread / off.numel() ** 0.5
