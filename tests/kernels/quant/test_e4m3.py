"""E4M3 bytes, in plain PyTorch and inside Triton: bit for bit torch's cast."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Launch, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.quant import e4m3
from torch import Tensor

from tests.kernels.cards import DEVICE, running_on, unwritten


def all_bf16() -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def random_fp32() -> Tensor:
    """Bits at random, numbers about every magnitude that counts, and the ties between two neighbours."""
    generator = torch.Generator().manual_seed(5)
    bits = torch.randint(-(2**31), 2**31, (50_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    near = torch.randn(50_000, generator=generator) * torch.logspace(-5, 3.2, 50_000)
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    around = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    return torch.cat([bits.view(torch.float32), near, around, -around])


def assert_torchs(code: Tensor, x: Tensor) -> None:
    """NaN has a byte of either sign, as torch's own casts have it."""
    expected, is_nan = e4m3.reference(x), x.isnan()
    assert torch.equal(code[~is_nan], expected[~is_nan])
    assert ((code[is_nan] & 0x7F) == 0x7F).all()


each_input = pytest.mark.parametrize("x", [all_bf16(), random_fp32()], ids=["every bf16", "random fp32"])


@each_input
def test_encoding_is_torchs_cast_bit_for_bit(x: Tensor) -> None:
    assert_torchs(e4m3.encode(x), x)


def test_what_is_too_large_saturates_and_nan_stays() -> None:
    x = torch.tensor([448.0, 464.0, 1e9, torch.inf, -torch.inf, torch.nan])
    assert e4m3.decode(e4m3.encode(x), torch.float32)[:5].tolist() == [448.0, 448.0, 448.0, 448.0, -448.0]
    assert e4m3.decode(e4m3.encode(x), torch.float32)[5].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_is_torchs_cast_for_every_byte(dtype: torch.dtype) -> None:
    code = torch.arange(256, dtype=torch.uint8)
    expected = code.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(e4m3.decode(code, dtype).nan_to_num(7e4), expected.nan_to_num(7e4))


@each_input
@pytest.mark.parametrize("card", ["sm86", "sm89"])
def test_a_kernel_encodes_to_the_same_bits(x: Tensor, card: str) -> None:
    with running_on(card):
        count = x.numel()
        code = unwritten(count, dtype=torch.uint8)
        native = card == "sm89" and DEVICE == "cuda"  # the interpreter's own casts lose a carry
        constants = {"BLOCK": 1024, "NATIVE": native}
        launch(
            Launch("quant.e4m3_triton", "encode_kernel", (-(-count // 1024),), (x.to(DEVICE), code, count), constants)
        )
        assert_torchs(code.cpu(), x)


def test_a_kernel_decodes_every_byte() -> None:
    with running_on("sm75"):
        code = torch.arange(256, dtype=torch.uint8, device=DEVICE)
        x = unwritten(256, dtype=torch.float32)
        launch(Launch("quant.e4m3_triton", "decode_kernel", (2,), (code, x, 256), {"BLOCK": 128}))
        assert torch.equal(x.nan_to_num(7e4), code.view(torch.float8_e4m3fn).float().nan_to_num(7e4))


def test_wrong_dtypes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"torch.int64; needs a floating dtype"):
        e4m3.encode(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"torch.int8, dtype torch.float32; needs uint8"):
        e4m3.decode(torch.zeros(2, dtype=torch.int8), torch.float32)
