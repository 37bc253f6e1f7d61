"""Says what scores mean: better than a table of bigrams or not, and how certain; measures nothing."""

from __future__ import annotations

import math

from lowvram.units import count_of

# Runs of one recipe with different seeds differ by 0.6 % (docs/measured.md, "Learning"), so less means equal.
SAME_SHARE = 0.006
# Of held-out text: `warn_of_few_tokens` says why.
FEW_TOKENS = 10_000
_SPREAD = 2.3


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
        return f"The model is about as good as {table}: it hardly uses more than the token before. Train it longer."
    worse = f"is {ratio - 1:.1%} worse than" if ratio < 2 else f"needs {ratio:.1f} times as many bits as"
    return (
        f"The model {worse} {table}: it has not learnt yet what the token before alone tells. "
        "Train it longer, or on more text."
    )


def warn_of_few_tokens(tokens: int) -> str | None:
    """Return a sentence if held-out text is so short that its bits per byte are uncertain; None if it is long enough.

    The standard error of bits per byte, as a share of them, is about 2.3 / √tokens.  The losses of single tokens have a
    standard deviation of 1.3 times their mean, and because the tokens of one passage are hard or easy together, the
    means of windows spread 1.8 times as much as those of independent tokens (the finished model of `lowvram demo` on 40
    windows of 128 held-out tokens, in fp32 on a CPU, torch 2.13, 2026-11-30).  At FEW_TOKENS that is 2.3 %, more than
    most changes of a recipe are worth.  Two models on the same text differ with less uncertainty than that.
    """
    if tokens >= FEW_TOKENS:
        return None
    share = _SPREAD / math.sqrt(max(1, tokens))
    says = f"about ±{share:.0%}" if share < 1 else "more than the figure itself"
    return (
        f"{count_of(tokens, 'token')} of held-out text are few: bits per byte are uncertain by {says} (one standard "
        f"error). Hold out {FEW_TOKENS:,} tokens or more to compare models."
    )
