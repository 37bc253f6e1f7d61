"""A ShardSet reads across its shards what was packed, through one mapping each."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.data import shards
from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Tokenizer, turkish: tuple) -> ShardSet:
    """Some thousand tokens in dozens of tiny shards."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "a.txt").write_text("\n\n".join(turkish * 2), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "PART_BYTES", 80)
        return pack([folder], small_tokenizer, folder / "out", processes=1)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_reading_across_shards_gives_the_tokens_in_order(many: ShardSet, data: st.DataObject) -> None:
    whole = np.concatenate([np.fromfile(path, "<u2") for path in sorted(many.directory.glob("*.bin"))])
    assert len(whole) == many.tokens
    count = data.draw(st.integers(1, many.tokens))
    starts = np.array(data.draw(st.lists(st.integers(0, many.tokens - count), min_size=1, max_size=8)))
    for start, (array, place) in zip(starts, many.spans(starts, count), strict=True):
        assert (many.read(int(start), count) == whole[start : start + count]).all()
        assert (array[place : place + count] == whole[start : start + count]).all()
        assert array[place : place + count].size == count


def test_a_shard_is_mapped_once_however_often_it_is_read(many: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[Path] = []
    original = np.memmap

    def counting(path: Path, *arguments: object) -> np.memmap:
        mapped.append(path)
        return original(path, *arguments)

    monkeypatch.setattr(np, "memmap", counting)
    fresh = ShardSet.open(many.directory)
    assert mapped == []
    for _ in range(5):
        fresh.read(0, fresh.tokens)
        fresh.spans(np.arange(fresh.tokens - 3), 3)
    assert sorted(mapped) == sorted(many.directory.glob("*.bin"))


def test_a_copied_folder_is_the_same_data(many: ShardSet, tmp_path: Path) -> None:
    copy = ShardSet.open(shutil.copytree(many.directory, tmp_path / "copy"))
    assert (copy.hash, copy.tokens) == (many.hash, many.tokens)
