"""Loads batches of token windows by sample number; knows no model, no device and no micro-batch.

The loader has no random state: the window of sample n is a function of (seed, corpora, n).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lowvram.config.mix import BLOCK
from lowvram.data.shards import ShardSet
from lowvram.data.splitmix import scramble
from lowvram.errors import DataError
from lowvram.units import count_of

_ROUNDS = 6


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Return the images of `index` under a keyed permutation of [0, size).

    index: integers in [0, size).  key: 64 bits.  Returns int64 of the same shape.
    Source: a Feistel network on the smallest power of two that holds `size`, repeated for what falls outside
    (cycle walking: Black & Rogaway 2002, Ciphers with Arbitrary Finite Domains).
    """
    bits = max(1, (size - 1).bit_length())
    low_bits = np.uint64(bits - bits // 2)
    high_mask, low_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << int(low_bits)) - 1)
    keys = [np.uint64(_digest(key, number)) for number in range(_ROUNDS)]
    result = np.array(index, np.uint64).reshape(-1)
    outside = np.arange(result.size)
    while outside.size:
        high, low = result[outside] >> low_bits, result[outside] & low_mask
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            high ^= scramble(low ^ even) & high_mask
            low ^= scramble(high ^ odd) & low_mask
        result[outside] = high << low_bits | low
        outside = outside[result[outside] >= size]
    return result.astype(np.int64).reshape(np.shape(index))


def _digest(*parts: int | str) -> int:
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class _Window(NamedTuple):
    """The position of a sample: `start` in an array, which belongs to a shard of a corpus."""

    array: np.ndarray
    start: int
    corpus: int
    shard: int


class Loader:
    """The windows of one or several corpora, in an order that depends only on seed, weights and sample number.

    A corpus of N tokens has (N - 1) // seq_len windows; window w holds seq_len + 1 tokens from w * seq_len
    on, so that no target is in two windows.  Each window is used once per epoch of its corpus, each epoch in another
    order.  Corpora are mixed by weight, in blocks of 4,096 samples with a whole number for each.
    Raises DataError: corpus shorter than a window, share below 1/4096, corpora of different tokenizers.
    """

    def __init__(self, corpora: Sequence[tuple[ShardSet, float]], seq_len: int, seed: int) -> None:
        self._corpora = [corpus for corpus, _ in corpora]
        self._seq_len, self._seed = seq_len, seed
        self._windows = [(corpus.tokens - 1) // seq_len for corpus in self._corpora]
        for corpus, windows in zip(self._corpora, self._windows, strict=True):
            if windows < 1:
                raise DataError(
                    f"{corpus.directory} holds {count_of(corpus.tokens, 'token')}.",
                    f"A window of seq_len = {seq_len} takes {seq_len + 1}.",
                    "Pack more text, or lower train.seq_len.",
                )
            if corpus.tokenizer_hash != self._corpora[0].tokenizer_hash:
                what = f"{corpus.directory} and {self._corpora[0].directory} differ in their tokenizer."
                raise DataError(what, "One model reads one vocabulary.", "Pack both with the same one.")
        self._quotas = _share_out([weight for _, weight in corpora])
        slots = np.repeat(np.arange(len(self._corpora)), self._quotas)
        self._slots = slots[permute(np.arange(BLOCK), BLOCK, _digest(seed, "slots"))]
        is_of_corpus = self._slots == np.arange(len(self._corpora))[:, None]
        # How many of the block's earlier slots belong to each corpus.
        self._earlier = np.cumsum(is_of_corpus, axis=1) - is_of_corpus
        self._block = functools.lru_cache(2)(self._find_block)
        # The epoch of each corpus in which its files were verified last; unknown before the first batch.
        self._verified: list[int] = []

    def batch(self, first_sample: int, count: int) -> torch.Tensor:
        """Return `count` samples from `first_sample` on, int64 [count, seq_len + 1]: inputs, last target.

        Whoever opened the corpora has verified them; when a further epoch of one begins, it is verified again.
        Raises DataError where a shard was changed since it was opened, or holds an id beyond the vocabulary.
        """
        assert first_sample >= 0
        self._verify_in_new_epoch(first_sample)
        width = self._seq_len + 1
        tokens_BT = np.empty((count, width), np.int64)
        samples = range(first_sample, first_sample + count)
        windows = [self._block(sample // BLOCK)[sample % BLOCK] for sample in samples]
        for corpus, shard in {(window.corpus, window.shard) for window in windows}:
            self._corpora[corpus].refuse_changed(shard)
        for row, window in enumerate(windows):
            ids = window.array[window.start : window.start + width]
            self._corpora[window.corpus].refuse_unknown(ids, window.shard)
            tokens_BT[row] = ids
        return torch.from_numpy(tokens_BT)

    def _verify_in_new_epoch(self, sample: int) -> None:
        """Hash the files of each corpus of which an epoch begins: a drive may lose bits while it is read for weeks."""
        epochs = [int(epochs) for epochs in self.epochs(sample)]
        verified = self._verified or epochs
        for corpus, epoch, done in zip(self._corpora, epochs, verified, strict=True):
            if epoch > done:
                corpus.verify()
        self._verified = [max(pair) for pair in zip(epochs, verified, strict=True)]

    def epochs(self, sample: int) -> list[float]:
        """Return how many epochs of each corpus samples 0 … sample - 1 cover."""
        block, slot = divmod(sample, BLOCK)
        done = block * self._quotas + self._earlier[:, slot]
        return [int(count) / windows for count, windows in zip(done, self._windows, strict=True)]

    def _find_block(self, block: int) -> list[_Window]:
        """Return the window of each sample of a block."""
        result = [_Window(np.empty(0), 0, 0, 0)] * BLOCK
        for number, (corpus, windows) in enumerate(zip(self._corpora, self._windows, strict=True)):
            slots = np.flatnonzero(self._slots == number)
            count_before = block * int(self._quotas[number]) + self._earlier[number, slots]
            epochs, positions = count_before // windows, count_before % windows
            chosen = np.empty_like(positions)
            for epoch in np.unique(epochs).tolist():
                is_in_epoch = epochs == epoch
                chosen[is_in_epoch] = permute(positions[is_in_epoch], windows, _digest(self._seed, number, epoch))
            starts = chosen * self._seq_len
            spans, shards = corpus.spans(starts, self._seq_len + 1), corpus.numbers(starts).tolist()
            for slot, span, shard in zip(slots.tolist(), spans, shards, strict=True):
                result[slot] = _Window(*span, number, shard)
        return result


def _share_out(weights: Sequence[float]) -> np.ndarray:
    """Return each corpus's number of samples in a block, by largest remainder; the sum is exactly BLOCK."""
    total = math.fsum(weights)
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise DataError(f"The corpora weigh {list(weights)}.", "A weight must be above 0.", "Mend data.train.")
    exact = [weight / total * BLOCK for weight in weights]
    shares = np.array([math.floor(share) for share in exact])
    by_remainder = sorted(range(len(exact)), key=lambda number: shares[number] - exact[number])
    shares[by_remainder[: BLOCK - int(shares.sum())]] += 1
    if shares.min() < 1:
        least = min(weights) / total
        why = f"The smallest share is {least:.2g}; 1/{BLOCK} is the least that can be kept."
        raise DataError(f"The corpora weigh {list(weights)}.", why, "Raise the smallest weight, or leave it out.")
    return shares
