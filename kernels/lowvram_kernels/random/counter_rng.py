"""Counter-based random bits: a pure function of a key and an element's index, without generator state.

Source: the mixer's two multipliers are TheIronBorn's (hash-prospector, bias 0.107).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
_LOW_31 = 0x7FFFFFFF
# Elements that share one full hash: a hash for each element would move six times as many bytes.
_SHARED = 256
# Blocks whose hashes are made at once, at most: some 100 KiB.
_MOST_AHEAD = 2**12


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


class Noise:
    """The key of a tensor's random bits: 256 elements share a full hash, which each mixes with its own lane.

    key: int64 scalar, a hash.  lane_K: int32 [256], the same always.  ahead: for how many blocks hashes are made at
    once.  Made for each chunk of an optimizer's step, their many small ops take a fifth of its time on a processor.
    """

    def __init__(self, key: Tensor, lane_K: Tensor, ahead: int) -> None:
        self.key, self.lane_K, self._ahead = key, lane_K, ahead
        self._first, self._hash_B = 0, lane_K[:0]

    def hashes(self, start: int, end: int) -> Tensor:
        """Return the hashes of the blocks from start to end: int32 [end − start], 31 bits."""
        if not self._first <= start <= end <= self._first + self._hash_B.shape[0]:
            block_B = torch.arange(start, max(end, start + self._ahead), device=self.key.device)
            hash_B = chain(self.key.expand(block_B.shape[0]), block_B)
            self._first, self._hash_B = start, (hash_B & _LOW_31).int()
        return self._hash_B[start - self._first : end - self._first]


def name_noise(key: Tensor, count: int = 0) -> Noise:
    """Prepare the noise of a key, once for all ranges that are drawn.  count: of the elements, where it is known."""
    lane_K = torch.arange(_SHARED, device=key.device)
    ahead = min(_MOST_AHEAD, -(-count // _SHARED))
    return Noise(key, (chain(torch.zeros_like(lane_K), lane_K) & _LOW_31).int(), ahead)


def draw_bits(noise: Noise, first: int, count: int) -> Tensor:
    """Return 16 bits for each of the elements first … first + count − 1: int32 [count].

    An element's bits depend on its index alone, whatever range is drawn.  Products are of 16 by 15 bits, so that
    none overflows.
    """
    start, end = first // _SHARED, -(-(first + count) // _SHARED)
    x_BK = noise.hashes(start, end)[:, None] ^ noise.lane_K
    high_BK = torch.empty_like(x_BK)
    for low, high in ((27_789, 48_271), (31_847, 52_711)):
        torch.bitwise_right_shift(x_BK, 16, out=high_BK)
        x_BK.bitwise_and_(0xFFFF).mul_(low).bitwise_xor_(high_BK.mul_(high))
    x_BK.bitwise_xor_(torch.bitwise_right_shift(x_BK, 13, out=high_BK)).bitwise_and_(0xFFFF)
    return x_BK.view(-1)[first - start * _SHARED :][:count]
