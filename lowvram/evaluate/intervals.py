"""How certain a share of right answers is; measures nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# Of the normal distribution 95 % lie within so many standard deviations.
_DEVIATIONS = 1.959964


class Interval(NamedTuple):
    """The ends of a 95 % confidence interval."""

    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Say whether a value lies in the interval."""
        return self.low <= value <= self.high


def wilson(right: float, count: int) -> Interval:
    """Return the interval of a share: `right` of `count`.  Source: Wilson 1927, the score interval."""
    if count == 0:
        return Interval(0.0, 1.0)
    share, square = right / count, _DEVIATIONS**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = math.sqrt(share * (1 - share) / count + square / (4 * count**2)) * _DEVIATIONS / (1 + square / count)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def of_mean(shares: Sequence[float], counts: Sequence[int]) -> Interval:
    """Return the interval of the unweighted mean of shares, each of so many independent answers.

    It follows from their own intervals, so that a share of 0 or 1 is no more certain than its answers are many.
    Source: Zou and Donner 2008, the method of variance estimates recovery (MOVER).
    """
    mean = math.fsum(shares) / len(shares)
    ends = [wilson(share * count, count) for share, count in zip(shares, counts, strict=True)]
    below = math.fsum((share - end.low) ** 2 for share, end in zip(shares, ends, strict=True))
    above = math.fsum((end.high - share) ** 2 for share, end in zip(shares, ends, strict=True))
    low, high = mean - math.sqrt(below) / len(shares), mean + math.sqrt(above) / len(shares)
    return Interval(max(0.0, low), min(1.0, high))
