"""Numbers of 8 bits with 4 of exponent and 3 of mantissa, as bytes; knows no scales and no tensors of many parts.

    byte = s eeee mmm        x = (−1)ˢ · 2^(eeee − 7) · 1.mmm        eeee = 0: (−1)ˢ · 2⁻⁶ · 0.mmm

There is no infinity; 0x7F and 0xFF are NaN, 448 is the largest number.  Encoding rounds to the nearest, ties to even,
and saturates: what is larger than 448 becomes 448, infinity too, and NaN stays NaN.  Integer arithmetic on the bits of
fp32, because float8 raises on MPS, Triton refuses it below capability 8.9, and its interpreter's casts err:

    normal       ((bits + 0x7FFFF + bit 20) >> 20) − 960        a carry runs into the exponent, as it must
    |x| < 2⁻⁶    the bits of |x| + 2¹⁴ less those of 2¹⁴: one unit there is 2⁻⁹, and the addition rounds

Decoding shifts exponent and mantissa to where fp16 has them, which is x/256, exactly.

Source: Open Compute Project 2023, "OCP 8-bit Floating Point Specification (OFP8)", section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_kernels.errors import ShapeError

MAX = 448.0  # the largest number
_NAN = 0x7F


def reference(x: Tensor) -> Tensor:
    """Encode by torch's own cast, of what 448 bounds: torch before 2.13 may overflow to NaN."""
    return x.float().clamp(-MAX, MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def encode(x: Tensor) -> Tensor:
    """Round each number to a byte.

    x: any shape, fp32|bf16|fp16.  Returns uint8 of that shape.
    Raises ShapeError if x is not floating.
    """
    if not x.dtype.is_floating_point:
        raise ShapeError(f"e4m3.encode: x is {x.dtype}; needs a floating dtype.")
    bits = x.float().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = (magnitude.view(torch.float32) + 2.0**14).view(torch.int32) - 0x46800000
    code = torch.where(magnitude < 0x3C800000, small, normal).clamp_max_(0x7E)
    code = torch.where(magnitude > 0x7F800000, _NAN, code)
    return (code | ((bits >> 24) & 0x80)).to(torch.uint8)


def decode(code: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number of each byte: exact in every dtype.

    code: any shape, uint8.  dtype: fp32|bf16|fp16.
    Raises ShapeError if code is not uint8 or dtype not floating.
    """
    if code.dtype != torch.uint8 or not dtype.is_floating_point:
        raise ShapeError(f"e4m3.decode: code is {code.dtype}, dtype {dtype}; needs uint8 and a floating dtype.")
    # In place, because passes over memory are all it costs.  The sign stands in every bit above the other seven.
    wide = code.view(torch.int8).short()
    nan = (wide & 0x7F).add_(1).bitwise_and_(0x80)  # 0x7F alone carries; 2¹⁴ more makes fp16's exponent all ones
    half = wide.bitwise_left_shift_(7).bitwise_and_(-0x4001).add_(nan, alpha=0x80)
    return half.view(torch.float16).to(torch.float32).mul_(256.0).to(dtype)


def decode_finite(code: Tensor) -> Tensor:
    """Return the number of each byte, none of them NaN, divided by 256: exact in fp16.

    Three passes over 16-bit memory, twenty times as fast on a processor as torch's own cast: for weights that are
    decoded at every use.  code: uint8.
    Raises ShapeError if it is another.
    """
    if code.dtype != torch.uint8:
        raise ShapeError(f"e4m3.decode_finite: code is {code.dtype}; needs uint8.")
    # Widened, the sign stands in every bit above the other seven; it is cleared where fp16 has its highest exponent.
    return code.view(torch.int8).short().mul_(1 << 7).bitwise_and_(-0x4001).view(torch.float16)
