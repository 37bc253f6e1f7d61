"""Pairs are sorted by way of the disk: none is lost, and files are opened a few times, however many parts there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowvram.data.clean import pair_buckets


def test_pairs_come_back_sorted_and_their_files_are_opened_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []

    def count(path: Path, mode: str) -> Any:
        opened.append(path)
        assert mode == "ab"
        return path.open("ab")

    monkeypatch.setattr(pair_buckets, "open", count, raising=False)
    monkeypatch.setattr(pair_buckets, "_WAITING_PAIRS", 4_000)
    monkeypatch.setattr(pair_buckets, "_BUCKET_PAIRS", 1_000)
    generator = np.random.default_rng(3)
    keys = generator.integers(0, 1 << 64, 30_001, np.uint64)
    keys[::7] = keys[3]
    values = generator.permutation(len(keys)).astype(np.uint64)
    buckets = pair_buckets.PairBuckets(tmp_path / "pairs", len(keys))
    for start in range(0, len(keys), 50):
        buckets.add(keys[start : start + 50], values[start : start + 50])
    found = list(buckets.take())
    order = np.lexsort((values, keys))
    assert 10 < len(found) <= 32
    assert (np.concatenate([pair[0] for pair in found]) == keys[order]).all()
    assert (np.concatenate([pair[1] for pair in found]) == values[order]).all()
    assert len(opened) <= 8 * len(found)
    assert not (tmp_path / "pairs").exists()
