"""Queries, keys and values of multi-head latent attention's expanded form, made of their projections as one op.

    q' = [q_nope | turned q_rope]        k = [k_nope | turned k_rope, the same in every head]        v' = [v | 0]

    dq = dq' turned back        d_kv = [dk_nope | dv]        d_rope = Σ_heads dk_rope, turned back

Pairs are neighbours, as in DeepSeek-V3.  Values are padded to the width of keys: fused kernels refuse unequal widths.
Saved for backward: the tables.
On a card one launch each way.  Forward turns queries in their own memory; backward adds up heads in fp32.  Bytes moved:
kv, k, v' and what is turned once; backward dq', dk, dv' and the gradients once.  Elsewhere, and in compiled blocks,
plain PyTorch computes into new memory.
Source: DeepSeek-AI 2024 (DeepSeek-V2), eqs. 9-19; Su et al. 2021, section 3.4.2.

Shapes: B batch, T tokens, H heads, N width of a key without position, R half the rotated width, K = N + 2R, V width of
a value, L = N + V.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.attention.widened_heads import dense, heads_at_once
from lowvram_kernels.dispatch import Launch, as_read, bytes_of, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.rms_norm import has_kernels
from lowvram_kernels.layers.rotary import Table, rotate


def reference(q: Tensor, kv: Tensor, k_rope: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the textbook form in the arguments' own dtype; autograd of it is the gradient's truth."""
    cos, sin = (part[:, None] for part in table)
    width = q.shape[-1]
    unrotated = width - k_rope.shape[-1]

    def turned(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    k_nope, v = kv.split([unrotated, kv.shape[-1] - unrotated], -1)
    every_head = turned(k_rope.unsqueeze(2)).expand(-1, -1, q.shape[2], -1)
    queries = torch.cat([q[..., :unrotated], turned(q[..., unrotated:])], -1)
    return queries, torch.cat([k_nope, every_head], -1), F.pad(v, (0, width - v.shape[-1]))


class _MlaHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, cos_TR: Tensor, sin_TR: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.value_width = kv.shape[-1] - q.shape[-1] + k_rope.shape[-1]
        return _launch_forward(q, kv, k_rope, (cos_TR, sin_TR))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return *_launch_backward(dq, dk, dv, ctx.saved_tensors, ctx.value_width), None, None


def _constants(heads: int, width: int, pairs: int) -> dict[str, int]:
    return heads_at_once(heads, width) | {"PAIRS": 1 << (pairs - 1).bit_length()}


def _launch_forward(q: Tensor, kv: Tensor, k_rope: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Turn q in its memory, and return it with keys and values."""
    q, kv, k_rope = dense(q), dense(kv), dense(k_rope)
    (batch, tokens, heads, width), pairs = q.shape, table[0].shape[1]
    k = q.new_empty(q.shape)
    v = torch.empty_like(k)
    unrotated = width - 2 * pairs
    sizes = (tokens, heads, unrotated, pairs, kv.shape[-1] - unrotated)
    strides = (*q.stride()[:3], *kv.stride()[:3], *k_rope.stride()[:2])
    arguments = (*map(as_read, (q, kv, k_rope)), *table, as_read(k), as_read(v), *sizes, *strides)
    constants = _constants(heads, width, pairs)
    what = Launch("attention.mla_heads_triton", "mla_heads_kernel", (batch * tokens,), arguments, constants, 1)
    turned = 2 * bytes_of(q) * 2 * pairs // width
    launch(what, moved_bytes=bytes_of(kv, k_rope, *table, k, v) + turned)
    return q.view_as(q), k, v


def _launch_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, table: Table, value_width: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = dense(dq), dense(dk), dense(dv)
    (batch, tokens, heads, width), pairs = dq.shape, table[0].shape[1]
    unrotated = width - 2 * pairs
    d_query = dq.new_empty(dq.shape)
    d_kv = dq.new_empty(batch, tokens, heads, unrotated + value_width)
    d_rope = dq.new_empty(batch, tokens, 2 * pairs)
    sizes = (tokens, heads, unrotated, pairs, value_width)
    strides = (*dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])
    tensors = (*map(as_read, (dq, dk, dv)), *table, *map(as_read, (d_query, d_kv, d_rope)))
    constants = _constants(heads, width, pairs)
    kernel = "mla_heads_backward_kernel"
    what = Launch("attention.mla_heads_triton", kernel, (batch * tokens,), (*tensors, *sizes, *strides), constants, 1)
    read_of_dv = bytes_of(dv) * value_width // width
    launch(what, moved_bytes=bytes_of(dq, dk, *table, d_query, d_kv, d_rope) + read_of_dv)
    return d_query, d_kv, d_rope


def mla_heads_(q: Tensor, kv: Tensor, k_rope: Tensor, table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values for attention, each [B, T, H, K]; q's memory may hold the queries afterwards.

    q: [B, T, H, K] fp32|bf16|fp16, of which nobody may need the values later.  kv: [B, T, H, L], keys without position
    beside values.  k_rope: [B, T, 2R], 2R ≤ K, not turned yet.  table: cosines and sines, each [T, R] fp32.  Values are
    followed by zeros to the width of keys.  The products are taken in fp32; gradients come in their arguments' dtype.
    Saved for backward: the tables.
    Raises ShapeError if shapes do not fit together, or values are wider than keys.
    Source: DeepSeek-AI 2024, eqs. 9-19.
    """
    cos_TR, sin_TR = table
    width, rotated = q.shape[-1], k_rope.shape[-1]
    value_width = kv.shape[-1] - width + rotated
    fits = q.dim() == kv.dim() == 4 and q.shape[:3] == kv.shape[:3] and k_rope.shape[:-1] == q.shape[:2]
    has_table = cos_TR.shape == sin_TR.shape == (q.shape[1], rotated // 2) and rotated % 2 == 0
    if not (fits and has_table and rotated <= width and 0 < value_width <= width):
        shapes = f"q is {list(q.shape)}, kv {list(kv.shape)}, k_rope {list(k_rope.shape)}"
        tables = f"the table {list(cos_TR.shape)} and {list(sin_TR.shape)}"
        needed = "[B, T, H, K], [B, T, H, K - 2R + V], [B, T, 2R] and [T, R] twice, 2R and V at most K"
        raise ShapeError(f"mla_heads_: {shapes}, {tables}; they need {needed}.")
    if has_kernels(q):
        tables_TR = [part.float().contiguous() for part in table]
        return _MlaHeads.apply(q, kv, k_rope, *tables_TR)  # type: ignore[no-untyped-call]
    queries = rotate(q, table, interleaved=True)
    k_rope = rotate(k_rope.unsqueeze(2), table, interleaved=True)
    k_nope, v = kv.split([width - rotated, value_width], dim=-1)
    k = torch.cat([k_nope, k_rope.expand(-1, -1, q.shape[2], -1)], dim=-1)
    # The values are copied, because a view saved for backward would keep the keys without positions alive too.
    return queries, k, v.contiguous() if value_width == width else F.pad(v, (0, width - value_width))
