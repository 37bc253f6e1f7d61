"""A router: each token's experts, chosen by sigmoid score plus a balancing bias and weighed by the score alone.

    s = σ(x Wᵀ)        ids = the K largest of s + bias        w_k = factor · s_k / Σ_j s_j
    ds_k = factor · (dw_k − Σ_j dw_j s_j / S) / S        dx = Σ_k ds_k s_k (1 − s_k) W[ids_k],   S = Σ_j s_j

Scores are fp32, since routing must not depend on bf16 rounding.  The bias has no gradient.
Saved for backward: x, W, ids and the chosen scores, 12 bytes a choice; the plain form keeps all scores.
On a card one launch forward, and backward one with parts of dW that another adds up.
Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.1.2; the gradient is its derivative.

Shapes: N tokens, D width, E experts, K choices of each token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram_kernels.dispatch import Launch, Tile, as_read, card_of, launch, runs_kernels
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.rms_norm import rows_of, sum_parts
from lowvram_kernels.matmul.fp32_sums import leaves_of

# Numbers of its tables of rows or columns and experts that a program holds in registers, and their longest side.
_TABLE, _LONGEST = 2048, 64
# Experts whose scores a program holds for its rows without spilling; with more, plain PyTorch routes.
_MOST_EXPERTS = 64
# A product's least side, in Triton.
_LEAST = 16


def reference(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, factor: float) -> tuple[Tensor, Tensor]:
    """Compute the textbook form in x's dtype; autograd of the weights is the gradients' truth."""
    score_NE = torch.sigmoid(x @ weight.to(x.dtype).mT)
    ids_NK = (score_NE + bias).argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    chosen_NK = score_NE.gather(1, ids_NK)
    return factor * chosen_NK / chosen_NK.sum(1, keepdim=True), ids_NK


class _Fp32Linear(torch.autograd.Function):
    """Computes x Wᵀ in fp32; keeps no fp32 copy of x for backward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return x_ND.float() @ weight_ED.float().T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_ED = ctx.saved_tensors
        dy_NE = gradients[0]
        return (dy_NE @ weight_ED.float()).to(x_ND.dtype), (dy_NE.T @ x_ND.float()).to(weight_ED.dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, factor: float) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        score_NE = _Fp32Linear.apply(x, weight).sigmoid()  # type: ignore[no-untyped-call]  # untyped in torch
    else:
        score_NE = (x.float() @ weight.float().T).sigmoid()
    ids_NK = (score_NE.detach() + bias).topk(top_k, dim=-1, sorted=False).indices
    weights_NK = score_NE.gather(1, ids_NK)
    return weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20) * factor, ids_NK


def _tile(experts: int, is_backward: bool) -> tuple[Tile, dict[str, int]]:
    """Return the rows and columns of a program and its columns at a time, and the rounded number of experts."""
    rounded = max(_LEAST, 1 << (experts - 1).bit_length())
    side = max(_LEAST, min(_TABLE // rounded, _LONGEST))
    tile = Tile(min(side, _LONGEST // 2), side if is_backward else _LONGEST // 2, 0)
    return tile, {"EXPERTS": rounded, "ROWS": tile.rows, "COLUMNS": tile.columns}


def _choices(top_k: int) -> dict[str, int]:
    return {"K": top_k, "CHOICES": 1 << (top_k - 1).bit_length()}


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, top_k: int, factor: float) -> tuple[Tensor, Tensor]:
        x_ND, experts = rows_of(x), weight.shape[0]
        (count, width), (tile, sizes) = x_ND.shape, _tile(experts, is_backward=False)
        weights_NK, score_NK = (x.new_empty(count, top_k, dtype=torch.float32) for _ in range(2))
        ids_NK = x.new_empty(count, top_k, dtype=torch.int64)
        tensors = (as_read(x_ND), as_read(weight.contiguous()), bias, weights_NK, ids_NK, score_NK)
        arguments = (*tensors, count, width, experts, x_ND.stride(0), factor)
        constants = sizes | _choices(top_k)
        grid = (-(-count // tile.rows),)
        what = Launch("moe.routing_triton", "route_kernel", grid, arguments, constants, tile.warps)
        launch(what, moved=(x, weight, bias, weights_NK, ids_NK, score_NK))
        ctx.save_for_backward(x, weight, ids_NK, score_NK)
        ctx.leaves, ctx.factor = leaves_of(weight), factor
        ctx.mark_non_differentiable(ids_NK)
        ctx.set_materialize_grads(False)
        return weights_NK, ids_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_weights: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_weights is None:
            return (None,) * 5
        x, weight, ids_NK, score_NK = ctx.saved_tensors
        if ctx.leaves is not None:
            (weight,) = ctx.leaves
        x_ND, experts = rows_of(x), weight.shape[0]
        (count, width), (tile, sizes) = x_ND.shape, _tile(experts, is_backward=True)
        across = -(-width // tile.columns)
        blocks = -(-count // tile.rows)
        share = -(-blocks // min(blocks, -(-2 * card_of(x.device).multiprocessors // across))) * tile.rows
        programs = -(-count // share)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        partial_PED = x.new_empty(programs, experts * width, dtype=torch.float32)
        d_weights = d_weights.contiguous()
        tensors = (d_weights, ids_NK, score_NK, as_read(x_ND), as_read(weight.contiguous()), as_read(dx), partial_PED)
        arguments = (*tensors, count, width, experts, x_ND.stride(0), share, ctx.factor)
        constants = sizes | _choices(ids_NK.shape[1])
        grid = (across, programs)
        what = Launch("moe.routing_triton", "route_backward_kernel", grid, arguments, constants, tile.warps)
        launch(what, moved=(d_weights, ids_NK, score_NK, x, weight, dx, partial_PED))
        return dx, sum_parts(partial_PED, weight), None, None, None


def route(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, factor: float) -> tuple[Tensor, Tensor]:
    """Choose each token's experts and weigh them; weights have gradients for x and weight.

    x: [N, D] fp32|bf16|fp16.  weight: [E, D], of any of these dtypes.  bias: [E] fp32.  top_k: K, at most E.
    factor: what the weights of a token sum to.  Returns weights [N, K] fp32 and ids [N, K] int64, in any order.
    A row with a number that is not finite still chooses experts that exist.
    Raises ShapeError if shapes do not fit together.
    Source: DeepSeek-AI 2024 (DeepSeek-V3), section 2.1.2 (auxiliary-loss-free load balancing).
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or bias.shape != weight.shape[:1]:
        shapes = f"x is {list(x.shape)}, weight {list(weight.shape)}, bias {list(bias.shape)}"
        raise ShapeError(f"route: {shapes}; they need [N, D], [E, D] and [E].")
    if not 1 <= top_k <= weight.shape[0]:
        raise ShapeError(f"route: top_k is {top_k}; it needs 1 to {weight.shape[0]}, the number of experts.")
    if x.numel() == 0 or weight.shape[0] > _MOST_EXPERTS or not runs_kernels("grouped_matmul", x.device):
        return _plain(x, weight, bias, top_k, factor)
    return _Route.apply(x, weight, bias, top_k, factor)  # type: ignore[no-untyped-call]
