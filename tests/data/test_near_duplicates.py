"""Near duplicates: all pairs that share a band are found, whatever the parts and buckets."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from lowvram.data.clean import cleaner, duplicates, pair_buckets
from lowvram.data.clean.batch import Batch
from lowvram.data.clean.signature import BANDS, band_keys, sign, similarity
from tests.data.test_cleaner import rows_of, run, write_document


def test_near_duplicates_are_those_that_comparing_every_pair_would_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "PART_BYTES", 4_000)
    monkeypatch.setattr(pair_buckets, "_BUCKET_PAIRS", 16)
    monkeypatch.setattr(pair_buckets, "_WAITING_PAIRS", 40)
    generator = random.Random(3)
    families = [write_document(generator, 12).split(" ") for _ in range(12)]
    texts = []
    for number in range(90):
        words = list(families[number % 12])
        for place in generator.sample(range(len(words)), generator.randint(1, 14)):
            words[place] = f"söz{generator.randint(0, 999)}"
        texts.append(" ".join(words))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    run(tmp_path / "a.jsonl", tmp_path / "out", ("near_duplicates.similarity=0.5",))
    which, signatures = sign(Batch(texts), 20)
    assert which.tolist() == list(range(90))
    keys = np.stack([band_keys(signatures, band) for band in range(BANDS)], 1)
    expected = [
        later + 1
        for later in range(90)
        if not any(
            similarity(signatures[[later]], signatures[[earlier]])[0] >= 0.5 and (keys[later] == keys[earlier]).any()
            for earlier in range(later)
        )
    ]
    assert 12 < len(expected) < 80
    assert [row["document"] for row in rows_of(tmp_path / "out/a.jsonl")] == expected


def test_of_many_documents_with_one_band_each_is_compared_with_the_first_and_those_before_it() -> None:
    keys, numbers = np.array([1] * 9 + [2] + [3] * 2, np.uint64), np.arange(100, 112, dtype=np.uint64)
    pairs = {
        (int(a), int(b))
        for one, other in duplicates._candidates(keys, numbers)
        for a, b in zip(one, other, strict=True)
    }
    near = {(100 + a, 100 + b) for a in range(9) for b in range(9) if 0 < a - b <= 4}
    assert pairs == near | {(100 + a, 100) for a in range(1, 9)} | {(111, 110)}
