"""Says from two scores whether a model has learnt more than a table of bigrams; measures nothing."""

from __future__ import annotations

import math

# Runs of one recipe with different seeds differ by 0.6 % (docs/measured.md, "Learning"), so less means equal.
SAME_SHARE = 0.006


def is_worse_than_bigrams(bits_per_byte: float, bigram_bits_per_byte: float) -> bool:
    """Say whether a model is worse than a table of bigrams, or not clearly better."""
    return not bits_per_byte < bigram_bits_per_byte * (1 - SAME_SHARE)


def compare_with_bigrams(bits_per_byte: float, bigram_bits_per_byte: float) -> str:
    """Return a sentence that compares two scores on the same text, the second that of bigrams of the training text.

    Both are in bits per byte.
    """
    table = f"a table of bigrams ({bigram_bits_per_byte:.4f} bits per byte)"
    if not math.isfinite(bits_per_byte):
        return "The model's score is not a finite number: training has diverged, or its weights are damaged."
    ratio = bits_per_byte / bigram_bits_per_byte
    if not is_worse_than_bigrams(bits_per_byte, bigram_bits_per_byte):
        return f"The model is {1 - ratio:.1%} better than {table}: it uses more than the token before."
    if ratio <= 1 + SAME_SHARE:
        return f"The model is about as good as {table}: it hardly uses more than the token before.  Train it longer."
    worse = f"is {ratio - 1:.1%} worse than" if ratio < 2 else f"needs {ratio:.1f} times as many bits as"
    return (
        f"The model {worse} {table}: it has not learnt yet what the token before alone tells.  "
        "Train it longer, or on more text."
    )
