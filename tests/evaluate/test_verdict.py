"""The sentence that says whether a model has learnt anything, at its limits and beyond."""

from __future__ import annotations

import math

import pytest

from lowvram.evaluate.verdict import SAME_SHARE, compare_with_bigrams, is_worse_than_bigrams


@pytest.mark.parametrize(
    ("bits", "is_better", "says"),
    [
        (0.02, True, "99.0% better"),
        (2.0 * (1 - 1.01 * SAME_SHARE), True, "0.6% better"),
        (2.0 * (1 - SAME_SHARE), False, "about as good as"),
        (2.0, False, "about as good as"),
        (2.0 * (1 + 0.99 * SAME_SHARE), False, "about as good as"),
        (2.0 * (1 + 1.01 * SAME_SHARE), False, "0.6% worse"),
        (200.0, False, "needs 100.0 times as many bits as"),
    ],
    ids=["a hundredth", "just better", "at the limit", "equal", "just equal", "just worse", "a hundred times"],
)
def test_a_model_is_better_equal_or_worse_than_bigrams(bits: float, is_better: bool, says: str) -> None:
    sentence = compare_with_bigrams(bits, 2.0)
    assert says in sentence
    assert "a table of bigrams (2.0000 bits per byte)" in sentence
    assert is_worse_than_bigrams(bits, 2.0) is not is_better
    assert ("Train it longer" in sentence) is not is_better


@pytest.mark.parametrize("bits", [math.nan, math.inf])
def test_a_model_that_gives_no_number_is_not_praised(bits: float) -> None:
    assert is_worse_than_bigrams(bits, 2.0)
    assert "not a finite number" in compare_with_bigrams(bits, 2.0)
