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
def behind(pointer, offsets_ptr, many, part, FIELD: tl.constexpr):
    """Return the pointer of one of several weights: an offset of whole 16 elements behind the first weight's."""
    return pointer + tl.multiple_of(tl.load(offsets_ptr + FIELD * many + part), 16)


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
    offsets_ptr,
    count,
    many,
    scale,
    beta,
    share,
    ROWS: tl.constexpr,
    CODED: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Move momenta on, in codes (uint8) or bf16 (int16), and write u, bf16 (int16).

    count: elements of each of the `many` weights, whose tensors `offsets` finds (None where it is one).  share: 1 − β.
    """
    base = tl.program_id(0).to(tl.int64) * (ROWS * 256)
    block = tl.arange(0, ROWS)
    at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
    if offsets_ptr is not None:
        part = tl.program_id(1)
        gradient_ptr = behind(gradient_ptr, offsets_ptr, many, part, 0)
        code_ptr = behind(code_ptr, offsets_ptr, many, part, 1)
        absmax_ptr = behind(absmax_ptr, offsets_ptr, many, part, 2)
        lead_ptr = lead_ptr + part.to(tl.int64) * count
    code_ptr, absmax_ptr = code_ptr + base, absmax_ptr + base // 256
    left = left_of(count, base, ROWS)
    stored = stored_of(left, skip_ptr)

    gradient = tl.load(gradient_ptr + base + at, mask=at < left, other=0.0).to(tl.float32)
    gradient *= scale if scale_ptr is None else tl.load(scale_ptr).to(tl.float32)
    if CODED:
        m = recall(code_ptr, absmax_ptr, value_ptr, at, block, left)
    else:
        m = from_bf16(tl.load(code_ptr + at, mask=at < left, other=0))
    m = multiply_add(gradient, share, m * beta, FUSED)
    lead = multiply_add(m, beta, gradient * share, FUSED)
    if CODED:
        remember(m, code_ptr, absmax_ptr, midpoint_ptr, at, block, left, stored, True, FUSED)
    else:
        tl.store(code_ptr + at, nearest_bf16(m), mask=at < stored)
    tl.store(lead_ptr + base + at, nearest_bf16(lead), mask=at < left)


@triton.jit(do_not_specialize=["first", "named"])
def move_kernel(
    weight_ptr,
    direction_ptr,
    step_ptr,
    rate_ptr,
    skip_ptr,
    offsets_ptr,
    count,
    many,
    first,
    named,
    size,
    kept,
    decay,
    ROWS: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """Move weights, fp32 or bf16 as int16 (ROUNDED), along o.

    size: the factor on o, beside the rate where that is a scalar on the device.  kept: that on the weight, which such
    a rate and decay give.  count, many, offsets: as for `lead_kernel`.
    """
    base = tl.program_id(0).to(tl.int64) * (ROWS * 256)
    at = tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
    named = tl.cast(named, tl.int32)
    if offsets_ptr is not None:
        part = tl.program_id(1)
        weight_ptr = behind(weight_ptr, offsets_ptr, many, part, 3)
        step_ptr = step_ptr + tl.load(offsets_ptr + 4 * many + part)
        named = tl.load(offsets_ptr + 5 * many + part).to(tl.int32)
        direction_ptr = direction_ptr + part.to(tl.int64) * count
    weight_ptr = weight_ptr + base
    left = left_of(count, base, ROWS)
    stored = stored_of(left, skip_ptr)

    change = tl.load(direction_ptr + base + at, mask=at < left, other=0.0).to(tl.float32)
    if rate_ptr is not None:
        rate = tl.load(rate_ptr).to(tl.float32)
        size *= rate
        kept = 1.0 - rate * decay
    change *= size
    if ROUNDED:
        weight = from_bf16(tl.load(weight_ptr + at, mask=at < left, other=0)) * kept - change
        key = fold_word(named.to(tl.uint32, bitcast=True), tl.load(step_ptr).to(tl.int64))
        weight = drawn_bf16(weight, draw_bits(key, base + first, ROWS))
    else:
        weight = tl.load(weight_ptr + at, mask=at < left, other=0.0) * kept - change
    tl.store(weight_ptr + at, weight, mask=at < stored)
