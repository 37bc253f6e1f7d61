"""Scrambles 64-bit numbers; knows no seed and no text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The step of SplitMix64 from one number of its sequence to the next.
STEP = np.uint64(0x9E3779B97F4A7C15)


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return numbers whose bits all depend on all bits of the given ones, of the same shape; each has one of its own.

    Source: the finaliser of SplitMix64, Steele, Lea & Flood 2014; uint64 wraps around as it must.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return scrambled
