"""Finds documents that hold items of evaluation sets, by shared sequences of words; knows no model and no score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lowvram.config.cleaning import ContaminationRule
from lowvram.data.bad_rows import BadRow
from lowvram.data.clean.batch import Batch, hash_sequences
from lowvram.data.field_records import parquet_records
from lowvram.data.lines import LineReader
from lowvram.data.table_rows import table_records
from lowvram.data.text_files import is_dataset
from lowvram.data.text_stream import open_text
from lowvram.errors import DataError, argument

_Row = TypeVar("_Row")
_FILTER_BITS = 22
_MOST_SEQUENCES = 20_000_000
_ITEMS_AT_ONCE = 2_000


class EvaluationIndex:
    """Sequences of words of evaluation sets, by their length in words.

    hashes: sorted, by length.  items: how many items were read, short: how many of them are too short to be found.
    """

    def __init__(self, hashes: dict[int, NDArray[np.uint64]], items: int = 0, short: int = 0) -> None:
        self.hashes, self.items, self.short = hashes, items, short
        self._filters = {length: _build_filter(found) for length, found in hashes.items()}

    def count(self, batch: Batch) -> NDArray[np.int64]:
        """Return how many sequences of each document stand in an evaluation set."""
        found = np.zeros(len(batch.texts), np.int64)
        for length, hashes in self.hashes.items():
            documents, sequences = batch.sequences(length)
            # Most sequences are in no set: a table of bits answers for them, and is small enough for the cache.
            maybe = np.flatnonzero(self._filters[length][sequences >> np.uint64(64 - _FILTER_BITS)])
            if len(maybe):
                places = np.minimum(np.searchsorted(hashes, sequences[maybe]), len(hashes) - 1)
                hits = documents[maybe][hashes[places] == sequences[maybe]]
                found += np.bincount(hits, minlength=len(found))
        return found


def _build_filter(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    bits = np.zeros(1 << _FILTER_BITS, np.bool_)
    bits[hashes >> np.uint64(64 - _FILTER_BITS)] = True
    return bits


def build_index(rule: ContaminationRule, files: Sequence[Path]) -> EvaluationIndex:
    """Return the index of evaluation sets: every string of every row, but passages and what is quoted from them.

    A string of at least `rule.words` words gives all its sequences of that length; a shorter one is found as a whole,
    if it has at least `rule.least_words`.  files: .jsonl, .json lines, .tsv, .csv, .txt and .parquet.
    Raises DataError for a file that cannot be read, or sets without any item that could be found.
    """
    parts: dict[int, list[NDArray[np.uint64]]] = {}
    items = short = total = 0
    for texts in _groups(text for file in files for text in _read_items(file, frozenset(rule.passages))):
        batch = Batch(texts)
        counts = batch.word_counts
        items += len(texts)
        short += int((counts < rule.least_words).sum())
        _, sequences = batch.sequences(rule.words)
        parts.setdefault(rule.words, []).append(np.unique(sequences))
        total += len(sequences)
        for length in range(rule.least_words, rule.words):
            which = counts == length
            words = batch.words[np.repeat(which, counts)]
            parts.setdefault(length, []).append(hash_sequences(words, counts[which]))
        if total > _MOST_SEQUENCES:
            what = f"{argument('against')} names more than {_MOST_SEQUENCES:,} sequences of words."
            raise DataError(what, "An evaluation set is small.", "Name evaluation sets, not training text.")
    hashes = {length: np.unique(np.concatenate(found)) for length, found in parts.items()}
    hashes = {length: found for length, found in hashes.items() if len(found)}
    if not hashes:
        what = f"No item of {', '.join(map(str, files))} has {rule.least_words} words."
        fix = "Name other files, or lower contamination.least_words."
        raise DataError(what, "Nothing could be found by these.", fix)
    return EvaluationIndex(hashes, items, short)


def _groups(texts: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == _ITEMS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _read_items(file: Path, passages: frozenset[str]) -> Iterator[str]:
    fix = "Name files of .jsonl, .json lines, .csv, .tsv, .txt or .parquet."
    if is_dataset(file):
        raise DataError(f"{file} is a data set, not a file.", "Evaluation sets are read from files.", fix)
    with open_text(file) as stream:
        if stream.kind in (".pdf", ".docx"):
            raise DataError(f"{file} is no evaluation set.", f"A {stream.kind} has no rows.", fix)
        if stream.kind == ".parquet":
            yield from (text for record in parquet_records(file, stream) for text in _items_of(record, passages))
            return
        lines = LineReader(file, stream)
        if stream.kind in (".csv", ".tsv"):
            for _, record in table_records(file, lines, stream.kind == ".tsv"):
                yield from _items_of(_refuse_bad(record), passages)
            return
        for number, (_, read) in enumerate(lines.read(), 1):
            line = _refuse_bad(read)
            if line.isspace():
                continue
            elif stream.kind == ".txt":
                yield line
            else:
                yield from _items_of(_read_json(f"{file}:{number}", line), passages)


def _refuse_bad(row: _Row | BadRow) -> _Row:
    """Return a row, or raise DataError: an item that cannot be read would be found in no document."""
    if isinstance(row, BadRow):
        raise DataError(row.what, row.why, row.fix)
    return row


def _read_json(where: str, line: str) -> Any:
    try:
        return json.loads(line.strip("\ufeff \t\r\n"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON.", f"{error}.", "An evaluation set has one object a line.") from error


def _items_of(record: Any, passages: frozenset[str]) -> Iterator[str]:
    """Yield every string of a row that is neither a passage nor quoted from one, as an extractive answer is."""
    table = record if isinstance(record, dict) else {}
    quoted = [value for name, value in table.items() if name in passages and isinstance(value, str)]
    return (text for text in _strings(record, passages) if not any(text in passage for passage in quoted))


def _strings(value: Any, passages: frozenset[str]) -> Iterator[str]:
    """Yield every string inside a value, but those below a field of passages."""
    if isinstance(value, str):
        if value and not value.isspace():
            yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in passages:
                yield from _strings(inner, passages)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, passages)
