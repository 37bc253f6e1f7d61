"""E4M3 bytes inside Triton kernels, by the integer arithmetic of `e4m3.py`; knows no memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode(x, NATIVE: tl.constexpr):
    """Round fp32 numbers to bytes.  NATIVE: the card converts by itself, from capability 8.9 on."""
    if NATIVE:
        # The conversion saturates, infinity too; NaN stays NaN.
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, small, normal)
    code = tl.minimum(code, 0x7E)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_256th(code):
    """Return fp16 numbers that are the bytes' divided by 256, exactly; NaN bytes come as ±1.875."""
    wide = code.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def encode_kernel(x_ptr, code_ptr, count, BLOCK: tl.constexpr, NATIVE: tl.constexpr):
    """Encode flat elements; for the tests and the gate, which hold the functions above against torch."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(code_ptr + at, encode(x, NATIVE), mask=at < count)


@triton.jit
def decode_kernel(code_ptr, x_ptr, count, BLOCK: tl.constexpr):
    """Decode flat elements to fp32; for the tests and the gate."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(code_ptr + at, mask=at < count, other=0)
    x = decode_256th(code).to(tl.float32) * 256.0
    tl.store(x_ptr + at, tl.where((code & 0x7F) == 0x7F, float("nan"), x), mask=at < count)
