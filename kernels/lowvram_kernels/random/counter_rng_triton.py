"""Random bits inside Triton kernels: those of `counter_rng.py`, in 32 bits that wrap; knows no memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(value):
    """Scramble uint32 numbers, one to one."""
    value = (value ^ (value >> 16)) * 0x21F0AAAD
    value = (value ^ (value >> 15)) * 0x735A2D97
    return value ^ (value >> 15)


@triton.jit
def fold(value, low, high):
    """Fold a word's two halves, uint32, into a hash, as `keyed.chain` does behind its first number."""
    return mix((mix(value ^ low) + 0x9E3779B9) ^ high)


@triton.jit
def fold_word(value, word):
    """Fold an int64 word into a hash."""
    return fold(value, word.to(tl.uint32), (word >> 32).to(tl.uint32))


@triton.jit
def draw_bits(key, first, ROWS: tl.constexpr):
    """Return 16 bits, uint32 [ROWS, 256], for each of the elements from number `first` (int64) on.

    key: uint32.  256 elements share a full hash: where `first` cuts such a block, a row has a part of two of them.
    """
    place = tl.arange(0, 256) + (first & 0xFF).to(tl.int32)
    lane = fold(tl.zeros((256,), tl.uint32), (place & 0xFF).to(tl.uint32), tl.zeros((256,), tl.uint32)) & 0x7FFFFFFF
    block = tl.arange(0, ROWS) + (first >> 8)
    start = mix(key) + tl.zeros((ROWS,), tl.uint32)
    here, after = fold_word(start, block) & 0x7FFFFFFF, fold_word(start, block + 1) & 0x7FFFFFFF
    x = tl.where((place < 256)[None, :], here[:, None], after[:, None]) ^ lane[None, :]
    x = ((x & 0xFFFF) * 27_789) ^ ((x >> 16) * 48_271)
    x = ((x & 0xFFFF) * 31_847) ^ ((x >> 16) * 52_711)
    return (x ^ (x >> 13)) & 0xFFFF
