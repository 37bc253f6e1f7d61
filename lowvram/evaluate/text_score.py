"""Bits per byte of text files as they lie, equal to what their shards would give; writes nothing.

The documents of a file are one sequence of ids in memory, each behind its BOS, and read in windows like shards.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lowvram.config.mix import is_mix, read_mix
from lowvram.data.bad_rows import BadRows
from lowvram.data.nfc import nfc
from lowvram.data.shard_set import INDEX
from lowvram.data.shards import ShardSet
from lowvram.data.text import documents
from lowvram.data.text_files import TextFiles, find_text_files, size_of
from lowvram.data.tokenizer import Tokenizer
from lowvram.evaluate.bits_per_byte import Score


@dataclass(frozen=True)
class TextScore:
    """Bits per byte of one file or folder of shards.

    tokens: those that were predicted; text_bytes: theirs.  documents: None of shards.  bits_per_byte is not finite
    where the model's numbers are broken.
    """

    name: Path
    documents: int | None
    tokens: int
    text_bytes: int
    bits_per_byte: float
    loss: float

    @staticmethod
    def of(name: Path, score: Score, documents: int | None) -> TextScore:
        """Return what a file scores."""
        return TextScore(name, documents, score.targets, score.text_bytes, score.bits_per_byte, score.loss)


class TokenSequence:
    """The ids of documents in memory, with the interface of a `ShardSet` that scoring needs."""

    def __init__(self, id_T: np.ndarray, documents: int) -> None:
        self._id_T, self.tokens, self.documents = id_T, len(id_T), documents

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids number `start` on; fewer than `count` at the end."""
        return self._id_T[start : start + count]


def find_domains(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """Return the text files and the folders of shards that paths name, each of which gets a row of its own.

    Beside them sentences about what is passed over in folders.
    Raises DataError for a path that is missing or holds neither.
    """
    # Of a mix that is what it holds out; it may hold generated text too, which is not meant.
    held_out = [folder for path in paths if is_mix(path) for _, folder in read_mix(path).valid(path)]
    shards = [path for path in [*paths, *held_out] if (path / INDEX).exists()]
    others = [path for path in paths if path not in shards and not is_mix(path)]
    found = find_text_files(others) if others else TextFiles()
    return [*shards, *found.files], found.describe()


def open_domain(
    path: Path, field: str, tokenizer: Tokenizer, most_tokens: int | None, bad_rows: BadRows | None = None
) -> Generator[tuple[int, int], None, ShardSet | TokenSequence]:
    """Return the ids of a text file or a folder of shards; yields the bytes of a file that are read and its size.

    most_tokens: what is enough; whole documents are read up to there.  bad_rows: notes a file's encoding, and what is
    done with rows that are not text; None stops at the first.
    Raises DataError for a file that is no text, and for shards of another tokenizer.
    """
    if (path / INDEX).exists():
        return ShardSet.open(path, tokenizer.hash, tokenizer.size)
    total, done = size_of(path), 0
    parts: list[np.ndarray] = []
    tokens = 0

    def tell(read_bytes: int) -> None:
        nonlocal done
        done = read_bytes

    for document in documents(path, field, tell, bad_rows):
        id_T = tokenizer.encode_array(nfc(document))
        parts += [np.array([tokenizer.bos_id], np.uint32), id_T]
        tokens += 1 + len(id_T)
        yield done, max(total, done, 1)
        if most_tokens is not None and tokens > most_tokens:
            break
    return TokenSequence(np.concatenate(parts), len(parts) // 2)
