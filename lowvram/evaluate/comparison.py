"""Compares recipes by what their runs pay for the same documents, and says how certain the difference is.

Documents differ far more from each other than models do, so each is paired with itself: documents are drawn with
replacement, and seeds where a recipe has several, and the difference of bits per byte is taken on each draw.
Source: Efron & Tibshirani 1993, the percentile bootstrap.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowvram.evaluate.intervals import Interval
from lowvram.evaluate.verdict import SAME_SHARE

# Below so many seeds the spread between them cannot be told.
ENOUGH_SEEDS = 3
_DRAWS = 2000
_DRAWS_AT_ONCE = 100


@dataclass(frozen=True)
class Paid:
    """What the runs of one recipe pay for the same documents.

    runs: which differ in `train.seed` alone.  nats: [runs, documents].
    """

    runs: tuple[Path, ...]
    nats: np.ndarray


@dataclass(frozen=True)
class Recipe:
    """A recipe's runs and their bits per byte: of each, and the mean."""

    runs: tuple[Path, ...]
    bits_per_byte: float
    of_runs: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """How much more another recipe pays than the best one, in bits per byte, with its 95 % interval.

    seeds: of the recipe that has fewer.
    """

    best: Recipe
    other: Recipe
    bits_per_byte: float
    interval: Interval
    seeds: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out a difference of 0."""
        return not self.interval.contains(0.0)


@dataclass(frozen=True)
class Comparison:
    """Recipes, the best first, and what each other one pays more than it."""

    documents: int
    text_bytes: int
    recipes: tuple[Recipe, ...]
    differences: tuple[Difference, ...]


def compare(paid: Sequence[Paid], byte_N: np.ndarray) -> Comparison:
    """Rank recipes on the same documents.  byte_N: the UTF-8 bytes of each, [documents]."""
    unit = math.log(2) * float(byte_N.sum())
    ranked = sorted(paid, key=lambda each: float(each.nats.mean(0).sum()))
    recipes = []
    for each in ranked:
        of_runs = tuple(float(nats) for nats in each.nats.sum(1) / unit)
        recipes.append(Recipe(each.runs, math.fsum(of_runs) / len(of_runs), of_runs))
    differences = [
        Difference(
            recipes[0],
            recipe,
            recipe.bits_per_byte - recipes[0].bits_per_byte,
            bootstrap(ranked[0].nats, each.nats, byte_N),
            min(len(ranked[0].runs), len(each.runs)),
        )
        for recipe, each in zip(recipes[1:], ranked[1:], strict=True)
    ]
    return Comparison(len(byte_N), int(byte_N.sum()), tuple(recipes), tuple(differences))


def bootstrap(one_SN: np.ndarray, other_SN: np.ndarray, byte_N: np.ndarray, seed: int = 0) -> Interval:
    """Return the 95 % interval of how much more `other` pays than `one`, in bits per byte.

    one, other: nats of each run and document.  Of a recipe with several runs these are drawn with replacement too.
    """
    generator = np.random.default_rng(seed)
    count = len(byte_N)
    found = []
    for _ in range(_DRAWS // _DRAWS_AT_ONCE):
        weight_RN = generator.multinomial(count, np.full(count, 1 / count), _DRAWS_AT_ONCE)
        nats_R = _draw_runs(generator, weight_RN @ other_SN.T) - _draw_runs(generator, weight_RN @ one_SN.T)
        found.append(nats_R / (weight_RN @ byte_N) / math.log(2))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Interval(float(low), float(high))


def _draw_runs(generator: np.random.Generator, nats_RS: np.ndarray) -> np.ndarray:
    """Return of each draw the mean over as many runs, drawn with replacement."""
    runs = nats_RS.shape[1]
    drawn_RS = generator.integers(0, runs, nats_RS.shape)
    return np.take_along_axis(nats_RS, drawn_RS, 1).mean(1)


def describe_difference(found: Difference, names: tuple[str, str]) -> str:
    """Return a sentence that names a winner only where there is one.  names: of the best recipe and of the other."""
    best, other = names
    ends = f"{found.interval.low:+.4f} to {found.interval.high:+.4f}"
    if not found.is_certain:
        return (
            f"No winner between {best} and {other}: the 95 % interval of their difference, {ends} bits per byte, "
            "contains 0."
        )
    return f"{other} pays {found.bits_per_byte:.4f} bits per byte more than {best} (95 %: {ends})."


def describe_seeds(found: Recipe) -> str:
    """Return a sentence on how far the runs of one recipe lie apart; it has several."""
    low, high, mean = min(found.of_runs), max(found.of_runs), found.bits_per_byte
    deviation = statistics.stdev(found.of_runs)
    return (
        f"All runs are of one recipe: its {len(found.runs)} seeds pay from {low:.4f} to {high:.4f} bits per byte, with "
        f"a standard deviation of {deviation:.4f}, or {deviation / mean:.2%} of their mean."
    )


def warn_of_few_seeds(found: Comparison) -> str | None:
    """Return a sentence where a recipe has too few runs to tell it from its seed, else None."""
    least = min(len(recipe.runs) for recipe in found.recipes)
    if least >= ENOUGH_SEEDS or not found.differences:
        return None
    return (
        f"Fewer than {ENOUGH_SEEDS} seeds: the intervals hold for these runs and not for their recipes, since runs of "
        f"one recipe differ by about {SAME_SHARE:.1%} from seed to seed. Train each with three values of train.seed."
    )
