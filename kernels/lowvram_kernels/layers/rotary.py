"""Rotary positions, with or without the norm of each head before them, as one op.

    n = rms_norm(x) or x        y = n, and of its last 2R values each pair (a, b) turned by its position's angle:
                                (a·cos − b·sin, b·cos + a·sin)

    dn = dy turned back by the same angles        dx, dweight as in rms_norm; without a norm dx = dn

Pairs are neighbours where `interleaved` (as in DeepSeek-V3), else (i, i + R) (as in Llama).
Saved for backward: the tables, and with a norm x and one fp32 per row; what is rotated is never kept.
On a card one launch each way, and one that adds up dweight.  Bytes moved: x and y once; backward x, dy and dx once.
On a processor parts of the tokens in fp32, neighbours as complex numbers.  In compiled blocks torch.compile fuses the
plain form with its neighbours.
Source: Su et al. 2021, section 3.4.2; Zhang & Sennrich 2019, eq. 4.

Shapes: B batch, T tokens, H heads, K width of a head, R half the rotated width, N = B·T·H rows, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram_kernels.dispatch import Launch, as_read, launch, representative
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers import rms_norm as norm
from lowvram_kernels.layers.row_parts import row_parts, works_in_parts
from lowvram_kernels.matmul.fp32_sums import leaves_of

Table = tuple[Tensor, Tensor]


def reference(x: Tensor, table: Table, interleaved: bool, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Compute the textbook form in the arguments' own dtype; autograd of it is the gradient's truth."""
    cos, sin = (part[:, None] for part in table)
    normed = x if weight is None else norm.reference(x, weight, eps)
    kept, turned = normed.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], -1)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([kept, torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)], -1)


class _Rotate(torch.autograd.Function):
    """Rotates without a norm; saves only the tables for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved = interleaved
        return _rotate(x, cos_TR, sin_TR, interleaved, turns_back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate(gradients[0], cos_TR, sin_TR, ctx.interleaved, turns_back=True), None, None, None


class _NormRotate(torch.autograd.Function):
    """Normalises and rotates by the kernels alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool, eps: float
    ) -> Tensor:
        y, rstd_N = _launch_forward(x, weight, (cos_TR, sin_TR), interleaved, eps, turns_back=False)
        ctx.save_for_backward(x, weight, cos_TR, sin_TR, rstd_N)
        ctx.leaves = leaves_of(weight)
        ctx.interleaved = interleaved
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos_TR, sin_TR, rstd_N = ctx.saved_tensors
        if ctx.leaves is not None:
            (weight,) = ctx.leaves
        dx, dweight = _launch_backward(dy, x, weight, (cos_TR, sin_TR), rstd_N, ctx.interleaved)
        return dx, dweight, None, None, None, None


def _rotate(x_BTHK: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool, turns_back: bool) -> Tensor:
    if norm.has_kernels(x_BTHK):
        return _launch_forward(x_BTHK, None, _as_table((cos_TR, sin_TR)), interleaved, 0.0, turns_back)[0]
    pairs = cos_TR.shape[-1]
    y_BTHK = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    unrotated = x_BTHK.shape[-1] - 2 * pairs
    if unrotated:
        y_BTHK[..., :unrotated] = x_BTHK[..., :unrotated]
    sin_TR = -sin_TR if turns_back else sin_TR
    if works_in_parts(x_BTHK.device):
        _rotate_in_parts(x_BTHK[..., unrotated:], y_BTHK[..., unrotated:], cos_TR, sin_TR, interleaved)
        return y_BTHK
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    first, second = (
        (slice(unrotated, None, 2), slice(unrotated + 1, None, 2))
        if interleaved
        else (slice(unrotated, unrotated + pairs), slice(unrotated + pairs, None))
    )
    a, b = x_BTHK[..., first], x_BTHK[..., second]
    y_BTHK[..., first] = a * cos - b * sin
    y_BTHK[..., second] = b * cos + a * sin
    return y_BTHK


def _rotate_in_parts(x_BTHK: Tensor, y_BTHK: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> None:
    """Write x, of which everything is rotated, into y; some tokens' heads at a time, in fp32."""
    wide = torch.promote_types(x_BTHK.dtype, torch.float32)
    batch, tokens, heads, width = x_BTHK.shape
    cos_T1R, sin_T1R = (part[:, None].to(wide) for part in (cos_TR, sin_TR))
    # Neighbours are the two parts of a complex number, whose products are vectorised where strided ones are not.
    turn_T1R = torch.complex(cos_T1R, sin_T1R) if interleaved else None
    for sample in representative(batch):
        for rows in row_parts(tokens, heads * width, x_BTHK.device):
            x_CHK = torch.empty(x_BTHK[sample, rows].shape, dtype=wide, device=x_BTHK.device)
            x_CHK.copy_(x_BTHK[sample, rows])
            if turn_T1R is not None:
                torch.view_as_complex(x_CHK.unflatten(-1, (-1, 2))).mul_(turn_T1R[rows])
                y_BTHK[sample, rows] = x_CHK
                continue
            turned_CHK, (cos, sin), (a, b) = torch.empty_like(x_CHK), (cos_T1R[rows], sin_T1R[rows]), x_CHK.chunk(2, -1)
            turned_a, turned_b = turned_CHK.chunk(2, -1)
            torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-1.0)
            torch.mul(b, cos, out=turned_b).addcmul_(a, sin)
            y_BTHK[sample, rows] = turned_CHK


def _as_table(table: Table) -> Table:
    """Return the tables as kernels read them: fp32 and contiguous, themselves where they are."""
    cos_TR, sin_TR = table
    return cos_TR.float().contiguous(), sin_TR.float().contiguous()


def _heads_of(x_BTHK: Tensor) -> Tensor:
    """Return [B·T, H, K] whose heads are contiguous; a copy only where strides demand one."""
    x_NHK = x_BTHK.flatten(0, 1)
    return x_NHK if x_NHK.stride(2) == 1 or x_NHK.shape[2] == 1 else x_NHK.contiguous()


def _launch_forward(
    x_BTHK: Tensor, weight: Tensor | None, table: Table, interleaved: bool, eps: float, turns_back: bool
) -> tuple[Tensor, Tensor | None]:
    x_NHK, (tokens, width) = _heads_of(x_BTHK), (x_BTHK.shape[1], x_BTHK.shape[3])
    heads, rows = x_NHK.shape[1], x_NHK.shape[0] * x_NHK.shape[1]
    y = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    rstd_N = None if weight is None else x_BTHK.new_empty(rows, dtype=torch.float32)
    tensors = (as_read(x_NHK), None if weight is None else as_read(weight.contiguous()), *table, rstd_N, as_read(y))
    sizes = (rows, heads, tokens, width, table[0].shape[1], x_NHK.stride(0), x_NHK.stride(1), eps)
    tile = norm.norm_tile(width, is_backward=True)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INTERLEAVED": interleaved, "TURNS_BACK": turns_back}
    grid = (-(-rows // tile.rows),)
    what = Launch("layers.rotary_triton", "rotary_kernel", grid, (*tensors, *sizes), constants, tile.warps)
    launch(what, moved=(x_BTHK, weight, *table, rstd_N, y))
    return y, rstd_N


def _launch_backward(
    dy_BTHK: Tensor, x_BTHK: Tensor, weight: Tensor, table: Table, rstd_N: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor | None]:
    dy_NHK, x_NHK, (tokens, width) = _heads_of(dy_BTHK), _heads_of(x_BTHK), (x_BTHK.shape[1], x_BTHK.shape[3])
    heads, rows = x_NHK.shape[1], rstd_N.shape[0]
    tile = norm.norm_tile(width, is_backward=True)
    programs, share = norm.shares(rows, tile, x_BTHK.device)
    dx = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    partial_PK = x_BTHK.new_empty(programs, width, dtype=torch.float32)
    tensors = (as_read(dy_NHK), as_read(x_NHK), as_read(weight.contiguous()), *table, rstd_N, as_read(dx), partial_PK)
    strides = (*dy_NHK.stride()[:2], *x_NHK.stride()[:2])
    arguments = (*tensors, rows, heads, tokens, width, table[0].shape[1], *strides, share)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INTERLEAVED": interleaved}
    kernel = "rotary_norm_backward_kernel"
    what = Launch("layers.rotary_triton", kernel, (programs,), arguments, constants, tile.warps)
    launch(what, moved=(dy_BTHK, x_BTHK, weight, *table, rstd_N, dx, partial_PK))
    return dx, norm.sum_parts(partial_PK, weight)


def rotate(x: Tensor, table: Table, interleaved: bool, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Rotate the last 2R values of each head by the angles of its position, after its norm where there is a weight.

    x: [B, T, H, K] fp32|bf16|fp16; without a norm plain PyTorch takes fp64, too.  table: cosines and sines, each
    [T, R] fp32, 2R ≤ K.  interleaved: pairs are neighbours, else (i, i + R).  weight: [K], of the norm of each head's
    values; None for none.  Returns [B, T, H, K] in x's dtype, contiguous; the products are taken in fp32.  dweight
    comes in weight's dtype.
    Saved for backward: the tables, and with a norm x and one fp32 per head and token.
    Raises ShapeError if shapes do not fit together.
    Source: Su et al. 2021, section 3.4.2.
    """
    cos_TR, sin_TR = table
    if (
        x.dim() != 4
        or cos_TR.shape != sin_TR.shape
        or cos_TR.shape[0] != x.shape[1]
        or 2 * cos_TR.shape[1] > x.shape[3]
    ):
        shapes = f"x is {list(x.shape)}, the table {list(cos_TR.shape)} and {list(sin_TR.shape)}"
        raise ShapeError(f"rotate: {shapes}; they need [B, T, H, K] and [T, R] twice, 2R at most K.")
    if weight is None:
        if not torch.is_grad_enabled():
            return _rotate(x, cos_TR, sin_TR, interleaved, turns_back=False)
        return _Rotate.apply(x, cos_TR, sin_TR, interleaved)  # type: ignore[no-untyped-call]
    norm.check(x, weight)
    if norm.has_kernels(x):
        cos_TR, sin_TR = _as_table(table)
        if not torch.is_grad_enabled():
            return _launch_forward(x, weight, (cos_TR, sin_TR), interleaved, eps, turns_back=False)[0]
        return _NormRotate.apply(x, weight, cos_TR, sin_TR, interleaved, eps)  # type: ignore[no-untyped-call]
    return _Rotate.apply(norm.rms_norm(x, weight, eps), cos_TR, sin_TR, interleaved)  # type: ignore[no-untyped-call]
