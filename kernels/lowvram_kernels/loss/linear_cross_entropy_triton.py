"""The Triton kernel of a chunk's losses and of the gradient of its logits, which replaces them in their memory.

One program takes one row.  It reads the logits twice, the second time mostly from the L2 cache, and writes them once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.layers.rms_norm_triton import load_fp32, store_nearest


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

    product = tl.zeros([DEPTH], tl.float32)
    for start in range(0, D, DEPTH):
        place = start + tl.arange(0, DEPTH)
        x = load_fp32(x_ptr + row * stride_x + place, place < D)
        product += x * load_fp32(weight_ptr + tl.where(is_known, target, 0) * D + place, place < D)
    z = tl.sum(product, 0)

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

    odds = tl.log(total) + greatest - z
    # softplus without overflow; log1p(e) = log(u)·e/(u − 1) with the rounded u = 1 + e keeps small losses' precision
    # (Goldberg 1991, theorem 4).
    small = tl.exp(-tl.abs(odds))
    above = 1.0 + small
    tail = tl.where(above == 1.0, small, tl.log(above) * small / tl.where(above == 1.0, 1.0, above - 1.0))
    loss = tl.maximum(odds, 0.0, propagate_nan=tl.PropagateNan.ALL) + tail
    loss = tl.where(is_known, loss, float("nan"))
    tl.store(loss_ptr + row, tl.where(is_kept, loss, 0.0))
    if WRITES:
        slope = tl.where(odds >= 0.0, 1.0, small) / (1.0 + small)
        slope = tl.where(is_kept, tl.where(is_known, slope, float("nan")), 0.0)
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
