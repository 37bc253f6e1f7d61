"""The sentence that says whether a model has learnt anything, at its limits and beyond."""

from __future__ import annotations

import math

import pytest

from lowvram.evaluate.verdict import (
    FEW_TOKENS,
    SAME_SHARE,
    compare_with_bigrams,
    is_worse_than_bigrams,
    warn_of_few_tokens,
)


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


@pytest.mark.parametrize(
    "tokens, share", [(0, "more than the figure"), (4, "more than"), (100, "±23%"), (9_999, "±2%")]
)
def test_a_figure_of_few_held_out_tokens_says_how_uncertain_it_is(tokens: int, share: str) -> None:
    said = warn_of_few_tokens(tokens)
    assert said is not None
    assert said.startswith(f"{tokens:,} tokens of held-out text are few: bits per byte are uncertain by ")
    assert share in said


def test_a_figure_of_enough_held_out_tokens_needs_no_warning() -> None:
    assert warn_of_few_tokens(FEW_TOKENS) is None
    assert warn_of_few_tokens(10 * FEW_TOKENS) is None
