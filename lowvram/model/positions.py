"""Position encodings: rotary tables with YaRN, and ALiBi as extra columns; knows nothing of attention.

Legend: B batch, T queries, S keys, H heads, G key/value heads, K width of a head, R half the rotated width.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram.config.architecture import Rope, Yarn
from lowvram.model.fp32_buffers import Fp32Buffers

# Columns that carry the penalty: two pieces of the slope times two pieces of the position.
ALIBI_COLUMNS = 4
# Fused attention kernels take head widths that are multiples of this.
WIDTH_STEP = 8


class RotaryTable(Fp32Buffers):
    """Computes the cosines and sines of the requested positions, always in fp32."""

    frequency_R: Tensor

    def __init__(self, config: Rope, rope_dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("frequency_R", frequencies(config, rope_dim).to(device or "cpu"), persistent=False)

    def forward(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each [count, rope_dim / 2] fp32, of positions start … start + count − 1."""
        position_T = torch.arange(start, start + count, device=self.frequency_R.device, dtype=torch.float32)
        angle_TR = position_T[:, None] * self.frequency_R
        return angle_TR.cos(), angle_TR.sin()


def frequencies(config: Rope, rope_dim: int) -> Tensor:
    """Return the angle per position of each of the rope_dim / 2 pairs, [R] fp32.

    Source: Su et al. 2021, section 3.2.2; with YaRN, Peng et al. 2023, eqs. 18-23.
    """
    pair_R = torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim
    plain_R = 1.0 / config.theta**pair_R
    if config.yarn is None:
        return plain_R
    keep_R = 1.0 - _interpolation_ramp(config.yarn, config.theta, rope_dim)
    return plain_R / config.yarn.factor * (1.0 - keep_R) + plain_R * keep_R


def _interpolation_ramp(yarn: Yarn, theta: float, rope_dim: int) -> Tensor:
    def pair_with(rotations: float) -> float:
        return rope_dim * math.log(yarn.original_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), rope_dim - 1)
    ramp_R = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return ramp_R.clamp(0, 1)


class _Rotate(torch.autograd.Function):
    """Rotates the last 2R values of each head by the table's angles; saves only the tables for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        ctx.interleaved = interleaved
        return _rotate_pairs(x, cos_TR, sin_TR, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TR, sin_TR = ctx.saved_tensors
        return _rotate_pairs(gradients[0], cos_TR, -sin_TR, ctx.interleaved), None, None, None


def _rotate_pairs(x_BTHK: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool) -> Tensor:
    pairs = cos_TR.shape[-1]
    y_BTHK = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    unrotated = x_BTHK.shape[-1] - 2 * pairs
    if unrotated:
        y_BTHK[..., :unrotated] = x_BTHK[..., :unrotated]
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


def rotate(x_BTHK: Tensor, table: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate the last 2R values of each head by the angles of its position; the values before them are unchanged.

    x: [B, T, H, K].  table: cosines and sines, each [T, R] fp32.  Pairs are neighbours where `interleaved` (as in
    DeepSeek-V3), else (i, i + R) (as in Llama).  The products are taken in fp32.  Saved for backward: the tables.
    """
    return _Rotate.apply(x_BTHK, *table, interleaved)  # type: ignore[no-untyped-call]  # untyped in torch


def slopes(heads: int) -> Tensor:
    """Return ALiBi's slope of every head, [H] fp32.

    If the count is a power of two, the slopes are 2^(−8i/n).  Any other count has the slopes of the next lower power,
    then every second slope of the next higher one.
    Source: Press et al. 2022, section 3 and its published recipe for other head counts.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(first + between, dtype=torch.float32)


def add_alibi_columns(q_BHTK: Tensor, k_BGSK: Tensor, slope_H: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Widen queries and keys so that plain causal attention subtracts slope · distance from its scores.

    softmax ignores what is equal for all keys of a query, so it is enough to add slope · key position.  In bf16 neither
    factor is exact; each is split in two (slope, and position as 256 · high + low) so that the four products are exact.
    Positions are centred in fp32 to keep the sums small.  Columns of zeros make the width a multiple of 8.
    Returns [B, H, T, K + 8] and [B, G, S, K + 8] (more where K is no multiple of 8).
    """
    keys, width = k_BGSK.shape[2], k_BGSK.shape[3]
    slope_H1 = (slope_H / scale)[:, None]
    coarse_H1 = slope_H1.to(q_BHTK.dtype)
    fine_H1 = (slope_H1 - coarse_H1.float()).to(q_BHTK.dtype)
    position_S1 = torch.arange(keys, device=k_BGSK.device, dtype=torch.float32)[:, None] - keys // 2
    high_S1 = (position_S1 / 256).floor() * 256
    padding = -(width + ALIBI_COLUMNS) % WIDTH_STEP
    q_extra_HC = torch.cat([coarse_H1, coarse_H1, fine_H1, fine_H1], dim=1)
    k_extra_SC = torch.cat([high_S1, position_S1 - high_S1] * 2, dim=1).to(k_BGSK.dtype)
    q_extra = torch.nn.functional.pad(q_extra_HC, (0, padding))[None, :, None]
    k_extra = torch.nn.functional.pad(k_extra_SC, (0, padding))
    return (
        torch.cat([q_BHTK, q_extra.expand(*q_BHTK.shape[:3], -1)], dim=-1),
        torch.cat([k_BGSK, k_extra.expand(*k_BGSK.shape[:2], -1, -1)], dim=-1),
    )


class Turn(NamedTuple):
    """The rotation of one token of each of N sequences: [N, 1, 2R] fp32, and the index of each value's pair, [2R]."""

    cos_N1K: Tensor
    sin_N1K: Tensor
    partner_K: Tensor


def turn_at(table: RotaryTable, position_N: Tensor, interleaved: bool) -> Turn:
    """Return the rotation of one token at each position.  position: [N] integers.  interleaved: see `rotate`."""
    angle_NR = position_N[:, None].float() * table.frequency_R
    cos_NR, sin_NR = angle_NR.cos(), angle_NR.sin()
    order_K, pairs = torch.arange(2 * cos_NR.shape[1], device=position_N.device), cos_NR.shape[1]
    if interleaved:
        cos, sin = cos_NR.repeat_interleave(2, -1), torch.stack([-sin_NR, sin_NR], -1).flatten(-2)
        return Turn(cos[:, None], sin[:, None], order_K ^ 1)
    cos, sin = torch.cat([cos_NR, cos_NR], -1), torch.cat([-sin_NR, sin_NR], -1)
    return Turn(cos[:, None], sin[:, None], order_K.roll(pairs))


def rotate_one(x_NHK: Tensor, turn: Turn) -> Tensor:
    """Rotate all values of each head as `rotate` does, for one token of each sequence.  x: [N, H, 2R]."""
    x = x_NHK.float()
    return torch.addcmul(x * turn.cos_N1K, x.index_select(-1, turn.partner_K), turn.sin_N1K).to(x_NHK.dtype)
