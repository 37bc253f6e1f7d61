"""The bytes of a shard: in how many of them an id is stored, and one long document encoded in pieces."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from lowvram.data import encoders, shards
from lowvram.data.shards import pack
from lowvram.data.tokenizer import Tokenizer


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "lock"}


@pytest.mark.parametrize("size, dtype", [(65_535, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (262_144, "<u4")])
def test_ids_beyond_65535_alone_are_packed_in_four_bytes(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, dtype: str
) -> None:
    narrow = pack([folder], small_tokenizer, tmp_path / "narrow", processes=1)
    monkeypatch.setattr(Tokenizer, "size", size)
    found = pack([folder], small_tokenizer, tmp_path / "other", processes=1)
    assert found.dtype == np.dtype(dtype)
    assert (found.directory / "00000.bin").stat().st_size == found.dtype.itemsize * found.tokens
    assert (found.read(0, found.tokens) == narrow.read(0, narrow.tokens)).all()


def test_the_last_id_of_two_bytes_survives_them(folder: Path, small_tokenizer: Tokenizer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(Tokenizer, "size", 65_536)
    monkeypatch.setattr(Tokenizer, "encode_array", lambda self, text: np.array([65_535, 1], np.uint32))
    found = pack([folder], small_tokenizer, tmp_path / "out", processes=1)
    assert found.read(0, 3).tolist() == [0, 65_535, 1]


def test_shards_of_65536_ids_that_stand_in_four_bytes_stay_as_they_are(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "size", 65_537)
    older = pack([folder], small_tokenizer, tmp_path / "out", processes=1)
    before = bytes_of(older.directory)
    monkeypatch.setattr(Tokenizer, "size", 65_536)
    assert pack([folder], small_tokenizer, tmp_path / "out", processes=1).hash == older.hash
    assert bytes_of(older.directory) == before


def test_a_document_of_megabytes_has_the_ids_that_it_has_as_a_whole(
    small_tokenizer: Tokenizer, turkish: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(shards, "_BLOCK_CHARACTERS", 7)
    hard = ["a\n\n\n b", "\n!\n?\n", "x \n \n  y", "\u0301\u0301 e\n\u0301z", "...\r\n\r\n'q", "\t\n\u00a0\n9"]
    text = "".join(f"{line}\n{hard[number % 6]}{' ' * (number % 4)}" for number, line in enumerate(turkish * 3))
    assert len(pieces := list(encoders.cut_at_lines(text))) > 20
    assert "".join(pieces) == text
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    found = pack([tmp_path / "a.jsonl"], small_tokenizer, tmp_path / "out", processes=1)
    composed = unicodedata.normalize("NFC", text)
    assert found.read(1, found.tokens - 1).tolist() == small_tokenizer.encode(composed)
    assert found.text_bytes == len(composed.encode())
    monkeypatch.undo()
    assert pack([tmp_path / "a.jsonl"], small_tokenizer, tmp_path / "out", processes=1).hash == found.hash


def test_a_document_is_cut_at_lines_only_where_both_pieces_are_long() -> None:
    assert list(encoders.cut_at_lines("")) == [""]
    assert list(encoders.cut_at_lines("a\n" * 999_999)) == ["a\n" * 999_999]
    assert list(map(len, encoders.cut_at_lines("a\n" * 1_000_001))) == [1_000_002, 1_000_000]
    assert list(map(len, encoders.cut_at_lines("a" * 3_000_000))) == [3_000_000]
    assert list(map(len, encoders.cut_at_lines("a\n" + "b" * 2_999_000 + "\nc"))) == [2_999_004]
