"""Says which documents of a batch break the rules of length, symbols and repetition; each check is one function."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowvram.config.cleaning import LengthRule, RepetitionRule, SymbolsRule
from lowvram.data.clean.batch import DIGIT, LETTER, LINE_END, SPACE, Batch

Marks = NDArray[np.bool_]
FRAGMENT_WORDS = 5


def breaks_length(batch: Batch, rule: LengthRule) -> Marks:
    """Mark documents that are too short or too long, or whose words are too long on average."""
    words = batch.word_counts
    letters = batch.counts[LETTER] + batch.counts[DIGIT]
    return (
        (batch.lengths < rule.least_characters)
        | (batch.lengths > rule.most_characters)
        | (words < rule.least_words)
        | (letters > rule.most_word_characters * np.maximum(words, 1))
    )


def breaks_symbols(batch: Batch, rule: SymbolsRule) -> Marks:
    """Mark documents with too great a share of punctuation and symbols, or of digits."""
    digits = batch.counts[DIGIT]
    blank = batch.counts[SPACE] + batch.counts[LINE_END]
    seen = np.maximum(batch.lengths - blank, 1)
    symbols = batch.lengths - blank - batch.counts[LETTER] - digits
    return (symbols > rule.most_symbols * seen) | (digits > rule.most_digits * seen)


def breaks_repetition(batch: Batch, rule: RepetitionRule) -> Marks:
    """Mark documents that repeat characters, lines or sequences of words too often."""
    breaks: Marks = batch.sum_characters(batch.runs()) > rule.most_runs * np.maximum(batch.lengths, 1)
    is_long = batch.word_counts >= rule.least_words
    if not is_long.any():
        return breaks
    words = np.maximum(batch.word_counts, 1)
    has_words = is_long[batch.line_documents] & (batch.line_words > 0)
    # A line stands for its words, so that a line that is repeated weighs as much as it is long.
    repeated = _sum_repeats(batch.line_documents[has_words], batch.line_hashes[has_words], batch.line_words[has_words])
    breaks |= _fill(repeated, len(words)) > rule.most_lines * words
    documents, fragments = batch.sequences(FRAGMENT_WORDS)
    chosen = is_long[documents]
    found = _sum_repeats(documents[chosen], fragments[chosen], None)
    total = np.maximum(batch.word_counts - FRAGMENT_WORDS + 1, 1)
    return breaks | (_fill(found, len(words)) > rule.most_fragments * total)


def _fill(sums: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    return np.pad(sums, (0, count - len(sums)))


def _sum_repeats(
    documents: NDArray[np.int64], hashes: NDArray[np.uint64], weights: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Return for each document how many hashes it has before, or the sum of their weights."""
    # Sorting one number is much faster than sorting by two: 24 bits of the document, 40 of the hash.
    keys = (documents.astype(np.uint64) << np.uint64(40)) | (hashes >> np.uint64(24))
    if weights is None:
        keys.sort()
    else:
        order = np.argsort(keys)
        keys, weights = keys[order], weights[order][1:]
    again = keys[1:] == keys[:-1]
    owners = (keys[1:][again] >> np.uint64(40)).astype(np.int64)
    return np.bincount(owners, None if weights is None else weights[again]).astype(np.float64)
