"""Whether a model has learnt more than a table of bigrams, said in a sentence from two numbers; measures nothing."""

from __future__ import annotations

import math

# Seeds of one recipe differ by 0.6 % (docs/measured.md, "Learning"): a smaller difference is none.
SAME_SHARE = 0.006


def is_worse_than_bigrams(bits_per_byte: float, bigram_bits_per_byte: float) -> bool:
    """Say whether a model has learnt less than a table of bigrams, or no more than that."""
    return not bits_per_byte < bigram_bits_per_byte * (1 - SAME_SHARE)


def compare_with_bigrams(bits_per_byte: float, bigram_bits_per_byte: float) -> str:
    """Return what two scores on the same text say: both in bits per byte, the table counted on the training text."""
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
