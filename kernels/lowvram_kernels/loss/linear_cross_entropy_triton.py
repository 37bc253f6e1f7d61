"""The Triton kernels of a chunk's losses and of the gradient of its logits, which replaces them in their memory.

One program takes one row.  `held_loss_kernel` reads the logits once and holds them in registers, two of 16 bits in one;
`loss_kernel` takes any row, and reads it twice, the second time from the L2 cache where that is large enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest
from lowvram_kernels.random.stochastic_rounding_triton import nearest_bf16


@triton.jit
def target_logit(x_ptr, weight_ptr, target, is_known, D, stride_x, row, DEPTH: tl.constexpr):
    """Return x · W[target] of a row, in fp32."""
    product = tl.zeros([DEPTH], tl.float32)
    for start in range(0, D, DEPTH):
        place = start + tl.arange(0, DEPTH)
        x = load_fp32(x_ptr + row * stride_x + place, place < D)
        product += x * load_fp32(weight_ptr + tl.where(is_known, target, 0) * D + place, place < D)
    return tl.sum(product, 0)


@triton.jit
def loss_and_slope(total, greatest, z, is_kept, is_known):
    """Return softplus(o) and sigmoid(o) of the odds o = log total + greatest − z, 0 unless the row is kept."""
    odds = tl.log(total) + greatest - z
    # softplus without overflow; log1p(e) = log(u)·e/(u − 1) with the rounded u = 1 + e keeps small losses' precision
    # (Goldberg 1991, theorem 4).
    small = tl.exp(-tl.abs(odds))
    above = 1.0 + small
    tail = tl.where(above == 1.0, small, tl.log(above) * small / tl.where(above == 1.0, 1.0, above - 1.0))
    loss = tl.maximum(odds, 0.0, propagate_nan=tl.PropagateNan.ALL) + tail
    slope = tl.where(odds >= 0.0, 1.0, small) / (1.0 + small)
    nan = float("nan")
    return tl.where(is_kept, tl.where(is_known, loss, nan), 0.0), tl.where(is_kept, tl.where(is_known, slope, nan), 0.0)


@triton.jit
def loss_kernel(
    logits_ptr,
    x_ptr,
    weight_ptr,
    target_ptr,
    loss_ptr,
    slope_ptr,
    V,
    D,
    stride_x,
    ignore,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    WRITES: tl.constexpr,
):
    """Write the loss of each row of logits [C, V], and unless slope_ptr is None a factor s, else multiply by it here.

    With m the greatest logit and Z the sum of exp(l − m), both over all but the target, and z = x·W[target] in fp32:
    o = log Z + m − z, loss = softplus(o), s = sigmoid(o); the logits become exp(l − m) / Z, −1 at the target, times s.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    is_kept = target != ignore
    is_known = (target >= 0) & (target < V)
    logits_ptr += row * V

    z = target_logit(x_ptr, weight_ptr, target, is_known, D, stride_x, row, DEPTH)

    # Below every logit but greater than −infinity, so that no difference of two of them is NaN.
    greatest = tl.full([], -3.4e38, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        is_other = (column < V) & (column != target)
        logit = tl.where(is_other, load_fp32(logits_ptr + column, column < V), float("-inf"))
        higher = tl.maximum(greatest, tl.max(logit, 0))
        total = total * tl.exp(greatest - higher) + tl.sum(tl.exp(logit - higher), 0)
        greatest = higher
    total = tl.maximum(total, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)

    loss, slope = loss_and_slope(total, greatest, z, is_kept, is_known)
    tl.store(loss_ptr + row, loss)
    if WRITES:
        factor = slope
        if slope_ptr is not None:
            tl.store(slope_ptr + row, slope)
            factor = tl.where(is_kept, 1.0, 0.0)
        scale = factor / total
        for start in range(0, V, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            logit = load_fp32(logits_ptr + column, column < V)
            gradient = tl.where(column == target, -factor, tl.exp(logit - greatest) * scale)
            gradient = tl.where(is_kept, gradient, 0.0)
            store_nearest(logits_ptr + column, gradient, column < V)


@triton.jit
def halves(pair, IS_FP16: tl.constexpr):
    """Return the two 16-bit numbers of an int32, the lower first, in fp32."""
    if IS_FP16:
        low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def bits_of(x, IS_FP16: tl.constexpr, IS_NATIVE: tl.constexpr):
    """Round fp32 to the nearest number of 16 bits and return its bits in an int32, the upper ones 0."""
    if IS_FP16:
        return x.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    if IS_NATIVE:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return nearest_bf16(x).to(tl.int32) & 0xFFFF


@triton.jit
def held_loss_kernel(
    pair_ptr,
    x_ptr,
    weight_ptr,
    target_ptr,
    loss_ptr,
    slope_ptr,
    pairs,
    D,
    stride_x,
    ignore,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    WRITES: tl.constexpr,
    IS_FP16: tl.constexpr,
    IS_NATIVE: tl.constexpr,
):
    """Do as `loss_kernel` does for logits that are given as pairs, [C, V / 2] int32, V / 2 at most PARTS · COLUMNS."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    is_kept = target != ignore
    is_known = (target >= 0) & (target < 2 * pairs)
    z = target_logit(x_ptr, weight_ptr, target, is_known, D, stride_x, row, DEPTH)
    pair_ptr += row * pairs
    # −infinity stands in the place of the target, and where there is no logit: nothing else needs a mask.
    nothing = -0x3FF0400 if IS_FP16 else -0x7F0080
    nothing_low, nothing_high = nothing & 0xFFFF, nothing & -65536
    first = tl.where(is_known, target, -2).to(tl.int32)

    held = ()
    greatest_N = tl.full([COLUMNS], -3.4e38, tl.float32)  # below every logit but greater than −infinity
    for part in tl.static_range(PARTS):
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        pair = tl.load(pair_ptr + column, mask=column < pairs, other=nothing)
        pair = tl.where(2 * column == first, (pair & -65536) | nothing_low, pair)
        pair = tl.where(2 * column + 1 == first, (pair & 0xFFFF) | nothing_high, pair)
        low, high = halves(pair, IS_FP16)
        greatest_N = tl.maximum(greatest_N, tl.maximum(low, high))
        held = held + (pair,)  # noqa: RUF005 (Triton knows no starred expression)
    greatest = tl.max(greatest_N, 0)
    # A zero that the compiler does not know: else it would keep what one pass makes of the pairs for the next, in fp32.
    unknown = D >> 31
    total_N = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        low, high = halves(held[part] ^ unknown, IS_FP16)
        total_N += tl.exp(low - greatest) + tl.exp(high - greatest)
    total = tl.maximum(tl.sum(total_N, 0), 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)

    loss, slope = loss_and_slope(total, greatest, z, is_kept, is_known)
    tl.store(loss_ptr + row, loss)
    if WRITES:
        factor = slope
        if slope_ptr is not None:
            tl.store(slope_ptr + row, slope)
            factor = tl.where(is_kept, 1.0, 0.0)
        # Of a row that is not kept zeros are written, whatever its logits are.
        kept = tl.where(is_kept, -1, 0)
        scale = tl.where(is_kept, factor / total, 0.0)
        greatest = tl.where(is_kept, greatest, 0.0)
        for part in tl.static_range(PARTS):
            column = part * COLUMNS + tl.arange(0, COLUMNS)
            low, high = halves(held[part] & kept, IS_FP16)
            low, high = tl.exp(low - greatest) * scale, tl.exp(high - greatest) * scale
            bits = bits_of(low, IS_FP16, IS_NATIVE) | (bits_of(high, IS_FP16, IS_NATIVE) << 16)
            tl.store(pair_ptr + column, bits, mask=column < pairs)
        tl.debug_barrier()  # the target's gradient replaces the 0 that a thread has written there
        single_ptr = pair_ptr.to(tl.pointer_type(tl.int16))
        single = bits_of(tl.where(is_kept, -factor, 0.0), IS_FP16, IS_NATIVE).to(tl.int16)
        tl.store(single_ptr + target, single, mask=is_kept & is_known)
