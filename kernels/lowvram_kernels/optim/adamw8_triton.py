"""AdamW in one pass over a weight, and moments in codes of 8 bits inside Triton kernels; `adamw8.py` has the equations.

A step is some 220 instructions for each element, and its tables are of 1 KiB: those of `adamw8.encode` would not fit
into a multiprocessor's cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.random.counter_rng_triton import draw_bits, fold_word
from lowvram_kernels.random.stochastic_rounding_triton import drawn_bf16, from_bf16


@triton.jit
def multiply_add(x, y, z, FUSED: tl.constexpr):
    """Return x·y + z, rounded once.  FUSED: the card does; Triton's interpreter rounds twice, and so goes by fp64."""
    if FUSED:
        return tl.fma(x, tl.cast(y, tl.float32), z)
    return (x.to(tl.float64) * tl.cast(y, tl.float32).to(tl.float64) + z.to(tl.float64)).to(tl.float32)


@triton.jit
def one_less_exp(x):
    """Return 1 − eˣ of a scalar x ≤ 0, within two roundings: without cancellation near 0."""
    series = 1.0 + x * (1.0 / 7.0) * (1.0 + x * (1.0 / 8.0))
    series = 1.0 + x * (1.0 / 5.0) * (1.0 + x * (1.0 / 6.0) * series)
    series = 1.0 + x * 0.5 * (1.0 + x * (1.0 / 3.0) * (1.0 + x * 0.25 * series))
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def nearest_code(x, midpoint_ptr, SIGNED: tl.constexpr):
    """Return the code, int32, of numbers of at most 1: how many midpoints of values are below; that of 0 for NaN.

    Between the decades' edges a value's rank rises evenly, by a fifth as much for each further decade: a curve that
    bends one way, and so is the least of its seven lines.  It is off by less than a third of a rank where decades
    meet.  So the rank is one of two, and the midpoint between them decides.
    """
    x = tl.where(x == x, x, 0.0)
    size = tl.abs(x) if SIGNED else tl.maximum(x, 0.0)
    rank = tl.minimum(tl.fma(size, 1e6 / 0.9, 8 / 9), tl.fma(size, 2e5 / 0.9, 16 / 9))
    rank = tl.minimum(rank, tl.minimum(tl.fma(size, 4e4 / 0.9, 32 / 9), tl.fma(size, 8e3 / 0.9, 64 / 9)))
    rank = tl.minimum(rank, tl.minimum(tl.fma(size, 1.6e3 / 0.9, 128 / 9), tl.fma(size, 320 / 0.9, 256 / 9)))
    rank = tl.minimum(rank, tl.fma(size, 64 / 0.9, 512 / 9))
    if SIGNED:
        below = (rank - 0.5).to(tl.int32)
        below = tl.maximum(tl.where(x < 0.0, 126 - below, 127 + below), 0)
    else:
        below = (2.0 * rank - 1.5).to(tl.int32)
    return below + (x > tl.load(midpoint_ptr + below)).to(tl.int32)


@triton.jit
def recall(code_ptr, absmax_ptr, value_ptr, at, block, count):
    """Return a moment's first `count` elements, fp32 [ROWS, 256]: value[code] · absmax."""
    code = tl.load(code_ptr + at, mask=at < count, other=0).to(tl.int32)
    return tl.load(value_ptr + code) * tl.load(absmax_ptr + block, mask=block * 256 < count, other=0.0)[:, None]


@triton.jit
def divide_rows(x, divisor, FUSED: tl.constexpr):
    """Return each row's x / divisor, |x| ≤ divisor, rounded to nearest where it is more than 2⁻¹⁰⁰.

    A power of two brings the divisor into [1, 2).  There its rounded reciprocal and two remainders make the quotient
    what a division would (Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000
    processor"), in a third of the instructions; infinity and NaN make NaN.
    """
    exponent = tl.minimum(divisor.to(tl.int32, bitcast=True) >> 23, 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    reciprocal = tl.div_rn(1.0, divisor * scale)[:, None]
    minus, x = -(divisor * scale)[:, None], x * scale[:, None]
    quotient = x * reciprocal
    quotient = multiply_add(multiply_add(quotient, minus, x, FUSED), reciprocal, quotient, FUSED)
    return multiply_add(multiply_add(quotient, minus, x, FUSED), reciprocal, quotient, FUSED)


@triton.jit
def remember(
    x, code_ptr, absmax_ptr, midpoint_ptr, at, block, count, stored, SIGNED: tl.constexpr, FUSED: tl.constexpr
):
    """Keep a moment in codes, of its first `count` elements the first `stored` ones: all or none."""
    # The greatest of the bits and not of the numbers, which would leave NaN out.
    absmax = tl.max(tl.abs(tl.where(at < count, x, 0.0)).to(tl.int32, bitcast=True), axis=1).to(
        tl.float32, bitcast=True
    )
    least = 1.1754943508222875e-38
    scaled = divide_rows(x, tl.where(absmax < least, least, absmax), FUSED)
    tl.store(code_ptr + at, nearest_code(scaled, midpoint_ptr, SIGNED).to(tl.uint8), mask=at < stored)
    tl.store(absmax_ptr + block, absmax, mask=block * 256 < stored)


@triton.jit
def left_of(count, base, ROWS: tl.constexpr):
    """Return how many elements there are from number `base` on, int32: at most those of ROWS blocks."""
    return tl.minimum(count - base, ROWS * 256).to(tl.int32)


@triton.jit
def stored_of(count, skip_ptr):
    """Return how many elements are stored: none where a step is skipped."""
    if skip_ptr is not None:
        count = tl.where(tl.load(skip_ptr) == 0, count, 0)
    return count


@triton.jit(do_not_specialize=["first", "named"])
def adamw8_kernel(
    weight_ptr,
    gradient_ptr,
    code_m_ptr,
    code_v_ptr,
    absmax_m_ptr,
    absmax_v_ptr,
    value_m_ptr,
    value_v_ptr,
    midpoint_m_ptr,
    midpoint_v_ptr,
    step_ptr,
    rate_ptr,
    scale_ptr,
    skip_ptr,
    count,
    first,
    named,
    rate,
    scale,
    kept,
    decay,
    beta_m,
    beta_v,
    share_m,
    share_v,
    log_m,
    log_v,
    eps,
    ROWS: tl.constexpr,
    ROUNDED: tl.constexpr,
    EXACT: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Make one step of ROWS blocks of 256 elements.

    weight: fp32, or bf16 as int16 (ROUNDED).  code: uint8, or the moments themselves, fp32 (EXACT).  rate_ptr,
    scale_ptr: scalars in place of the numbers, or None.  first: number of the first element.  named: the hash of seed
    and purpose, int32.  kept: 1 − rate·decay.  share: 1 − β.  log: log β.
    """
    base = tl.program_id(0).to(tl.int64) * (ROWS * 256)
    block = tl.arange(0, ROWS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    weight_ptr, gradient_ptr = weight_ptr + base, gradient_ptr + base
    code_m_ptr, code_v_ptr = code_m_ptr + base, code_v_ptr + base
    absmax_m_ptr, absmax_v_ptr = absmax_m_ptr + base // 256, absmax_v_ptr + base // 256
    count = left_of(count, base, ROWS)
    stored = stored_of(count, skip_ptr)
    step = tl.load(step_ptr)

    if EXACT:
        m = tl.load(code_m_ptr + at, mask=at < count, other=0.0)
        v = tl.load(code_v_ptr + at, mask=at < count, other=0.0)
    else:
        m = recall(code_m_ptr, absmax_m_ptr, value_m_ptr, at, block, count)
        v = recall(code_v_ptr, absmax_v_ptr, value_v_ptr, at, block, count)
    gradient = tl.load(gradient_ptr + at, mask=at < count, other=0.0).to(tl.float32)
    gradient *= scale if scale_ptr is None else tl.load(scale_ptr).to(tl.float32)
    m = multiply_add(gradient, share_m, m * beta_m, FUSED)
    v = multiply_add(gradient * share_v, gradient, v * beta_v, FUSED)

    left = one_less_exp(step.to(tl.float32) * log_m)
    root = tl.sqrt_rn(one_less_exp(step.to(tl.float32) * log_v))
    if rate_ptr is None:
        size = tl.div_rn(1.0, left) * rate
    else:
        given = tl.load(rate_ptr).to(tl.float32)
        size = tl.div_rn(given, left)
        kept = 1.0 - given * decay
    change = tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps) * size
    if ROUNDED:
        weight = from_bf16(tl.load(weight_ptr + at, mask=at < count, other=0)) * kept - change
        key = fold_word(tl.cast(named, tl.int32).to(tl.uint32, bitcast=True), step.to(tl.int64))
        weight = drawn_bf16(weight, draw_bits(key, base + first, ROWS))
    else:
        weight = tl.load(weight_ptr + at, mask=at < count, other=0.0) * kept - change
    tl.store(weight_ptr + at, weight, mask=at < stored)
    if EXACT:
        tl.store(code_m_ptr + at, m, mask=at < stored)
        tl.store(code_v_ptr + at, v, mask=at < stored)
    else:
        remember(m, code_m_ptr, absmax_m_ptr, midpoint_m_ptr, at, block, count, stored, True, FUSED)
        remember(v, code_v_ptr, absmax_v_ptr, midpoint_v_ptr, at, block, count, stored, False, FUSED)


@triton.jit
def encode_kernel(
    x_ptr,
    code_ptr,
    absmax_ptr,
    midpoint_ptr,
    count,
    ROWS: tl.constexpr,
    SIGNED: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Encode ROWS blocks of a moment; for the tests and the gate, which hold `remember` against `adamw8.encode`."""
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    remember(x, code_ptr, absmax_ptr, midpoint_ptr, at, block, count, count, SIGNED, FUSED)
