"""Numbers of 16 bits inside Triton kernels, made by integer arithmetic alone, and the sum that is rounded at random.

Triton's interpreter cuts numbers off where it casts to bf16: so what is stored are int16, the bits themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.random.counter_rng_triton import draw_bits, fold_word


@triton.jit
def from_bf16(bits):
    """Return the fp32 numbers of bf16 ones' bits, int16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def drawn_bf16(x, noise):
    """Round fp32 to bf16 at random, to its bits, int16; noise: 16 bits.  `rounding.round_to_bf16` says how."""
    bits = (x.to(tl.int32, bitcast=True) + noise.to(tl.int32)) >> 16
    return tl.where(x == x, bits, 0x7FC0).to(tl.int16)


@triton.jit
def nearest_bf16(x):
    """Round fp32 to the nearest bf16, ties to even, to its bits, int16."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0).to(tl.int16)


@triton.jit
def add_rounded_kernel(total_ptr, term_ptr, sample_ptr, count, named, ROWS: tl.constexpr):
    """Add a term to a bf16 total (int16) and round the sum at random.  named: the hash of seed and purpose, int32."""
    base = tl.program_id(0).to(tl.int64) * (ROWS * 256)
    at = tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    inside = at < count - base
    key = fold_word(tl.cast(named, tl.int32).to(tl.uint32, bitcast=True), tl.load(sample_ptr).to(tl.int64))
    total = from_bf16(tl.load(total_ptr + base + at, mask=inside, other=0))
    term = tl.load(term_ptr + base + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + base + at, drawn_bf16(total + term, draw_bits(key, base, ROWS)), mask=inside)
