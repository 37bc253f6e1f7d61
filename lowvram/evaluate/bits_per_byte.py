"""Computes bits per byte of held-out text, which can be compared between tokenizers; knows no training loop.

Every token after a document's BOS is a target, in windows of `seq_len` without overlap.  The sum of the targets'
negative log2-probabilities is divided by the UTF-8 bytes that these targets stand for.  Tokens are packed from the
NFC form of a text, so the bytes are those of the NFC form too, and the result does not depend on how the text's letters
were composed.  BOS is not text: it is not a target and has no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from lowvram_kernels.loss.linear_cross_entropy import linear_cross_entropy

from lowvram.finish import finish
from lowvram.model.transformer import Transformer

_IGNORED = -100
# This is enough for the bigram baseline; the pairs of a corpus of billions of tokens would not fit into memory.
BIGRAM_TOKENS = 20_000_000


class TokenSource(Protocol):
    """Where ids are read from: a `ShardSet`, or anything that holds as many and reads them alike."""

    tokens: int

    def read(self, start: int, count: int) -> np.ndarray:
        """Return `count` ids from number `start` on."""


class Score(NamedTuple):
    """nats: the summed negative log-likelihood.  targets: how many tokens were predicted.  text_bytes: their bytes."""

    nats: float
    targets: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The bits that the model needs for one byte of text."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def loss(self) -> float:
        """The nats per predicted token."""
        return self.nats / self.targets


Windows = Generator[tuple[int, int], None, Score]


def score(
    model: Transformer,
    shards: TokenSource,
    bos_id: int,
    byte_count_V: np.ndarray,
    seq_len: int,
    dtype: torch.dtype,
    most_tokens: int | None = None,
    batch: int = 8,
) -> Score:
    """Score the first `most_tokens` tokens of a shard set (all if None).

    byte_count_V: the bytes behind each id (`Tokenizer.byte_count_V`).
    """
    return finish(score_windows(model, shards, bos_id, byte_count_V, seq_len, dtype, most_tokens, batch))


@torch.no_grad()
def score_windows(
    model: Transformer,
    shards: TokenSource,
    bos_id: int,
    byte_count_V: np.ndarray,
    seq_len: int,
    dtype: torch.dtype,
    most_tokens: int | None = None,
    batch: int = 8,
) -> Windows:
    """Do what `score` does, and yield the windows that are done and those that there are after each batch."""
    device = model.embedding.device
    total = _count_tokens(shards, most_tokens)
    windows = math.ceil((total - 1) / seq_len)
    nats, targets, text_bytes = 0.0, 0, 0
    # The loss op reads a plain matrix as it is stored; 8-bit codes are decoded once for all windows.
    head_VD = model.head_VD if model.head_VD.is_floating_point() else model.head_matrix(dtype)
    for first in range(0, windows, batch):
        count = min(batch, windows - first)
        flat = np.full(count * seq_len + 1, _IGNORED, dtype=np.int64)
        read = shards.read(first * seq_len, min(count * seq_len + 1, total - first * seq_len))
        flat[: len(read)] = read
        target_N = flat[1:].copy()
        target_N[target_N == bos_id] = _IGNORED
        counted = target_N[target_N != _IGNORED]
        input_BT = torch.from_numpy(np.maximum(flat[:-1], 0)).unflatten(0, (count, seq_len))
        stream_BTD, _ = model(input_BT.to(device), dtype)
        nats += linear_cross_entropy(stream_BTD.flatten(0, 1), head_VD, torch.from_numpy(target_N).to(device)).item()
        targets += len(counted)
        text_bytes += int(byte_count_V[counted].sum())
        yield min(first + batch, windows), windows
    return Score(nats, targets, text_bytes)


def bigram_score(
    train: TokenSource, valid: TokenSource, bos_id: int, byte_count_V: np.ndarray, most_tokens: int | None = None
) -> Score:
    """Score the first `most_tokens` tokens of `valid` (all if None) by token bigrams, the baseline for a model.

    They are counted on the first BIGRAM_TOKENS tokens of `train`.  byte_count_V: as in `score`.

    Bigrams are interpolated with unigrams by Witten & Bell (1991, method C), unigrams with the uniform distribution.
    """
    vocabulary = len(byte_count_V)
    seen = train.read(0, min(train.tokens, BIGRAM_TOKENS)).astype(np.int64)
    unigram_V = np.bincount(seen, minlength=vocabulary).astype(np.float64)
    distinct = np.count_nonzero(unigram_V)
    unigram_V = (unigram_V + distinct / vocabulary) / (len(seen) + distinct)
    pairs, counts = np.unique(seen[:-1] * vocabulary + seen[1:], return_counts=True)
    context_V = np.bincount(pairs // vocabulary, weights=counts, minlength=vocabulary)
    followers_V = np.bincount(pairs // vocabulary, minlength=vocabulary)
    text = valid.read(0, _count_tokens(valid, most_tokens)).astype(np.int64)
    before, after = text[:-1], text[1:]
    before, after = before[after != bos_id], after[after != bos_id]
    pair = before * vocabulary + after
    index = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
    count = np.where(pairs[index] == pair, counts[index], 0)
    total = context_V[before] + followers_V[before]
    mixed = (count + followers_V[before] * unigram_V[after]) / np.maximum(total, 1)
    probability = np.where(total > 0, mixed, unigram_V[after])
    return Score(float(-np.log(probability).sum()), len(after), int(byte_count_V[after].sum()))


def _count_tokens(shards: TokenSource, most_tokens: int | None) -> int:
    return min(shards.tokens, most_tokens + 1) if most_tokens else shards.tokens
