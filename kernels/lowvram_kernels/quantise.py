"""Stand-in for the quantisation of tensors, to the contract that others code against; knows no kernels.

e4m3    x ≈ code · scale     scale = 2^⌈log₂(absmax / 448)⌉ of each block of 1×128 or 128×128
int8    x ≈ code · scale     scale = absmax / 127 of each row
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels import e4m3
from lowvram_kernels.idle import _cover

FORMATS = ("e4m3", "int8")
BLOCK = 128


class Scaled(NamedTuple):
    """code: uint8 (bytes of E4M3) | int8, [N, K].  scale: fp32."""

    code: Tensor
    scale: Tensor


def _blocks(x: Tensor, rows: int, fp32_scales: bool) -> Scaled:
    padded = F.pad(x.float(), (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % rows))
    block = padded.view(padded.shape[0] // rows, rows, -1, BLOCK)
    absmax = block.abs().amax((1, 3))
    scale = absmax / e4m3.MAX if fp32_scales else _cover(absmax)
    scale = torch.where(absmax.isfinite(), scale.clamp_min(2.0**-126), torch.nan)
    code = e4m3.encode(block / scale[:, None, :, None]).view_as(padded)[: x.shape[0], : x.shape[1]]
    return Scaled(code.contiguous(), scale)


def quantise_rows(x: Tensor, form: str, fp32_scales: bool = False) -> Scaled:
    """Quantise x [N, K], to be summed over K: scales of 1×128 or of a row."""
    if form == "e4m3":
        return _blocks(x, 1, fp32_scales)
    absmax = x.float().abs().amax(1, keepdim=True)
    scale = (absmax * (1.0 / 127.0)).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    return Scaled((x.float() / scale).nan_to_num().round().to(torch.int8), scale)


def quantise_columns(x: Tensor, form: str, fp32_scales: bool = False) -> Scaled:
    """Quantise x [N, K], to be summed over N: the code is [K, N]."""
    return quantise_rows(x.mT.contiguous(), form, fp32_scales)


def quantise_weight(w: Tensor, form: str, transposed: bool = False, fp32_scales: bool = False) -> Scaled:
    """Quantise w [O, I]: scales of 128×128 or of a row; transposed: the code is [I, O]."""
    w = w.mT.contiguous() if transposed else w
    return quantise_rows(w, form) if form == "int8" else _blocks(w, BLOCK, fp32_scales)


def dequantise(scaled: Scaled, dtype: torch.dtype) -> Tensor:
    """Return [N, K] in dtype."""
    code, scale = scaled
    if code.dtype == torch.int8:
        return (code.float() * scale).to(dtype)
    rows = code.shape[0]
    wide = code.view(torch.int8).int().bitwise_left_shift_(20).bitwise_and_(~0x78000000).view(torch.float32)
    value = torch.where(((code & 0x7F) == 0x7F), torch.nan, wide.mul_(2.0**120))
    if scale.shape[0] != rows:
        scale = scale.repeat_interleave(BLOCK, 0)[:rows]
    return (value * scale.repeat_interleave(BLOCK, 1)[:, : code.shape[1]]).to(dtype)
