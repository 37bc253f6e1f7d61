"""Codes of 8 bits inside Triton: for every number the plain form's, by arithmetic in place of its table."""

from __future__ import annotations

import lowvram_kernels.optim.adamw8 as op
import pytest
import torch
from lowvram_kernels.dispatch import Launch, is_interpreted, launch
from lowvram_kernels.optim.adamw8 import CodeMap, build_maps
from torch import Tensor

from tests.kernels.cards import DEVICE, running_on, unwritten

MAPS = build_maps(DEVICE)


def numbers_to_encode(codes: CodeMap) -> Tensor:
    """Both ends of each of the table's cells and their neighbours, and those of each midpoint and value, in ±1."""
    cells = torch.arange(2**16, dtype=torch.int32) << 16
    ends = torch.cat([cells, cells | 0xFFFF]).view(torch.float32)
    x = torch.cat([codes.midpoint[:-1].cpu(), codes.value.cpu(), ends])
    up, down = (x.nextafter(torch.tensor(way)) for way in (2.0, -2.0))
    generator = torch.Generator().manual_seed(3)
    spread = torch.randn(20_000, generator=generator) * 10.0 ** (-8.0 * torch.rand(20_000, generator=generator))
    x = torch.cat([torch.tensor([0.0, -0.0, 1.0, -1.0]), x, up, down, spread])
    return x[x.abs() <= 1.0]


def encode_by_kernel(x: Tensor, codes: CodeMap, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and absmax of flat numbers in blocks of 256."""
    count, rows = x.numel(), 64 if is_interpreted() else 4
    code, absmax = unwritten(count, dtype=torch.uint8), unwritten(-(-count // 256), dtype=torch.float32)
    constants = {"ROWS": rows, "SIGNED": is_signed, "FUSED": not is_interpreted()}
    with running_on("sm75"):
        arguments = (x, code, absmax, codes.midpoint, count)
        launch(Launch("optim.adamw8_triton", "encode_kernel", (-(-count // (rows * 256)),), arguments, constants))
    return code, absmax


SIGNS = pytest.mark.parametrize("is_signed", [True, False], ids=["signed", "unsigned"])


@SIGNS
def test_every_number_has_the_tables_code(is_signed: bool) -> None:
    codes = MAPS.first if is_signed else MAPS.second
    x = numbers_to_encode(codes)
    x = (x if is_signed else x.abs()).to(DEVICE)
    x = x[: x.numel() // 255 * 255].view(-1, 255)
    # A first column of ones keeps the numbers as they are.
    x = torch.cat([torch.ones_like(x[:, :1]), x], 1).view(-1)
    found, absmax = encode_by_kernel(x, codes, is_signed)
    assert absmax.unique().tolist() == [1.0]
    cell = (x.view(torch.int32) >> 16) & 0xFFFF
    assert torch.equal(found, codes.low[cell] + (x > codes.bound[cell]))
    assert torch.equal(found.long(), torch.searchsorted(codes.midpoint, x)), "how many midpoints are smaller"
    assert found.unique().numel() == 256


@SIGNS
@pytest.mark.parametrize("power", [-149, -140, -126, -60, 0, 60, 126, 127])
def test_quotients_by_any_absmax_fall_on_the_side_where_a_division_puts_them(is_signed: bool, power: int) -> None:
    codes = MAPS.first if is_signed else MAPS.second
    generator = torch.Generator().manual_seed(power)
    absmax = ((1.0 + torch.rand(400, 1, generator=generator).double()) * 2.0**power).float()
    midpoint = codes.midpoint[:-1].cpu().expand(400, 255)
    # Numbers about the midpoints' products, one rounding off to either side or none.
    x = absmax * midpoint
    beside = x.nextafter(torch.randn(x.shape, generator=generator) * torch.inf)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.3, x, beside)
    x = torch.cat([absmax, x.clamp(-absmax, absmax)], 1).to(DEVICE)
    expected, expected_absmax = op.encode(x.clone(), codes)
    found, found_absmax = encode_by_kernel(x.view(-1), codes, is_signed)
    assert torch.equal(found, expected)
    assert torch.equal(found_absmax, expected_absmax)


@SIGNS
def test_a_block_with_nan_or_infinity_keeps_it_in_its_absmax_and_zeros_decode_to_zeros(is_signed: bool) -> None:
    codes = MAPS.first if is_signed else MAPS.second
    x = torch.rand(5, 256, device=DEVICE)
    x[0, 3], x[1, 4], x[2, 5], x[3] = torch.nan, -torch.nan, torch.inf, 0.0
    code, absmax = encode_by_kernel(x.view(-1), codes, is_signed)
    expected_code, expected = op.encode(x.clone(), codes)
    assert torch.equal(code, expected_code)
    assert absmax.isnan().tolist() == [True, True, False, False, False]
    assert torch.equal(absmax[2:], expected[2:])
    assert op.decode(code[768:1024], absmax[3:4], codes).abs().max() == 0.0
