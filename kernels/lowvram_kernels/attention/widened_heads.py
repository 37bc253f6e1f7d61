"""Queries and keys widened by columns (ALiBi's), and values by zeros to the same width, as one op.

    q' = [q | c_q of the head]        k' = [k | c_k of the position]        v' = [v | 0]

    dq, dk, dv: the first columns of dq', dk', dv'; what widens gets no gradient

Saved for backward: nothing.
On a card one launch each way, and the three gradients are views of one tensor, beside each other.  Bytes moved: what is
read and what is written, each once; of dq', dk' and dv' only what is returned.  Elsewhere, and in compiled blocks,
plain PyTorch.
Source: concatenation; that fused kernels refuse unequal widths is torch's rule.

Shapes: B batch, T tokens, H query heads, G key/value heads, K width, C columns, W = K + C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.dispatch import Launch, as_read, bytes_of, launch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.rms_norm import has_kernels

# Numbers that a program has at work, on one warp: some heads of one token.
_HELD = 512


def reference(q: Tensor, k: Tensor, v: Tensor, q_HC: Tensor, k_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the textbook form; autograd of it is the gradient's truth."""
    columns = q_HC.shape[1]
    q_BTHC = q_HC.expand(*q.shape[:2], -1, -1)
    k_BTGC = k_TC[:, None].expand(k.shape[0], -1, k.shape[2], -1)
    return torch.cat([q, q_BTHC], -1), torch.cat([k, k_BTGC], -1), F.pad(v, (0, columns))


class _WidenedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, q_HC: Tensor, k_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (dense(x) for x in (q, k, v))
        (batch, tokens, heads, width), groups, columns = q.shape, k.shape[2], q_HC.shape[1]
        ctx.width = width
        wide = tuple(x.new_empty(*x.shape[:3], width + columns) for x in (q, k, v))
        tensors = (*map(as_read, (q, k, v)), *(as_read(part.contiguous()) for part in (q_HC, k_TC)))
        sizes = (tokens, heads, groups, width, columns, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        constants = heads_at_once(max(heads, groups), width + columns)
        arguments = (*tensors, *map(as_read, wide), *sizes)
        module = "attention.widened_heads_triton"
        what = Launch(module, "widened_heads_kernel", (batch * tokens,), arguments, constants, 1)
        launch(what, moved=(q, k, v, q_HC, k_TC, *wide))
        return wide[0], wide[1], wide[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = (dense(x) for x in (dq, dk, dv))
        (batch, tokens, heads), groups, width = dq.shape[:3], dk.shape[2], ctx.width
        whole = dq.new_empty(batch, tokens, heads + 2 * groups, width)
        sizes = (tokens, heads, groups, width, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3])
        arguments = (*map(as_read, (dq, dk, dv, whole)), *sizes)
        constants = heads_at_once(max(heads, groups), width)
        module = "attention.widened_heads_triton"
        what = Launch(module, "narrowed_heads_kernel", (batch * tokens,), arguments, constants, 1)
        launch(what, moved_bytes=2 * bytes_of(whole))
        return *whole.split([heads, groups, groups], 2), None, None


def dense(x: Tensor) -> Tensor:
    """Return x with the numbers of a head side by side, as kernels read it; a copy only where strides demand one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def heads_at_once(heads: int, width: int) -> dict[str, int]:
    """Return a kernel's constants: how many heads a program has at work, and rounded columns, both powers of two."""
    columns = 1 << (width - 1).bit_length()
    return {"HEADS": min(1 << (heads - 1).bit_length(), max(1, _HELD // columns)), "COLUMNS": columns}


def widened_heads(q: Tensor, k: Tensor, v: Tensor, q_HC: Tensor, k_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Widen queries and keys by their columns, and values by zeros.

    q: [B, T, H, K].  k, v: [B, T, G, K].  q_HC: [H, C] for every query of a head, k_TC: [T, C] for every head of a key;
    they need no gradient.  All of one dtype, fp32|bf16|fp16.  Returns [B, T, H, K + C] and [B, T, G, K + C] twice.
    Saved for backward: nothing.
    Raises ShapeError if shapes or dtypes do not fit together.
    """
    fits = q.dim() == 4 and k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[3:] == q.shape[3:]
    has_columns = q_HC.dim() == 2 and q_HC.shape[0] == q.shape[-2] and k_TC.shape == (q.shape[1], q_HC.shape[1])
    if not (fits and has_columns and q.dtype == k.dtype == v.dtype == q_HC.dtype == k_TC.dtype):
        shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (q, k, v, q_HC, k_TC))
        needed = "[B, T, H, K], [B, T, G, K] twice, [H, C] and [T, C] of one dtype"
        raise ShapeError(f"widened_heads: given are {shapes}; needed are {needed}.")
    if has_kernels(q):
        return _WidenedHeads.apply(q, k, v, q_HC, k_TC)  # type: ignore[no-untyped-call]
    q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q, k, v))
    q_BHTC = q_HC[None, :, None].expand(*q_BHTK.shape[:3], -1)
    k_BGTC = k_TC.expand(*k_BGTK.shape[:2], -1, -1)
    wide = torch.cat([q_BHTK, q_BHTC], -1), torch.cat([k_BGTK, k_BGTC], -1), F.pad(v_BGTK, (0, q_HC.shape[1]))
    return wide[0].transpose(1, 2), wide[1].transpose(1, 2), wide[2].transpose(1, 2)
