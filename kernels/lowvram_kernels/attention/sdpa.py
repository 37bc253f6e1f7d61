"""Softmax attention by torch's own fused kernels, with a form of each for meta mode.

    out = softmax(q kᵀ · scale + mask) v        per head; query heads share key/value heads in equal groups

The kernels are torch's: this module takes the fused one wherever a card has it, and knows what it allocates.
Saved for backward: q, k, v, out and one fp32 per query and head; the math form keeps every probability.
Source: Dao 2023 (FlashAttention 2); Rabe & Staats 2021 (memory-efficient).

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, K width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowvram_kernels.dispatch import card_of, choose_attention, is_simulated, note_work
from lowvram_kernels.errors import ShapeError

# CUDA kernels work on rows of queries and widths rounded up to these (torch, flash_api.cpp, mha_bwd).
_ROW_STEP, _WIDTH_STEP, _ACCUMULATOR_WIDTH_STEP = 128, 8, 32


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> Tensor:
    """Compute the textbook form for equal numbers of heads; autograd of it is the gradient's truth."""
    score_BHTS = (q @ k.mT).double() * scale
    if causal:
        score_BHTS = score_BHTS.masked_fill(torch.ones_like(score_BHTS, dtype=torch.bool).triu(1), -torch.inf)
    return (score_BHTS.softmax(-1) @ v.double()).to(q.dtype)


def causal_flops(q: Tensor, k: Tensor) -> float:
    """Return the FLOPs of one causal forward pass: two products over half of the scores.  q, k: [B, H, T, K]."""
    return 2.0 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]


class _CudaOnMeta(torch.autograd.Function):
    """The allocations of torch's CUDA kernels, for meta tensors.

    Flash backward adds up dq in fp32, and makes dk and dv for every query head before it sums the groups.  The
    memory-efficient one adds up dq, and at some widths dk and dv, in fp32: counted at all widths.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, is_flash: bool) -> Tensor:
        batch, heads, rows, width = q_BHTK.shape
        # Flash keeps the queries' strides; the other kernel lays a row's heads side by side, which later readers copy.
        out_BHTK = torch.empty_like(q_BHTK) if is_flash else q_BHTK.new_empty(batch, rows, heads, width).transpose(1, 2)
        lse_BHT = q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32)
        ctx.is_flash = is_flash
        note_work(causal_flops(q_BHTK, k_BGSK))
        ctx.save_for_backward(q_BHTK, k_BGSK, v_BGSK, out_BHTK, lse_BHT)
        return out_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTK, k_BGSK, v_BGSK, _out, lse_BHT = ctx.saved_tensors
        batch, heads, rows, width = q_BHTK.shape
        dq, dk, dv = torch.empty_like(q_BHTK), torch.empty_like(k_BGSK), torch.empty_like(v_BGSK)
        row_sums = torch.empty_like(lse_BHT)
        rounded = (batch, heads, -(-rows // _ROW_STEP) * _ROW_STEP, -(-width // _ACCUMULATOR_WIDTH_STEP) * 32)
        scratch = [row_sums]
        if q_BHTK.dtype != torch.float32:
            scratch.append(q_BHTK.new_empty(rounded, dtype=torch.float32))
        if not ctx.is_flash and q_BHTK.dtype != torch.float32:
            scratch += [torch.empty_like(x, dtype=torch.float32) for x in (k_BGSK, v_BGSK)]
        if heads != k_BGSK.shape[1]:
            scratch += [k_BGSK.new_empty(batch, heads, *k_BGSK.shape[2:]) for _ in range(2)]
        del scratch
        note_work(2.5 * causal_flops(q_BHTK, k_BGSK))  # five products instead of two
        return dq, dk, dv, None


def _run_simulated(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None, path: tuple[str, str]
) -> Tensor:
    """Take a card's path with meta tensors, for which torch would choose a kernel of its own."""
    bias = mask.to(q.dtype) if mask is not None else None
    if path[0] == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)[0]
    if path[1] == "math":
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return _CudaOnMeta.apply(q, k, v, path[1] == "flash")  # type: ignore[no-untyped-call]


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """Attend with every query to the keys that `causal` or `mask` leave it.

    q: [B, H, T, K].  k, v: [B, G, S, K], G a divisor of H.  mask: [T, S] bool, true where a key is seen, not
    together with causal.  Returns [B, H, T, K] in q's dtype.
    Saved for backward: q, k, v, the result and one fp32 per query (every probability in the math form); where the
    kernel takes no groups, k and v are repeated to H heads first.
    Raises ShapeError if heads or widths do not fit together.
    """
    if k.shape != v.shape or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        shapes = f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ShapeError(f"attention: {shapes}; they need [B, H, T, K] and [B, G, S, K] twice, G a divisor of H.")
    card = card_of(q.device)
    # As torch asks: a first pass whose blocks are computed again later does not learn yet.
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    backend = choose_attention(card, q.dtype, mask is not None, q.shape[-1], learns).backend
    # Without FlashAttention grouped heads fall to the kernel that writes out every score, so they are repeated.
    if q.shape[1] != k.shape[1] and backend != "flash":
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    width = q.shape[-1]
    if card.platform == "cuda" and width % _WIDTH_STEP:
        # For FlashAttention torch pads by itself; instead of the efficient kernel it takes the one that keeps scores.
        q, k, v = (F.pad(x, (0, -width % _WIDTH_STEP)) for x in (q, k, v))
    out = _run(q, k, v, scale, causal, mask, (card.platform, backend))
    return out if out.shape[-1] == width else out[..., :width]


def _run(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None, path: tuple[str, str]
) -> Tensor:
    if is_simulated():
        return _run_simulated(q, k, v, scale, causal, mask, path)
    is_grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=is_grouped)
