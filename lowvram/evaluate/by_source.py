"""Bits per byte of several sources and of all of them together; the sums are exact, since bits and bytes are added."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
import torch

from lowvram.data.shard_set import ShardSet
from lowvram.data.source_set import SourceSet
from lowvram.evaluate.bits_per_byte import Score, score_windows
from lowvram.model.transformer import Transformer


def score_sources(
    model: Transformer,
    sources: SourceSet,
    bos_id: int,
    byte_count_V: np.ndarray,
    seq_len: int,
    dtype: torch.dtype,
    batch: int = 8,
) -> Generator[tuple[int, int], None, dict[str, Score]]:
    """Score each source as `score_windows` does, and yield the windows that are done and those that there are."""
    scores: dict[str, Score] = {}
    total = sum(-(-(source.ids - 1) // seq_len) for source in sources.sources)
    before = 0
    for source in sources.sources:
        work = score_windows(
            model, source.shards, bos_id, byte_count_V, seq_len, dtype, most_tokens=source.ids - 1, batch=batch
        )
        done = 0
        while True:
            try:
                done, _ = next(work)
            except StopIteration as end:
                scores[source.name] = end.value
                break
            yield before + done, total
        before += done
    return scores


def score_held_out(
    model: Transformer,
    held_out: ShardSet | SourceSet,
    bos_id: int,
    byte_count_V: np.ndarray,
    seq_len: int,
    dtype: torch.dtype,
    most_tokens: int | None = None,
    batch: int = 8,
) -> Generator[tuple[int, int], None, tuple[Score, dict[str, Score]]]:
    """Return the score of held-out text, and of each source where there are several; yields as `score_windows` does.

    most_tokens: of several sources as `SourceSet.limit` shares them out.
    """
    given = bos_id, byte_count_V, seq_len, dtype
    if isinstance(held_out, SourceSet):
        scores = yield from score_sources(model, held_out.limit(most_tokens), *given, batch)
        return add_up(scores.values()), scores
    return (yield from score_windows(model, held_out, *given, most_tokens, batch)), {}


def add_up(scores: Iterable[Score]) -> Score:
    """Return the score of all texts together: sums of nats, targets and bytes."""
    nats, targets, text_bytes = zip(*scores, strict=True)
    return Score(sum(nats), sum(targets), sum(text_bytes))
