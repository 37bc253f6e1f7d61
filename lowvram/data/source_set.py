"""Reads several named sets of shards as one text, source after source; knows no model and no batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowvram.data.shard_set import ShardSet


class Source(NamedTuple):
    """The first `ids` ids of a set of shards.  name: as the run file or the mix names the source."""

    name: str
    shards: ShardSet
    ids: int


class SourceSet:
    """The beginnings of several sources, one after the other; each begins with a document, so with BOS.

    tokens: how many ids are read.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.tokens = sum(source.ids for source in self.sources)

    def limit(self, most_tokens: int | None) -> SourceSet:
        """Return the set of which at most `most_tokens` are predicted, shared out among the sources; None: no limit.

        Each source is given the same number, and what one has not is given to the others: so what is read does not
        depend on the weights of the training, and every source's figure is as sure as the text allows.
        """
        if most_tokens is None:
            return self
        shared = share_out([source.ids - 1 for source in self.sources], most_tokens)
        return SourceSet([source._replace(ids=1 + ids) for source, ids in zip(self.sources, shared, strict=True)])

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids [count] from number `start` on."""
        assert 0 <= start < start + count <= self.tokens
        pieces = []
        for source in self.sources:
            first, last = max(0, start), min(source.ids, start + count)
            if first < last:
                pieces.append(source.shards.read(first, last - first))
            start -= source.ids
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def list_sets(held_out: ShardSet | SourceSet) -> list[ShardSet]:
    """Return the sets of shards that are read, in order."""
    return [source.shards for source in held_out.sources] if isinstance(held_out, SourceSet) else [held_out]


def share_out(available: Sequence[int], most: int) -> list[int]:
    """Share `most` out in equal parts, of which none is larger than what is available; each gets at least 1.

    What one part lacks is shared out among the others, and what does not divide goes to the largest.  The sum is
    `most`, or all that is available.
    """
    shared, left = [0] * len(available), most
    by_size = sorted(range(len(available)), key=lambda number: (available[number], -number))
    for rank, number in enumerate(by_size):
        shared[number] = max(1, min(available[number], left // (len(available) - rank)))
        left -= shared[number]
    return shared


def open_sources(
    named: Sequence[tuple[str, Path]], tokenizer_hash: str | None = None, vocabulary: int | None = None
) -> ShardSet | SourceSet:
    """Open the shards of one or several sources; raises DataError as `ShardSet.open` does.

    named: names and folders; a single source without a name is a plain set of shards.
    """
    opened = [(name, ShardSet.open(path, tokenizer_hash, vocabulary)) for name, path in named]
    if len(opened) == 1 and not opened[0][0]:
        return opened[0][1]
    return SourceSet([Source(name, shards, shards.tokens) for name, shards in opened])
