"""Stand-in of the quantiser, to the contract that it keeps; knows no card."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowvram_kernels import e4m3
from lowvram_kernels.idle import _cover

BLOCK = 128


class Scaled(NamedTuple):
    """code: uint8 (bytes of E4M3) | int8, contiguous [N, K].  scale: fp32."""

    code: Tensor
    scale: Tensor


def _quantise(x: Tensor, rows: int) -> Scaled:
    n, k = x.shape
    padded = F.pad(x.float(), (0, -k % BLOCK, 0, -n % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, -1, BLOCK)
    absmax = blocks.abs().amax((1, 3))
    scale = torch.where(absmax.isfinite(), _cover(absmax), torch.nan)
    code = e4m3.encode(blocks / scale[:, None, :, None].nan_to_num(1.0)).view(padded.shape)[:n, :k]
    return Scaled(code.contiguous(), scale)


def quantise_rows(x: Tensor, form: str) -> Scaled:
    """Quantise 1×128 blocks."""
    assert form == "e4m3"
    return _quantise(x, 1)


def quantise_columns(x: Tensor, form: str) -> Scaled:
    """Quantise the turned matrix by rows."""
    return quantise_rows(x.T, form)


def quantise_weight(w: Tensor, form: str, transposed: bool = False) -> Scaled:
    """Quantise 128×128 blocks."""
    assert form == "e4m3"
    return _quantise(w.T if transposed else w, BLOCK)


def dequantise(scaled: Scaled, dtype: torch.dtype) -> Tensor:
    """Return [N, K]."""
    code, scale = scaled
    n, k = code.shape
    rows = 1 if scale.shape[0] == n else BLOCK
    whole = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    return (e4m3.decode(code, torch.float32) * whole).to(dtype)
