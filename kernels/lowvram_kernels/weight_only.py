"""Products with weights of 8 bits that are decoded where they are used; knows no layer and no gradient.

    y[n, o] = Σᵢ x[n, i] · code[o, i] · scale[o, i]        what `quantise.py` makes of a weight

x keeps its own numbers, so that many rows and few see the same function.  Few rows on a card are `small_matmul`'s;
otherwise the weight is decoded to x's dtype for one product of the library and dies with it.

Alive inside, without a card's kernel for few rows: the decoded weight.
Source: the definition.

Shapes: N rows, O outputs, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels.dispatch import card_of, choose
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.quantise import Scaled, dequantise
from lowvram_kernels.scaled_matmul import BLOCK, rows_of_scale
from lowvram_kernels.small_matmul import MOST_ROWS, small_matmul


def reference(x: Tensor, weight: Scaled) -> Tensor:
    """Decode the weight to x's dtype and multiply."""
    return F.linear(x, dequantise(weight, x.dtype))


def weight_only_linear(x: Tensor, weight: Scaled) -> Tensor:
    """Multiply x by the transposed weight; the result comes in x's dtype.

    x: [..., I] fp32|bf16|fp16.  weight: code [O, I]; scale [⌈O/128⌉, ⌈I/128⌉] or [O, ⌈I/128⌉] for E4M3, [O, 1] for
    INT8.  Returns [..., O].  No node of autograd.
    Raises ShapeError if shapes, dtypes or devices do not fit.
    Source: the definition.
    """
    if x.dim() < 1 or x.shape[-1] != weight.code.shape[-1] or not x.dtype.is_floating_point:
        found = f"x is {list(x.shape)} {x.dtype}, weight {list(weight.code.shape)}"
        raise ShapeError(f"weight_only_linear: {found}; needs floating [..., I] and [O, I].")
    x_NI = x.detach().reshape(-1, x.shape[-1])
    if x_NI.shape[0] <= MOST_ROWS and choose("small_matmul", card_of(x.device)).backend == "triton":
        y_NO = small_matmul(x_NI, weight)
    else:
        y_NO = reference(x_NI, weight)
    return y_NO.view(*x.shape[:-1], weight.code.shape[0])


def look_up(ids: Tensor, table: Scaled, dtype: torch.dtype) -> Tensor:
    """Look up and decode rows.

    ids: int64, any shape.  table: code [V, D], scales as of a weight.  Returns ids' shape and D, in dtype.
    Raises ShapeError if table or ids are another.
    """
    if ids.dtype != torch.int64:
        raise ShapeError(f"look_up: ids is {ids.dtype}; needs int64.")
    height = rows_of_scale(table, "look_up: table")
    id_N = ids.flatten()
    # Rows of blocks are rows with scales of their own.
    scale = table.scale[id_N // BLOCK if height == BLOCK else id_N]
    return dequantise(Scaled(table.code[id_N], scale), dtype).view(*ids.shape, table.code.shape[1])


def decoded(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a weight or a stack of them in dtype: itself where it is plain and of that dtype, else a copy."""
    return weight.to(dtype) if scale is None else dequantise(Scaled(weight, scale), dtype)
