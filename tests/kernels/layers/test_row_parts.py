"""Ops that a processor takes through in parts: the same as whole, right at the seams, and in less memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
from lowvram_kernels.dispatch import Card, simulate_card
from lowvram_kernels.layers import rms_norm, rotary
from lowvram_kernels.layers.row_parts import AT_ONCE, row_parts
from torch import Tensor

from tests.kernels.measures import LiveBytes, relative_error

# Three parts, the last one shorter; a row that no part divides.
ROWS, WIDTH = 701, 516
CPU = torch.device("cpu")


def test_parts_cover_all_rows_once_and_are_about_equal() -> None:
    for rows, width in ((0, 8), (1, 8), (5, AT_ONCE), (5, 3 * AT_ONCE), (ROWS, WIDTH), (2048, 384)):
        parts = list(row_parts(rows, width, CPU))
        assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
        assert all((part.stop - part.start) * width <= AT_ONCE + width or part.stop - part.start == 1 for part in parts)
    assert len(list(row_parts(ROWS, WIDTH, CPU))) == 3
    with simulate_card(Card("cuda", (8, 6))):
        assert list(row_parts(ROWS, WIDTH, CPU)) == [slice(0, ROWS)]


def norm_with_gradients(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The stream, its norm and all gradients, found and true."""
    torch.manual_seed(4)
    x, added = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(ROWS, WIDTH).to(dtype)
    leaves = [x.requires_grad_(), added.requires_grad_(), (torch.rand(WIDTH) + 0.5).requires_grad_()]
    d_stream, dy = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(ROWS, WIDTH).to(dtype)
    found = rms_norm.add_rms_norm(*leaves)
    gradients = torch.autograd.grad(found, leaves, (d_stream, dy))
    stream = (x + added).detach().double().requires_grad_()
    weight = leaves[2].detach().double().requires_grad_()
    y = rms_norm.reference(stream, weight)
    dx, dweight = torch.autograd.grad((stream * 1.0, y), (stream, weight), (d_stream.double(), dy.double()))
    return [*found, *gradients], [stream, y, dx, dx, dweight]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_a_norm_in_parts_is_right_at_every_seam(dtype: torch.dtype, bound: float) -> None:
    for got, truth in zip(*norm_with_gradients(dtype), strict=True):
        assert relative_error(got, truth) < bound
        if got.dim() == 2:
            for part in row_parts(ROWS, WIDTH, CPU):
                assert relative_error(got[part][[0, -1]], truth[part][[0, -1]]) < 2 * bound


def test_forward_in_parts_has_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts, _ = norm_with_gradients(torch.bfloat16)
    monkeypatch.setattr(rms_norm, "works_in_parts", lambda device: False)
    whole, _ = norm_with_gradients(torch.bfloat16)
    assert torch.equal(in_parts[0], whole[0])
    assert torch.equal(in_parts[1], whole[1])
    # The stream's gradient is added before dx is rounded, and not after.
    assert relative_error(in_parts[2], whole[2]) < 4e-3


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("unrotated", [0, 6])
def test_a_rotation_in_parts_is_right_and_turns_back(interleaved: bool, unrotated: int) -> None:
    torch.manual_seed(5)
    tokens, heads, pairs = 600, 12, 13
    angle = torch.rand(tokens, pairs) * 6
    table = (angle.cos(), angle.sin())
    x = torch.randn(2, heads, tokens, unrotated + 2 * pairs).bfloat16().transpose(1, 2).requires_grad_()
    assert len(list(row_parts(tokens, heads * 2 * pairs, CPU))) == 2
    y = rotary.rotate(x, table, interleaved)
    truth = rotary.reference(x.detach().double(), (table[0].double(), table[1].double()), interleaved)
    assert relative_error(y, truth) < 4e-3
    (back,) = torch.autograd.grad(y, x, y.detach())
    assert relative_error(back, x) < 6e-3


def test_temporaries_are_of_parts_and_paper_agrees() -> None:
    peaks = []
    for mode, device in ((simulate_card(Card("cpu")), "meta"), (contextlib.nullcontext(), "cpu")):
        with mode, torch.device(device):
            x, weight = torch.zeros(8 * ROWS, WIDTH, dtype=torch.bfloat16), torch.ones(WIDTH)
            rstd = torch.ones(8 * ROWS, 1)
            with LiveBytes().ignore(x, weight, rstd) as live:
                rms_norm.gradients(x, x, weight, rstd, (True, True), x)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]
    # dx, and four fp32 tensors of a part at most.
    assert peaks[1] <= x.nbytes + 4 * 4 * (AT_ONCE + WIDTH) + 64 * WIDTH
