"""Scores the documents of shards one by one, all of them or a sample that is always the same; knows no file.

A document begins at its BOS and is read in windows of the model's length without overlap, so that each of its tokens is
predicted once, from nothing but the document itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lowvram.data.places import Place
from lowvram.data.shard_documents import ShardDocuments, open_documents
from lowvram.data.shard_set import ShardPart, ShardSet
from lowvram.data.splitmix import STEP, scramble
from lowvram.data.tokenizer import Tokenizer
from lowvram.evaluate.likelihood import Request
from lowvram.evaluate.scorer import Scorer

# Documents of about so many tokens are scored together; what is finished is kept in such pieces.
PIECE_TOKENS = 1 << 17
_EXCERPT_BYTES = 400
_EXCERPT_CHARACTERS = 160


class DocumentScore(NamedTuple):
    """What a document costs a model.

    shard: the shard's name; number: the document's in it, from 0 on.  hash: as `hash_document` names it.  bits: of all
    its tokens.  place: None where the packing did not note it.  excerpt: its beginning, on one line.
    """

    shard: str
    number: int
    hash: str
    bits: float
    tokens: int
    text_bytes: int
    place: Place | None
    excerpt: str

    @property
    def bits_per_byte(self) -> float:
        """The bits that the model needs for one byte of it."""
        return self.bits / self.text_bytes


@dataclass(frozen=True)
class Choice:
    """The documents that are scored, by shard.

    tokens: theirs.  documents: how many there are.  short: how many of all documents are shorter than asked for.
    """

    by_part: Sequence[tuple[ShardPart, np.ndarray]]
    documents: int
    tokens: int
    short: int


Choosing = Generator[tuple[int, int], None, Choice]
Scoring = Generator[tuple[int, list[DocumentScore]], None, None]


def choose_documents(shards: ShardSet, tokenizer: Tokenizer, most_tokens: int | None, least_bytes: int) -> Choosing:
    """Return the documents of at least so many bytes, or a sample of about `most_tokens`; yields the shards read.

    A document is in the sample where a hash of its shard and number is below a threshold, so a larger sample holds a
    smaller one.
    """
    share = 1.0 if most_tokens is None else min(1.0, most_tokens / shards.tokens)
    parts = shards.parts()
    chosen: list[tuple[ShardPart, np.ndarray]] = []
    documents = tokens = short = 0
    for done, part in enumerate(parts, 1):
        found = open_documents(shards, part, tokenizer)
        is_long_D = found.byte_count_D >= max(1, least_bytes)
        short += int(np.count_nonzero(~is_long_D))
        picked = np.flatnonzero(is_long_D & (_draw(part, part.documents) < share))
        if len(picked):
            chosen.append((part, picked))
            documents += len(picked)
            tokens += int((found.stop_D - found.start_D)[picked].sum())
        yield done, len(parts)
    return Choice(chosen, documents, tokens, short)


def _draw(part: ShardPart, documents: int) -> np.ndarray:
    """Return a number from 0 to 1 for each document of a shard, from the shard's hash and the document's number."""
    key = int.from_bytes(hashlib.sha256(f"look {part.sha256}".encode()).digest()[:8], "little")
    drawn_D = scramble(np.arange(1, documents + 1, dtype=np.uint64) * STEP + np.uint64(key))
    return drawn_D.astype(np.float64) / 2.0**64


def score_documents(scorer: Scorer, shards: ShardSet, choice: Choice, skipped: int = 0) -> Scoring:
    """Yield the tokens scored so far and, when a piece of documents is finished, their scores, in order.

    skipped: so many documents were scored before, at the end of a piece.
    """
    done = 0
    for numbers, found in _cut(shards, choice, scorer.tokenizer):
        count = int((found.stop_D - found.start_D)[numbers].sum())
        if skipped:
            skipped -= len(numbers)
            assert skipped >= 0, "documents are kept in whole pieces"
            done += count
            continue
        bos = (scorer.tokenizer.bos_id,)
        requests = [Request(bos, tuple(found.read_ids(number).tolist())) for number in numbers]
        scoring = scorer.score(requests)
        while True:
            try:
                texts, total = next(scoring)
            except StopIteration as end:
                likelihoods = end.value
                break
            yield done + count * texts // total, []
        done += count
        yield done, [_describe(found, number, each.nats) for number, each in zip(numbers, likelihoods, strict=True)]


def _cut(
    shards: ShardSet, choice: Choice, tokenizer: Tokenizer
) -> Generator[tuple[list[int], ShardDocuments], None, None]:
    """Yield the chosen documents in pieces of one shard each, with that shard's documents."""
    for part, picked in choice.by_part:
        found = open_documents(shards, part, tokenizer)
        piece: list[int] = []
        tokens = 0
        for number, length in zip(picked.tolist(), (found.stop_D - found.start_D)[picked].tolist(), strict=True):
            if piece and tokens + length > PIECE_TOKENS:
                yield piece, found
                piece, tokens = [], 0
            piece.append(number)
            tokens += length
        yield piece, found


def _describe(found: ShardDocuments, number: int, nats: float) -> DocumentScore:
    data = found.read_bytes(number)
    head = data[:_EXCERPT_BYTES].decode("utf-8", "ignore").split()
    return DocumentScore(
        found.part.path.name,
        number,
        hashlib.sha256(data).hexdigest(),
        nats / math.log(2),
        int(found.stop_D[number] - found.start_D[number]),
        len(data),
        found.places[number] if found.places is not None else None,
        " ".join(head)[:_EXCERPT_CHARACTERS],
    )
