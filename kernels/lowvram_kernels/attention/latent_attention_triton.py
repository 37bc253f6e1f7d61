"""Attention of one query per sequence over a latent cache, on the card; knows no model and no cache's growth.

A program takes some heads, one sequence and one run of its positions, and leaves an unfinished result: the sum of
weight · latent, the largest score and the sum of weights.  A second kernel joins the runs in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowvram_kernels.quant.e4m3_triton import decode_256th


@triton.jit
def _load_rows(pointer, stride, left, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Load ROWS rows, zeros from row `left` and from column WIDTH on."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, PADDED)[None, :]
    seen = row < left
    if WIDTH != PADDED:
        seen = seen & (column < WIDTH)
    return tl.load(pointer + row * stride + column, mask=seen, other=0)


@triton.jit
def _decode(code, scale, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr, BLOCKS: tl.constexpr, NATIVE: tl.constexpr):
    """Return bytes of E4M3 times the scales of their 128 channels, in fp32, exactly."""
    if NATIVE:
        number = code.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
    else:
        number = tl.where((code & 0x7F) == 0x7F, float("nan"), decode_256th(code).to(tl.float32))
        scale = scale * 256.0
    # The scales are spread, and not the numbers folded: these would lose the layout in which they were loaded.
    scale = tl.reshape(scale, [POSITIONS, BLOCKS, 1])
    scale = tl.broadcast_to(scale, [POSITIONS, BLOCKS, CHANNELS // BLOCKS])
    return number * tl.reshape(scale, [POSITIONS, CHANNELS])


@triton.jit
def _score(q, rows, score, TURNED: tl.constexpr):
    """Add q · rowsᵀ to the scores, or rows · qᵀ to turned ones."""
    if TURNED:
        score = tl.dot(rows, tl.trans(q), score, input_precision="ieee")
    else:
        score = tl.dot(q, tl.trans(rows), score, input_precision="ieee")
    return score


@triton.jit
def _mix(weight, rows, out, TURNED: tl.constexpr):
    """Add weight · rows to the result, or rowsᵀ · weight to the turned one."""
    weight = weight.to(rows.dtype)
    if TURNED:
        out = tl.dot(tl.trans(rows), weight, out, input_precision="ieee")
    else:
        out = tl.dot(weight, rows, out, input_precision="ieee")
    return out


# What changes from one token to the next must not make a kernel anew.
@triton.jit(do_not_specialize=["S", "splits", "window"])
def attend_kernel(
    q_latent_ptr,
    q_rope_ptr,
    latent_ptr,
    rope_ptr,
    latent_scale_ptr,
    length_ptr,
    partial_ptr,
    largest_ptr,
    total_ptr,
    q_latent_stride_b,
    q_latent_stride_h,
    q_rope_stride_b,
    q_rope_stride_h,
    latent_stride_b,
    latent_stride_s,
    rope_stride_b,
    rope_stride_s,
    scale_stride_b,
    scale_stride_s,
    H,
    S,
    splits,
    window,
    scale_log2,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    R: tl.constexpr,
    ROTATED: tl.constexpr,
    HEADS: tl.constexpr,
    POSITIONS: tl.constexpr,
    TURNED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Write partial [B, H, splits, C], largest and total [B, H, splits]; total 0 where a split sees nothing.

    scale_log2: the scale of the scores times log₂ e, since the powers are of two.  TURNED: scores are [POSITIONS,
    HEADS] and the result [CHANNELS, HEADS] while they are at work, which puts the many rows where Hopper wants them.
    """
    # The axis of the positions among the scores, and of the heads' results where they are spread.
    SEEN: tl.constexpr = 0 if TURNED else 1
    BLOCKS: tl.constexpr = CHANNELS // 128 if CHANNELS > 128 else 1
    first_head = tl.program_id(0) * HEADS
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)
    place = (sequence * H + head) * splits + split

    end = tl.minimum(tl.load(length_ptr + sequence), S)
    start = tl.maximum(end - window, 0)
    tiles = tl.cdiv(end - start, POSITIONS)
    step = tl.cdiv(tiles, splits) * POSITIONS
    start += split * step
    end = tl.minimum(start + step, end)
    if start >= end:
        tl.store(largest_ptr + place, tl.full([HEADS], float("-inf"), tl.float32), mask=head < H)
        tl.store(total_ptr + place, tl.zeros([HEADS], tl.float32), mask=head < H)
        return

    q_latent_ptr += sequence * q_latent_stride_b + first_head.to(tl.int64) * q_latent_stride_h
    q_rope_ptr += sequence * q_rope_stride_b + first_head.to(tl.int64) * q_rope_stride_h
    q_latent = _load_rows(q_latent_ptr, q_latent_stride_h, H - first_head, C, CHANNELS, HEADS)
    q_rope = _load_rows(q_rope_ptr, q_rope_stride_h, H - first_head, R, ROTATED, HEADS)
    latent_ptr += sequence * latent_stride_b + start.to(tl.int64) * latent_stride_s
    rope_ptr += sequence * rope_stride_b + start.to(tl.int64) * rope_stride_s
    if latent_scale_ptr is not None:
        latent_scale_ptr += sequence * scale_stride_b + start.to(tl.int64) * scale_stride_s

    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    out = tl.zeros([CHANNELS, HEADS] if TURNED else [HEADS, CHANNELS], tl.float32)
    if latent_scale_ptr is not None:
        # Bytes are decoded on their way to shared memory, so no asynchronous copy can fetch them ahead; registers do.
        code = _load_rows(latent_ptr, latent_stride_s, end - start, C, CHANNELS, POSITIONS)
    for position in range(start, end, POSITIONS):
        left = end - position
        rope = _load_rows(rope_ptr, rope_stride_s, left, R, ROTATED, POSITIONS).to(q_rope.dtype)
        rope_ptr += POSITIONS * rope_stride_s
        if latent_scale_ptr is not None:
            latent_scale = _load_rows(latent_scale_ptr, scale_stride_s, left, (C + 127) // 128, BLOCKS, POSITIONS)
            latent = _decode(code, latent_scale, CHANNELS, POSITIONS, BLOCKS, NATIVE).to(q_latent.dtype)
            latent_scale_ptr += POSITIONS * scale_stride_s
            latent_ptr += POSITIONS * latent_stride_s
        else:
            latent = _load_rows(latent_ptr, latent_stride_s, left, C, CHANNELS, POSITIONS).to(q_latent.dtype)
            latent_ptr += POSITIONS * latent_stride_s
        score = tl.zeros([POSITIONS, HEADS] if TURNED else [HEADS, POSITIONS], tl.float32)
        score = _score(q_latent, latent, _score(q_rope, rope, score, TURNED), TURNED) * scale_log2
        if latent_scale_ptr is not None:
            code = _load_rows(latent_ptr, latent_stride_s, left - POSITIONS, C, CHANNELS, POSITIONS)
        # What is not seen was read as zeros; its weight must be zero too.
        seen = tl.expand_dims(tl.arange(0, POSITIONS) < left, 1 - SEEN)
        score = tl.where(seen, score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, SEEN))
        weight = tl.exp2(score - tl.expand_dims(new_largest, SEEN))
        fade = tl.exp2(largest - new_largest)
        total = total * fade + tl.sum(weight, SEEN)
        out = _mix(weight, latent, out * tl.expand_dims(fade, SEEN), TURNED)
        largest = new_largest

    if TURNED:
        out = tl.trans(out)
    column = tl.arange(0, CHANNELS)
    written = (head < H)[:, None] & (column < C)[None, :]
    tl.store(partial_ptr + place[:, None] * C + column[None, :], out, mask=written)
    tl.store(largest_ptr + place, largest, mask=head < H)
    tl.store(total_ptr + place, total, mask=head < H)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial_ptr,
    largest_ptr,
    total_ptr,
    out_ptr,
    splits,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Join the splits of one row of out [B·H, C], SPLITS at a time, in their order; zeros where nothing was seen."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    some = tl.arange(0, SPLITS)
    largest_ptr += row * splits
    total_ptr += row * splits
    partial_ptr += row * splits * C

    largest = tl.full([SPLITS], float("-inf"), tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + some
        largest = tl.maximum(largest, tl.load(largest_ptr + split, mask=split < splits, other=float("-inf")))
    largest = tl.max(largest, 0)
    # Where no split saw anything every weight is zero, whatever it is taken against.
    largest = tl.where(largest == float("-inf"), 0.0, largest)

    total = tl.zeros([SPLITS], tl.float32)
    out = tl.zeros([SPLITS, CHANNELS], tl.float32)
    for first in range(0, splits, SPLITS):
        split = first + some
        part = tl.load(total_ptr + split, mask=split < splits, other=0.0)
        # Not zero, rather than above it: NaN has to pass.
        seen = part != 0.0
        weight = tl.exp2(tl.load(largest_ptr + split, mask=seen, other=float("-inf")) - largest)
        total += part * weight
        mask = seen[:, None] & (column < C)[None, :]
        out += tl.load(partial_ptr + split[:, None] * C + column[None, :], mask=mask, other=0.0) * weight[:, None]
    total = tl.sum(total, 0)
    out = tl.sum(out, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * C + column, out.to(out_ptr.dtype.element_ty), mask=column < C)
