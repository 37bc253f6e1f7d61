"""Numbers that look random and are a pure function of names; knows the mixer, not what its bits decide.

Source: the mixer's two multipliers are TheIronBorn's (hash-prospector, bias 0.107).
"""

from __future__ import annotations

from torch import Tensor

LOW_32 = 0xFFFFFFFF


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
