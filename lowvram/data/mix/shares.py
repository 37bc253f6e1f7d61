"""From the sizes of sources to their shares of what a run reads; knows no text and no file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from lowvram.config.mix import BLOCK
from lowvram.data.holdout import show_share
from lowvram.data.mix.sources import match, refuse_many
from lowvram.errors import DataError, argument

# The loader keeps shares in whole samples of a block.
LEAST_SHARE = 1 / BLOCK
_DIGITS = 6


class Wish(NamedTuple):
    """How much of a run one source, or several together, are to be.

    factor: times as much as it would be without; share: of the whole, in place of a factor.
    """

    factor: float = 1.0
    share: float | None = None


class Shares(NamedTuple):
    """by_name: the share of each source, which add up to 1.  raised: those that would be below LEAST_SHARE."""

    by_name: dict[str, float]
    raised: list[str]


def find_shares(tokens: Mapping[str, int], temperature: float, wishes: Mapping[str, Wish]) -> Shares:
    """Return each source's share: proportional to tokens ** temperature, times its factors, beside fixed shares.

    tokens: of each source's training text.  wishes: by the name of a source, or of all whose names begin so.
    Source: Conneau et al. 2020, Unsupervised Cross-lingual Representation Learning at Scale, where the exponent is
    called alpha and 0.3.  Raises DataError for unknown names and for fixed shares that cannot be.
    """
    names = list(tokens)
    refuse_many(len(names))
    weights = {name: float(count) ** temperature for name, count in tokens.items()}
    fixed: dict[str, list[str]] = {}
    for wished, wish in wishes.items():
        members = match(wished, names, argument("weights", wished))
        if wish.share is not None:
            fixed[wished] = members
        for member in members:
            weights[member] *= wish.factor
    _refuse_twice(fixed)
    groups = [(members, wishes[name].share or 0.0) for name, members in fixed.items()]
    rest = [name for name in names if not any(name in members for members, _ in groups)]
    left = 1.0 - math.fsum(share for _, share in groups)
    _refuse_impossible(rest, left)
    shares: dict[str, float] = {}
    for members, share in [*groups, (rest, left)]:
        total = math.fsum(weights[member] for member in members)
        shares |= {member: share * weights[member] / total for member in members}
    return _raise_least({name: shares[name] for name in names})


def _refuse_twice(fixed: Mapping[str, list[str]]) -> None:
    wished_by: dict[str, str] = {}
    for name, members in fixed.items():
        for member in members:
            if member in wished_by:
                what = f"{member} has two shares: that of {wished_by[member]} and that of {name}."
                raise DataError(what, "It cannot have both.", "Leave one of them out, or write it as a factor.")
            wished_by[member] = name


def _refuse_impossible(rest: list[str], left: float) -> None:
    whole = f"The shares that are given add up to {show_share(1 - left)} of the whole"
    if rest and left < LEAST_SHARE:
        raise DataError(f"{whole}.", f"Nothing is left for {', '.join(rest[:5])}.", "Give smaller shares.")
    if not rest and abs(left) > 1e-9:
        raise DataError(f"{whole}.", "No source is left for the rest.", "Let one of them without a share.")


def _raise_least(shares: dict[str, float]) -> Shares:
    """Raise shares below LEAST_SHARE to it, at the cost of the others in proportion."""
    raised: list[str] = []
    while small := [name for name, share in shares.items() if share < LEAST_SHARE and name not in raised]:
        raised += small
        left = 1.0 - LEAST_SHARE * len(raised)
        others = math.fsum(share for name, share in shares.items() if name not in raised)
        shares = {name: LEAST_SHARE if name in raised else share / others * left for name, share in shares.items()}
    return Shares({name: round(share, _DIGITS) for name, share in shares.items()}, sorted(raised))
