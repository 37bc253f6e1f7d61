"""A ShardSet reads across its shards what was packed, through one mapping each, and refuses what is not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.data import shards
from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.shell import quote_command


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


@pytest.mark.parametrize("change_bytes, word", [(-2, "damaged"), (2, "damaged"), (None, "missing")])
def test_a_truncated_shard_is_named(packed: ShardSet, change_bytes: int | None, word: str) -> None:
    path = packed.directory / "00001.bin"
    data = path.read_bytes()
    path.unlink()
    if change_bytes is not None:
        path.write_bytes((data + b"\0\0")[: len(data) + change_bytes])
    size = 0 if change_bytes is None else len(data) + change_bytes
    with pytest.raises(DataError, match=rf"00001\.bin is {word}\. It has {size} bytes of {len(data)}"):
        ShardSet.open(packed.directory)


def test_opening_with_another_tokenizer_is_refused(packed: ShardSet, small_tokenizer: Tokenizer) -> None:
    assert ShardSet.open(packed.directory, small_tokenizer.hash).hash == packed.hash
    with pytest.raises(DataError, match=r"shards of another tokenizer.*0123456789ab…"):
        ShardSet.open(packed.directory, "0123456789abcdef")


def test_a_folder_that_was_never_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no shards.*interrupted"):
        ShardSet.open(tmp_path)
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shards.json").touch()
    with pytest.raises(DataError, match=r"holds no shards itself\. They are in \S+train and \S+valid\. Name one"):
        ShardSet.open(tmp_path)
    with pytest.raises(DataError, match=r"missing does not exist\.(?!.*interrupted)"):
        ShardSet.open(tmp_path / "missing")


def test_text_that_was_named_as_shards_is_answered_with_the_commands_that_pack_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = Path("my texts")
    (texts / "2024").mkdir(parents=True)
    for name in ("b.jsonl.gz", "2024/a.parquet", ".hidden.txt", "notes.md"):
        (texts / name).touch()
    with pytest.raises(DataError) as raised:
        ShardSet.open(texts)
    assert raised.value.what == f"{texts} holds text (b.jsonl.gz, {Path('2024/a.parquet')}), not shards."
    quoted = quote_command(texts)
    train = f"lowvram tokenizer train {quoted} --out tok --holdout {quote_command('0.5%')}"
    pack = f"lowvram data pack {quoted} --tokenizer tok --out shards --holdout {quote_command('0.5%')}"
    assert raised.value.fix == f"Type: {train}, then: {pack}"
    Path("tok").mkdir()
    Path("tok/tokenizer.json").touch()
    Path("shards").mkdir()
    Path("train.txt").touch()
    with pytest.raises(DataError, match=r"^train\.txt is text, not shards\.") as raised:
        ShardSet.open(Path("train.txt"))
    assert raised.value.fix == f"Pack it: {pack.replace(quoted, 'train.txt').replace(' shards', ' train-shards')}"
    (texts / "2024/shards.json").touch()
    with pytest.raises(DataError, match="holds no shards"):
        ShardSet.open(texts)


NO_INDEX = [
    "",
    "[]",
    "{",
    '{"format": 2}',
    '{"format": 1, "tokenizer": "x"}',
    '{"a":' * 100_000,
    "\0",
    '{"format": NaN}',
]


@pytest.mark.parametrize("text", NO_INDEX, ids=lambda text: text[:20])
def test_an_index_that_is_torn_or_of_another_format_is_refused(packed: ShardSet, text: str) -> None:
    (packed.directory / "shards.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"shards\.json cannot be read"):
        ShardSet.open(packed.directory)


RECORDS = {
    "a path out of the folder": {"file": "../00000.bin"},
    "a full path": {"file": "/etc/passwd"},
    "a number as name": {"file": 0},
    "a text as count": {"tokens": "5"},
    "a fraction as count": {"documents": 1.5},
    "a count below zero": {"text_bytes": -1},
    "true as count": {"tokens": True},
    "no hash": {"sha256": None},
}


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_an_index_that_records_no_shards_of_ours_is_refused(packed: ShardSet, change: dict[str, object]) -> None:
    index = json.loads((packed.directory / "shards.json").read_text(encoding="utf-8"))
    index["shards"][0] |= change
    (packed.directory / "shards.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=r"shards\.json cannot be read"):
        ShardSet.open(packed.directory)


@pytest.mark.parametrize("tokens", [0, 1])
def test_fewer_than_two_tokens_are_refused(packed: ShardSet, tokens: int) -> None:
    index = json.loads((packed.directory / "shards.json").read_text(encoding="utf-8"))
    index["shards"] = [index["shards"][0] | {"tokens": tokens}]
    (packed.directory / "00000.bin").write_bytes(b"\0" * 2 * tokens)
    (packed.directory / "shards.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=f"holds {tokens} token"):
        ShardSet.open(packed.directory)


def test_a_sidecar_with_other_counts_than_numbers_is_packed_again(
    tmp_path: Path, small_tokenizer: Tokenizer, turkish: tuple
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(turkish), encoding="utf-8")
    whole = pack([tmp_path / "a.txt"], small_tokenizer, tmp_path / "out", processes=1)
    sidecar = tmp_path / "out/00000.json"
    written = sidecar.read_text(encoding="utf-8")
    for tokens in ("many", -1, None, 1.5):
        sidecar.write_text(json.dumps(json.loads(written) | {"tokens": tokens}), encoding="utf-8")
        assert pack([tmp_path / "a.txt"], small_tokenizer, tmp_path / "out", processes=1).tokens == whole.tokens
        assert sidecar.read_text(encoding="utf-8") == written
