"""Both ends of a step of Muon inside Triton kernels, in one pass each: the momentum before, the weight after products.

`muon.py` has the equations; every product and sum is fused, or not, as the plain form has it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.optim.adamw8_triton import left_of, multiply_add, recall, remember, stored_of
from lowvram_kernels.random.counter_rng_triton import draw_bits, fold_word
from lowvram_kernels.random.stochastic_rounding_triton import drawn_bf16, from_bf16, nearest_bf16


@triton.jit
def lead_kernel(
    gradient_ptr,
    code_ptr,
    absmax_ptr,
    lead_ptr,
    value_ptr,
    midpoint_ptr,
    scale_ptr,
    skip_ptr,
    count,
    scale,
    beta,
    share,
    ROWS: tl.constexpr,
    CODED: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Move the momentum on, in codes (uint8) or bf16 (int16), and write u, bf16 (int16).  share: 1 − β."""
    base = tl.program_id(0).to(tl.int64) * (ROWS * 256)
    block = tl.arange(0, ROWS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    code_ptr, absmax_ptr = code_ptr + base, absmax_ptr + base // 256
    count = left_of(count, base, ROWS)
    stored = stored_of(count, skip_ptr)

    gradient = tl.load(gradient_ptr + base + at, mask=at < count, other=0.0).to(tl.float32)
    gradient *= scale if scale_ptr is None else tl.load(scale_ptr).to(tl.float32)
    if CODED:
        m = recall(code_ptr, absmax_ptr, value_ptr, at, block, count)
    else:
        m = from_bf16(tl.load(code_ptr + at, mask=at < count, other=0))
    m = multiply_add(gradient, share, m * beta, FUSED)
    lead = multiply_add(m, beta, gradient * share, FUSED)
    if CODED:
        remember(m, code_ptr, absmax_ptr, midpoint_ptr, at, block, count, stored, True, FUSED)
    else:
        tl.store(code_ptr + at, nearest_bf16(m), mask=at < stored)
    tl.store(lead_ptr + base + at, nearest_bf16(lead), mask=at < count)


@triton.jit(do_not_specialize=["first", "named"])
def move_kernel(
    weight_ptr,
    direction_ptr,
    step_ptr,
    rate_ptr,
    kept_ptr,
    skip_ptr,
    count,
    first,
    named,
    rate,
    kept,
    ROWS: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Move a weight, fp32 or bf16 as int16 (ROUNDED), along o.  rate, kept: numbers, or scalars at their pointers."""
    base = tl.program_id(0).to(tl.int64) * (ROWS * 256)
    at = tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    weight_ptr = weight_ptr + base
    count = left_of(count, base, ROWS)
    stored = stored_of(count, skip_ptr)

    change = tl.load(direction_ptr + base + at, mask=at < count, other=0.0).to(tl.float32)
    change *= rate if rate_ptr is None else tl.load(rate_ptr).to(tl.float32)
    share = kept if kept_ptr is None else tl.load(kept_ptr).to(tl.float32)
    if ROUNDED:
        weight = from_bf16(tl.load(weight_ptr + at, mask=at < count, other=0)) * share - change
        key = fold_word(tl.cast(named, tl.int32).to(tl.uint32, bitcast=True), tl.load(step_ptr).to(tl.int64))
        weight = drawn_bf16(weight, draw_bits(key, base + first, ROWS))
    else:
        weight = tl.load(weight_ptr + at, mask=at < count, other=0.0) * share - change
    tl.store(weight_ptr + at, weight, mask=at < stored)
