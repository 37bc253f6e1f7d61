"""Root-mean-square normalisation.

    y = x / sqrt(mean(x²) + eps) · weight

With r = 1/sqrt(mean(x²) + eps) and c = Σ_d dy·weight·x:
    dx = r·dy·weight − x·r³·c/D        dweight = Σ_rows dy·x·r

Saved for backward: x and r, one fp32 per row (the weight is the caller's own parameter).
Source: Zhang & Sennrich 2019, eq. 4; the gradient is its derivative.

On a card a row is held whole by one program, mostly by one warp.  Bytes moved: x and y once, and 4 a row; backward x,
dy and dx once, 4 a row, and 4·D for each program's part of dweight, which one more launch adds up.  Nothing else is
allocated.  On a processor rows go through in parts whose fp32 copies stay in its cache (`row_parts.py`).  In compiled
blocks torch.compile fuses the plain form with its neighbours.

Shapes: N rows, D width, P programs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram_kernels.dispatch import Launch, Tile, as_read, card_of, launch, runs_kernels
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.row_parts import row_parts, works_in_parts
from lowvram_kernels.matmul.fp32_sums import leaves_of, sum_of
from lowvram_kernels.remembered import remembered

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Numbers of a row that one warp holds: as many as leave registers for all that is done with them, fewer where several
# warps share a row.  Backward holds a row of x, of dy, the weight, and the sums for dweight.
_FORWARD_WIDTH, _BACKWARD_WIDTH = 1024, 512
_SHARED_WIDTH = 256
# The widest row that a program can hold.
WIDEST = 8192
# Programs of backward on each multiprocessor: enough to hide the latency of memory, few enough for little P·D.
_PROGRAMS = 8
# Of the sum of their parts: a quarter of a warp's width, so that even narrow rows occupy several multiprocessors.
_PARTS = Tile(32, 32, 32)


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute the textbook form in the arguments' own dtype; autograd of it is the gradient's truth."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def row_scales(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x²) + eps) of every row, [N, 1] fp32."""
    norm_N1 = torch.linalg.vector_norm(x.reshape(-1, x.shape[-1]).float(), dim=-1, keepdim=True)
    return torch.rsqrt(norm_N1.square_().div_(x.shape[-1]).add_(eps))


def apply_scales(x: Tensor, rstd_N1: Tensor, weight: Tensor) -> Tensor:
    """Return x · r · weight in x's shape and dtype: one fp32 temporary and one rounding at the end."""
    x_ND = x.reshape(-1, x.shape[-1])
    scaled_ND = torch.mul(x_ND, rstd_N1)  # fp32, whatever x is
    return scaled_ND.mul_(weight.float()).to(x.dtype).view(x.shape)


@remembered
def norm_tile(width: int, is_backward: bool) -> Tile:
    """Return the rows that a program takes at a time, rounded columns, and warps.  width: at most `WIDEST`."""
    columns, held = 1 << max(width - 1, 1).bit_length(), _BACKWARD_WIDTH if is_backward else _FORWARD_WIDTH
    warps = 1 if columns <= held else columns // (_SHARED_WIDTH if is_backward else 2 * _SHARED_WIDTH)
    return Tile(max(1, held // columns), columns, columns, warps=warps)


class Normed(NamedTuple):
    """y: the normalised rows.  rstd_N1: 1 / sqrt(mean(x²) + eps) of every row, fp32.  stream: what was normalised."""

    y: Tensor
    rstd_N1: Tensor
    stream: Tensor


def normalise(
    x: Tensor, weight: Tensor, eps: float, rstd_N1: Tensor | None = None, added: Tensor | None = None
) -> Normed:
    """Normalise x, or x + added, rounded to x's dtype.

    rstd_N1: the rows' scales, where they are known from an earlier call.  added: of x's shape and dtype.
    """
    if has_kernels(x):
        return _normalise_on_card(x, weight, eps, rstd_N1, added)
    if works_in_parts(x.device):
        return _normalise_in_parts(x, weight, eps, rstd_N1, added)
    stream = x if added is None else x + added
    rstd_N1 = row_scales(stream, eps) if rstd_N1 is None else rstd_N1
    return Normed(apply_scales(stream, rstd_N1, weight), rstd_N1, stream)


def _normalise_in_parts(x: Tensor, weight: Tensor, eps: float, known_N1: Tensor | None, added: Tensor | None) -> Normed:
    """Do as the plain form does, bit for bit, with fp32 copies of some rows at a time."""
    width, weight_D = x.shape[-1], weight.float()
    x_ND = x.reshape(-1, width)
    added_ND = None if added is None else added.reshape(-1, width)
    stream = x if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    stream_ND, y_ND = stream.reshape(-1, width), y.view(-1, width)
    rstd_N1 = x.new_empty(x_ND.shape[0], 1, dtype=torch.float32) if known_N1 is None else known_N1
    for rows in row_parts(x_ND.shape[0], width, x.device):
        if added_ND is not None:
            torch.add(x_ND[rows], added_ND[rows], out=stream_ND[rows])
        wide_CD = stream_ND[rows].float()
        if known_N1 is None:
            rstd_N1[rows] = row_scales(wide_CD, eps)
        y_ND[rows] = torch.mul(wide_CD, rstd_N1[rows]).mul_(weight_D)
        del wide_CD
    return Normed(y, rstd_N1, stream)


def has_kernels(x: Tensor) -> bool:
    """Say whether the Triton kernels normalise x: [..., D]."""
    return x.numel() > 0 and x.shape[-1] <= WIDEST and runs_kernels("rms_norm", x.device)


def rows_of(x: Tensor) -> Tensor:
    """Return x as [N, D] whose rows are contiguous, as kernels read it; a copy only where strides demand one."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 or x_ND.shape[1] == 1 else x_ND.contiguous()


def _normalise_on_card(x: Tensor, weight: Tensor, eps: float, known_N1: Tensor | None, added: Tensor | None) -> Normed:
    x_ND, (count, width) = rows_of(x), (x.numel() // x.shape[-1], x.shape[-1])
    added_ND = None if added is None else rows_of(added)
    stream = None if added is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd_N1 = x.new_empty(count, 1, dtype=torch.float32) if known_N1 is None else known_N1
    tile = norm_tile(width, is_backward=False)
    sums = [None if part is None else as_read(part) for part in (added_ND, stream)]
    tensors = (as_read(x_ND), sums[0], as_read(weight.contiguous()), rstd_N1, sums[1], as_read(y))
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "KNOWS_RSTD": known_N1 is not None}
    strides = (x_ND.stride(0), 0 if added_ND is None else added_ND.stride(0))
    arguments = (*tensors, count, width, *strides, eps)
    grid = (-(-count // tile.rows),)
    what = Launch("layers.rms_norm_triton", "rms_norm_kernel", grid, arguments, constants, tile.warps)
    launch(what, moved=(x, added, weight, rstd_N1, stream, y))
    return Normed(y, rstd_N1, x if stream is None else stream)


def sum_parts(part_PD: Tensor, weight: Tensor) -> Tensor | None:
    """Return the weight's gradient, the sum of its parts; None where it has been added to `.grad` (`fp32_sums.py`)."""
    total = sum_of(weight)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format) if total is None else total
    tile = _PARTS
    constants = {"ADDS": total is not None, "ROWS": tile.rows, "COLUMNS": tile.columns}
    grid = (-(-part_PD.shape[1] // tile.columns),)
    arguments = (part_PD, as_read(result), *part_PD.shape)
    what = Launch("layers.rms_norm_triton", "sum_parts_kernel", grid, arguments, constants, tile.warps)
    launch(what, moved=(part_PD, result, total))
    return result if total is None else None


def shares(count: int, tile: Tile, device: torch.device) -> tuple[int, int]:
    """Return the programs of a backward pass over so many rows, and the rows of each."""
    programs = min(-(-count // tile.rows), card_of(device).multiprocessors * _PROGRAMS)
    share = -(-count // (programs * tile.rows)) * tile.rows
    return -(-count // share), share


def gradients_on_card(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd_N1: Tensor,
    needs: tuple[bool, bool],
    d_stream: Tensor | None,
    normed: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what `gradients` does, where `has_kernels`; normed [N, D]: what forward returned is written there again.

    normed may be dy itself, contiguous, which is then lost.
    """
    d_stream_ND = rows_of(d_stream) if d_stream is not None and needs[0] else None
    x_ND, dy_ND, (count, width) = rows_of(x), rows_of(dy), (rstd_N1.shape[0], x.shape[-1])
    tile = norm_tile(width, is_backward=True)
    programs, share = shares(count, tile, x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    partial_PD = x.new_empty(programs, width, dtype=torch.float32) if needs[1] else None
    beside = [None if part is None else as_read(part) for part in (d_stream_ND, dx, normed)]
    tensors = (as_read(dy_ND), as_read(x_ND), as_read(weight.contiguous()), rstd_N1, *beside, partial_PD)
    strides = (dy_ND.stride(0), x_ND.stride(0), 0 if d_stream_ND is None else d_stream_ND.stride(0))
    arguments = (*tensors, count, width, *strides, share)
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    what = Launch("layers.rms_norm_triton", "rms_norm_backward_kernel", (programs,), arguments, constants, tile.warps)
    launch(what, moved=(dy, x, weight, rstd_N1, d_stream_ND, dx, normed, partial_PD))
    return dx, None if partial_PD is None else sum_parts(partial_PD, weight)


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, rstd_N1: Tensor, needs: tuple[bool, bool], d_stream: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and dweight in their arguments' dtypes; None is what `needs` denies, or is in `.grad` already.

    d_stream: the gradient of x from where it goes on beside the norm, which is added to dx.
    """
    if has_kernels(x) and any(needs):
        return gradients_on_card(dy, x, weight, rstd_N1, needs, d_stream)
    if works_in_parts(x.device):
        return _gradients_in_parts(dy, x, weight, rstd_N1, needs, d_stream)
    x_ND = x.reshape(-1, x.shape[-1]).float()
    dy_ND = dy.reshape(-1, x.shape[-1]).float()
    weight_D = weight.float()
    buffer_ND = dy_ND * x_ND
    # Both sums are matrix-vector products: no further pass over [N, D].
    dweight = (rstd_N1[:, 0] @ buffer_ND).to(weight.dtype) if needs[1] else None
    if not needs[0]:
        return None, dweight
    slope_N1 = (buffer_ND @ weight_D).div_(x.shape[-1])[:, None] * rstd_N1 * rstd_N1 * rstd_N1
    torch.mul(dy_ND, weight_D, out=buffer_ND).mul_(rstd_N1).addcmul_(x_ND, slope_N1, value=-1.0)
    dx = buffer_ND.to(x.dtype).view(x.shape)
    return dx if d_stream is None else dx.add_(d_stream), dweight


def _gradients_in_parts(
    dy: Tensor, x: Tensor, weight: Tensor, rstd_N1: Tensor, needs: tuple[bool, bool], d_stream: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Do as the plain form does, with fp32 copies of some rows at a time; the stream's gradient is added in fp32."""
    width, weight_D = x.shape[-1], weight.float()
    x_ND, dy_ND = x.reshape(-1, width), dy.reshape(-1, width)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dx_ND = None if dx is None else dx.view(-1, width)
    d_stream_ND = None if d_stream is None else d_stream.reshape(-1, width)
    dweight_D = torch.zeros_like(weight_D) if needs[1] else None
    for rows in row_parts(x_ND.shape[0], width, x.device):
        wide_CD, dy_CD, rstd_C1 = x_ND[rows].float(), dy_ND[rows].float(), rstd_N1[rows]
        buffer_CD = dy_CD * wide_CD
        if dweight_D is not None:
            dweight_D += rstd_C1[:, 0] @ buffer_CD
        if dx_ND is not None:
            slope_C1 = (buffer_CD @ weight_D).div_(width)[:, None] * rstd_C1 * rstd_C1 * rstd_C1
            torch.mul(dy_CD, weight_D, out=buffer_CD).mul_(rstd_C1).addcmul_(wide_CD, slope_C1, value=-1.0)
            del slope_C1
            dx_ND[rows] = buffer_CD if d_stream_ND is None else buffer_CD.add_(d_stream_ND[rows])
        del wide_CD, dy_CD, buffer_CD
    return dx, None if dweight_D is None else dweight_D.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd_N1, _ = normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd_N1)
        ctx.leaves = leaves_of(weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd_N1 = ctx.saved_tensors
        if ctx.leaves is not None:
            (weight,) = ctx.leaves
        return *gradients(dy, x, weight, rstd_N1, ctx.needs_input_grad[:2]), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd_N1, stream = normalise(x, weight, eps, added=added)
        ctx.save_for_backward(stream, weight, rstd_N1)
        ctx.leaves = leaves_of(weight)
        ctx.set_materialize_grads(False)
        return stream, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return d_stream, d_stream, None, None
        stream, weight, rstd_N1 = ctx.saved_tensors
        if ctx.leaves is not None:
            (weight,) = ctx.leaves
        needs_x, needs_added, needs_weight, _ = ctx.needs_input_grad
        dx, dweight = gradients(dy, stream, weight, rstd_N1, (needs_x or needs_added, needs_weight), d_stream)
        return dx if needs_x else None, dx if needs_added else None, dweight, None


def check(x: Tensor, weight: Tensor) -> None:
    """Raise ShapeError if weight is not [D], or a dtype is none of the three."""
    if x.dim() < 1 or weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ShapeError(f"rms_norm: weight is {list(weight.shape)}; x {list(x.shape)} needs [D].")
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ShapeError(f"rms_norm: x is {x.dtype}, weight {weight.dtype}; give fp32, bf16 or fp16.")


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each row of x to unit root-mean-square, then by weight.

    x: [..., D] fp32|bf16|fp16.  weight: [D], any of these dtypes (an fp32 master beside bf16 x is normal).
    Returns x's shape and dtype; the mean is taken in fp32.  dweight comes in weight's dtype.
    Saved for backward: x and one fp32 per row.
    Raises ShapeError if weight is not [D], or a dtype is none of the three.
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    check(x, weight)
    return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return the stream x + added, and rms_norm of it: on a card in one pass.

    x, added: [..., D] of one dtype, fp32|bf16|fp16.  weight: [D].  Returns x's shape and dtype, twice.
    Saved for backward: the stream and one fp32 per row.
    Raises ShapeError as rms_norm does, or if added is not like x.
    """
    check(x, weight)
    check_added(x, added)
    return _AddRMSNorm.apply(x, added, weight, eps)  # type: ignore[no-untyped-call]


def check_added(x: Tensor, added: Tensor) -> None:
    """Raise ShapeError if added is not of x's shape and dtype."""
    if added.shape != x.shape or added.dtype != x.dtype:
        shapes = f"x is {list(x.shape)} {x.dtype}, added {list(added.shape)} {added.dtype}"
        raise ShapeError(f"rms_norm: {shapes}; both need one shape and dtype.")
