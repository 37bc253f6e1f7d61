"""Root-mean-square normalisation in plain PyTorch.

    y = x / sqrt(mean(x²) + eps) · weight

With r = 1/sqrt(mean(x²) + eps) and c = Σ_d dy·weight·x:
    dx = r·dy·weight − x·r³·c/D        dweight = Σ_rows dy·x·r

Saved for backward: x and r, one fp32 per row (the weight is the caller's own parameter).
Source: Zhang & Sennrich 2019, eq. 4; the gradient is its derivative.
No Triton form: compiled blocks have these passes fused by torch.compile, and on no card has another been measured to be
faster.

Shapes: N rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram_kernels.errors import ShapeError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, rstd_N1: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and dweight in their arguments' dtypes; what `needs` denies is None."""
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
    return buffer_ND.to(x.dtype).view(x.shape), dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd_N1 = row_scales(x, eps)
        ctx.save_for_backward(x, weight, rstd_N1)
        return apply_scales(x, rstd_N1, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd_N1 = ctx.saved_tensors
        return *gradients(dy, x, weight, rstd_N1, ctx.needs_input_grad[:2]), None


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
