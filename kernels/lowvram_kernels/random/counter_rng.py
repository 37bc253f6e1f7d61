"""Counter-based random bits: a pure function of a key and an element's index, without generator state.

Source: the mixer's two multipliers are TheIronBorn's (hash-prospector, bias 0.107).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
_LOW_31 = 0x7FFFFFFF
# Elements that share one full hash: a hash for each element would move six times as many bytes.
_SHARED = 256


def mix_(value: Tensor) -> Tensor:
    """Scramble int64 values in [0, 2³²) in place, one to one.  Both multipliers are below 2³¹: no overflow."""
    value.bitwise_xor_(value >> 16).mul_(0x21F0AAAD).bitwise_and_(LOW_32)
    value.bitwise_xor_(value >> 15).mul_(0x735A2D97).bitwise_and_(LOW_32)
    return value.bitwise_xor_(value >> 15)


def chain(start: Tensor, *words: Tensor | int) -> Tensor:
    """Fold 64-bit words into one 32-bit hash of start's shape, low half then high half of each word."""
    value = mix_(start & LOW_32)
    for word in words:
        value = mix_(value ^ (word & LOW_32))
        value = mix_((value + 0x9E3779B9 & LOW_32) ^ (word >> 32 & LOW_32))
    return value


@functools.cache
def chain_numbers(*words: int) -> int:
    """Return what `chain` folds the host's own numbers into, behind a zero: in [−2³¹, 2³¹), as kernels take it."""
    value = 0  # which the mixer leaves as it is
    for word in words:
        value = _mix_number(value ^ (word & LOW_32))
        value = _mix_number((value + 0x9E3779B9 & LOW_32) ^ (word >> 32 & LOW_32))
    return value - 2**32 if value >= 2**31 else value


def _mix_number(value: int) -> int:
    value = (value ^ value >> 16) * 0x21F0AAAD & LOW_32
    value = (value ^ value >> 15) * 0x735A2D97 & LOW_32
    return value ^ value >> 15


class Noise(NamedTuple):
    """The key of a tensor's random bits: 256 elements share a full hash, which each mixes with its own lane.

    key: int64 scalar, a hash.  lane_K: int32 [256], the same always.
    """

    key: Tensor
    lane_K: Tensor


def name_noise(key: Tensor) -> Noise:
    """Prepare the noise of a key, once for all ranges that are drawn."""
    lane_K = torch.arange(_SHARED, device=key.device)
    return Noise(key, (chain(torch.zeros_like(lane_K), lane_K) & _LOW_31).int())


def draw_bits(noise: Noise, first: int, count: int) -> Tensor:
    """Return 16 bits for each of the elements first … first + count − 1: int32 [count].

    An element's bits depend on its index alone, whatever range is drawn.  Products are of 16 by 15 bits, so that
    none overflows.
    """
    start, end = first // _SHARED, -(-(first + count) // _SHARED)
    block_B = torch.arange(start, end, device=noise.key.device)
    x_BK = (chain(noise.key.expand(end - start), block_B) & _LOW_31).int()[:, None] ^ noise.lane_K
    for low, high in ((27_789, 48_271), (31_847, 52_711)):
        high_BK = x_BK >> 16
        x_BK.bitwise_and_(0xFFFF).mul_(low).bitwise_xor_(high_BK.mul_(high))
        del high_BK
    x_BK.bitwise_xor_(x_BK >> 13).bitwise_and_(0xFFFF)
    return x_BK.view(-1)[first - start * _SHARED :][:count]
