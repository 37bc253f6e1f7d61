"""MinHash signatures of documents, by which near duplicates are found; knows no file.

A signature has the smallest hash of a document's sequences of three words under each of 126 functions.  Two documents
have the same smallest hash with a probability that is the Jaccard similarity of their sets of sequences, so that the
share of equal entries estimates it, with a standard deviation of at most 0.045.  A band is three entries; documents
with an equal band are compared: with a similarity s this happens for at least one of 42 bands with probability
1 − (1 − s³)⁴².  Source: Broder 1997; Leskovec, Rajaraman & Ullman 2020, chapter 3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowvram.data.clean.batch import Batch
from lowvram.data.splitmix import scramble

SHINGLE_WORDS = 3
BANDS, ROWS = 42, 3
FUNCTIONS = BANDS * ROWS


def sign(batch: Batch, least_words: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Return which documents have at least `least_words` words, and their signatures.

    [documents], [documents, FUNCTIONS] uint16: 16 bits that depend on all of each smallest hash.
    """
    documents, shingles = batch.sequences(SHINGLE_WORDS)
    is_long = batch.word_counts >= max(least_words, SHINGLE_WORDS)
    shingles, documents = shingles[is_long[documents]], documents[is_long[documents]]
    which = np.flatnonzero(is_long)
    signatures = np.empty((len(which), FUNCTIONS), np.uint16)
    if len(which):
        starts = np.searchsorted(documents, which)
        hashed = np.empty_like(shingles)
        for index, factor in enumerate(_FACTORS):
            np.multiply(shingles, factor, out=hashed)
            smallest = np.minimum.reduceat(hashed, starts)
            # The highest bits of a minimum are nearly always 0, so all of it is mixed into the bits that are kept.
            signatures[:, index] = (scramble(smallest) >> np.uint64(48)).astype(np.uint16)
    return which, signatures


def band_keys(signatures: NDArray[np.uint16], band: int) -> NDArray[np.uint64]:
    """Return one number for each document's band: [documents] uint64."""
    rows = signatures[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
    return scramble((rows[:, 0] << np.uint64(32)) | (rows[:, 1] << np.uint64(16)) | rows[:, 2])


def similarity(one: NDArray[np.uint16], other: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return the estimated similarity of each pair of rows: [pairs]."""
    return (one == other).mean(axis=1)


_FACTORS = scramble(np.arange(1, FUNCTIONS + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)) | np.uint64(1)
