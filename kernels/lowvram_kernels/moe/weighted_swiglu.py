"""SwiGLU of the rows of experts, each times the routing weight of its choice; no autograd.

    h = w · p        p = silu(gate) · up        [gate | up] = gate_up
    dw = Σ_i dh·p    dgate_up = the gradient of p for w·dh

On a card one launch each way, in fp32 between; h takes dh's place.  Elsewhere by the ops of `swiglu.py`.
Source: the chain rule of `experts.py`.

Shapes: M rows, sorted by expert; N tokens, K choices of each, M = N·K; I inner width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_kernels.dispatch import Launch, Tile, as_read, bytes_of, launch
from lowvram_kernels.layers import swiglu

# Forward as SwiGLU without weights; backward a program holds whole rows, a part of their columns at a time.
_TILE, _BACKWARD_TILE = swiglu.TILE, Tile(4, 256, 256)


def reference(gate_up_MI: Tensor, weights_NK: Tensor, order_M: Tensor) -> Tensor:
    """Compute the textbook form in the arguments' own dtype; autograd of it is the gradients' truth."""
    gate, up = gate_up_MI.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up * weights_NK.reshape(-1)[order_M][:, None]


def weighted_product(gate_up_MI: Tensor, weights_NK: Tensor, order_M: Tensor) -> Tensor:
    """Return h, [M, I] in gate_up's dtype.

    gate_up: [M, 2I].  weights: [N, K], of any floating dtype.  order: [M], the choice n·K + k of each row.
    """
    if not swiglu.has_kernels(gate_up_MI):
        weight_M1 = weights_NK.reshape(-1)[order_M].to(gate_up_MI.dtype)[:, None]
        return swiglu.gated_product(gate_up_MI).mul_(weight_M1)
    (rows, twice), tile = gate_up_MI.shape, _TILE
    product_MI = gate_up_MI.new_empty(rows, twice // 2)
    grid = (-(-rows // tile.rows), -(-(twice // 2) // tile.columns))
    arguments = (as_read(gate_up_MI), as_read(weights_NK.contiguous()), order_M, as_read(product_MI), rows, twice // 2)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    what = Launch("moe.weighted_swiglu_triton", "weighted_swiglu_kernel", grid, arguments, constants, tile.warps)
    launch(what, moved=(gate_up_MI, weights_NK, order_M, product_MI))
    return product_MI


def weighted_product_backward(
    dh_MI: Tensor, gate_up_MI: Tensor, weights_NK: Tensor, order_M: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return dgate_up [M, 2I], h [M, I] and dweights [N, K] in weights' dtype, or None where it is not needed.

    dh: [M, I], contiguous; its memory is overwritten.  The others: as `weighted_product` takes them.
    """
    if swiglu.has_kernels(gate_up_MI):
        return _backward_on_card(dh_MI, gate_up_MI, weights_NK, order_M, needs_weights)
    weight_M1 = weights_NK.reshape(-1)[order_M].to(dh_MI.dtype)[:, None]
    d_gate_up_MI, product_MI = swiglu.gated_product_backward(dh_MI * weight_M1, gate_up_MI)
    dweights = None
    if needs_weights:
        dweights_M = (dh_MI * product_MI).sum(-1, dtype=torch.float32).to(weights_NK.dtype)
        dweights = torch.empty_like(dweights_M).index_copy_(0, order_M.long(), dweights_M).view(weights_NK.shape)
    return d_gate_up_MI, product_MI.mul_(weight_M1), dweights


def _backward_on_card(
    dh_MI: Tensor, gate_up_MI: Tensor, weights_NK: Tensor, order_M: Tensor, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    (rows, width), tile = dh_MI.shape, _BACKWARD_TILE
    d_gate_up_MI = torch.empty_like(gate_up_MI)
    dweights = torch.empty_like(weights_NK, memory_format=torch.contiguous_format) if needs_weights else None
    tensors = (as_read(dh_MI), as_read(gate_up_MI), as_read(weights_NK.contiguous()), order_M, as_read(d_gate_up_MI))
    arguments = (*tensors, None if dweights is None else as_read(dweights), rows, width)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    grid = (-(-rows // tile.rows),)
    what = Launch(
        "moe.weighted_swiglu_triton", "weighted_swiglu_backward_kernel", grid, arguments, constants, tile.warps
    )
    launch(what, moved_bytes=2 * bytes_of(dh_MI) + bytes_of(gate_up_MI, weights_NK, order_M, d_gate_up_MI, dweights))
    return d_gate_up_MI, dh_MI, dweights
