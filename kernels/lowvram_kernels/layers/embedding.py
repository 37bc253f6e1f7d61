"""Embedding lookup in a 16-bit table whose gradient is summed in fp32.

    y_n = table[ids_n]        dtable_v = Σ_{n: ids_n = v} dy_n

The row of a frequent id sums thousands of gradients: added one after the other in bf16, the sum stalls when it is 256
times as large as each term.  So the rows of equal ids are gathered, summed in fp32 and rounded once.
Saved for backward: ids.  Alive in backward beside the table's gradient: 12 bytes for each of dy's N·D elements.
A table in fp32 goes through torch's own lookup.
Source: the chain rule.

Shapes: N ids, V rows of the table, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowvram_kernels.errors import ShapeError


def reference(ids: Tensor, table: Tensor) -> Tensor:
    """Look up by indexing; autograd of it is the gradient's truth."""
    return table[ids]


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        return F.embedding(ids, table).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        id_N, order_N = ids.flatten().sort(stable=True)
        is_new_N = torch.ones_like(id_N)
        is_new_N[1:] = id_N[1:] != id_N[:-1]
        rank_N = is_new_N.cumsum(0) - 1
        dy_ND = dy.reshape(-1, dy.shape[-1])[order_N].float()
        sum_ND = torch.zeros_like(dy_ND).index_add_(0, rank_N, dy_ND)
        del dy_ND
        dtable_VD = torch.zeros(ctx.rows, sum_ND.shape[1], dtype=ctx.dtype, device=dy.device)
        # Rows of equal ids are written once for each, always with the same numbers.
        dtable_VD[id_N] = sum_ND.to(ctx.dtype)[rank_N]
        return None, dtable_VD, None


def embedding(ids: Tensor, table: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Look up rows.

    ids: int64, any shape.  table: [V, D] fp32|bf16|fp16.  Returns ids' shape and D, in dtype (None: the table's).
    The gradient comes in the table's dtype, each row rounded once.
    Saved for backward: ids.
    Raises ShapeError if table is not [V, D] floating or ids is not int64.
    """
    if table.dim() != 2 or not table.dtype.is_floating_point or ids.dtype != torch.int64:
        raise ShapeError(
            f"embedding: table is {list(table.shape)} {table.dtype}, ids {ids.dtype}; needs [V, D], int64."
        )
    if table.dtype == torch.float32:
        return F.embedding(ids, table).to(dtype or table.dtype)
    return _Embedding.apply(ids, table, dtype or table.dtype)  # type: ignore[no-untyped-call]
