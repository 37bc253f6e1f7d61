"""Differences between recipes: intervals against formulas, and no winner within them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lowvram.evaluate.comparison import Paid, bootstrap, compare, describe_difference, warn_of_few_seeds

DOCUMENTS = 400


def costs(*shifts: float, spread: float = 0.0) -> np.ndarray:
    """Nats of runs on documents that differ a lot, each run shifted by so many nats a document, plus noise."""
    drawn = np.random.default_rng(7)
    base_N = drawn.uniform(50, 500, DOCUMENTS)
    return np.stack([base_N + shift + drawn.normal(0, spread, DOCUMENTS) for shift in shifts])


BYTES = np.full(DOCUMENTS, 100)


def test_the_interval_is_that_of_a_paired_mean() -> None:
    one, other = costs(0.0), costs(0.0, spread=8.0) + 1.0
    difference_N = (other - one)[0] / 100 / math.log(2)
    error = difference_N.std() / math.sqrt(DOCUMENTS)
    found = bootstrap(one, other, BYTES)
    assert found.low == pytest.approx(difference_N.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(difference_N.mean() + 1.96 * error, abs=0.15 * error)
    assert found == bootstrap(one, other, BYTES), "the same every time"


def test_a_shift_of_all_documents_is_certain_however_much_they_differ() -> None:
    found = bootstrap(costs(0.0), costs(0.0) + 1.0, BYTES)
    assert found == pytest.approx((0.01 / math.log(2),) * 2)


def test_seeds_that_differ_widen_the_interval() -> None:
    one = costs(0.0, 0.0, 0.0)
    alone, several = bootstrap(one[:1], costs(2.0), BYTES), bootstrap(one, costs(-8.0, 2.0, 12.0), BYTES)
    assert not alone.contains(0.0)
    assert several.contains(0.0)


def test_no_winner_is_named_within_the_interval() -> None:
    runs = [(Path("a"),), (Path("b"),), (Path("c"),)]
    noisy = costs(0.0) + np.random.default_rng(1).normal(0, 5, (1, DOCUMENTS))
    found = compare([Paid(run, nats) for run, nats in zip(runs, (costs(9.0), costs(0.0), noisy), strict=True)], BYTES)
    names = [recipe.runs[0].name for recipe in found.recipes]
    assert names[2] == "a"
    assert [difference.is_certain for difference in found.differences] == [False, True]
    close, far = (describe_difference(each, (names[0], each.other.runs[0].name)) for each in found.differences)
    assert close.startswith(f"No winner between {names[0]} and {names[1]}: the 95 % interval")
    assert far.startswith(f"a pays {found.differences[1].bits_per_byte:.4f} bits per byte more than {names[0]}")
    assert found.recipes[0].bits_per_byte == pytest.approx(min(costs(0.0).sum(), noisy.sum()) / 40_000 / math.log(2))


def test_fewer_than_three_seeds_are_told() -> None:
    def of(count: int) -> Paid:
        return Paid(tuple(Path(f"{count}/{seed}") for seed in range(count)), costs(*[float(count)] * count))

    assert warn_of_few_seeds(compare([of(3), of(4)], BYTES)) is None
    told = warn_of_few_seeds(compare([of(3), of(2)], BYTES))
    assert told is not None
    assert told.startswith("Fewer than 3 seeds")
