"""Sixty documents in two files, and what packing them into small shards gives."""

from __future__ import annotations

import unicodedata
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

from lowvram.data import shards
from lowvram.data.shards import ShardSet, pack
from lowvram.data.tokenizer import Tokenizer

PART_BYTES = 1_000
Step = TypeVar("Step")
Result = TypeVar("Result")


def follow(work: Generator[Step, None, Result]) -> tuple[Result, list[Step]]:
    """Run work to its end; return its result and what it yielded."""
    steps: list[Step] = []
    while True:
        try:
            steps.append(next(work))
        except StopIteration as end:
            return end.value, steps


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART_BYTES", PART_BYTES)


@pytest.fixture
def texts(turkish: tuple[str, ...]) -> list[str]:
    """Sixty documents, no two alike, one of them in NFD and one with what looks like a special token."""
    made = [f"{n}. {turkish[n % 16]} {turkish[n * 7 % 16]}" for n in range(58)]
    return [*made, unicodedata.normalize("NFD", turkish[4]), "<|bos|> " + turkish[5]]


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    """The documents in two files."""
    (tmp_path / "text").mkdir()
    for name, part in (("a.txt", texts[:40]), ("b.txt", texts[40:])):
        (tmp_path / "text" / name).write_text("\n\n".join(part), encoding="utf-8", newline="")
    return tmp_path / "text"


@pytest.fixture
def packed(folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None) -> ShardSet:
    return pack([folder], small_tokenizer, tmp_path / "out", processes=1)
