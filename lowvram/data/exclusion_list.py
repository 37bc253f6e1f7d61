"""Lists of documents to leave out, by hash: how they are read and chosen from, and what shards keep of them.

A list is `look.jsonl`, with a row for each document; the `excluded.json` of a folder of shards; or a hash in each line.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram.data.lines import LineReader
from lowvram.data.nfc import nfc
from lowvram.data.shard_set import INDEX, read_json
from lowvram.data.text_stream import TextStream, open_table
from lowvram.errors import DataError
from lowvram.storage.json_files import JsonError, read_object
from lowvram.units import count_of

# What a folder of shards keeps of the documents that were left out, and the key of their number in its index.
EXCLUDED, LEFT_OUT = "excluded.json", "left_out"
_FORMAT = 1
_HASH = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 2 << 30
# The keys of a row: of `look.jsonl` all but the last, which says in other lists by which rule the document was chosen.
HASH, BITS_PER_BYTE, BYTES, TOKENS, FILE, LINE = "hash", "bits_per_byte", "bytes", "tokens", "file", "line"
SHARD, DOCUMENT, EXCERPT, WHY = "shard", "document", "excerpt", "why"
# Of a row these are kept for people.
_KEPT = (BITS_PER_BYTE, BYTES, FILE, LINE)
_FIX = "Name the list that `lowvram data look` wrote, an excluded.json, or a file with one SHA-256 in a line."


@dataclass(frozen=True)
class Excluded:
    """What was left out of shards.  rows: one for each document.  sources: of the text, as the index has them."""

    rows: Sequence[Mapping[str, Any]]
    sources: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        """Return the file that a folder of shards keeps."""
        stated = {"format": _FORMAT, LEFT_OUT: list(self.rows)}
        return (json.dumps(stated, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class RowRules:
    """Which rows of a list are meant: so many of each end, or those beyond a number of bits per byte."""

    strangest: int | None = None
    above: float | None = None
    boring: int | None = None
    below: float | None = None

    def __bool__(self) -> bool:
        """Whether any rule is given."""
        return any(each is not None for each in (self.strangest, self.above, self.boring, self.below))


def is_hash(word: str) -> bool:
    """Return whether a word is the hash of a document."""
    return _HASH.fullmatch(word.lower()) is not None


def holds_list(file: Path) -> bool:
    """Return whether a file is a list such as folders of shards keep."""
    try:
        return file.is_file() and read_object(file, _MOST_BYTES).keys() >= {"format", LEFT_OUT}
    except (OSError, JsonError):
        return False


def read_excluded(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the documents that were left out of a folder of shards before; empty where none were."""
    sources = read_json(folder / INDEX).get("sources")
    is_stated = isinstance(sources, dict) and bool(sources.get(LEFT_OUT))
    return list(read_list(folder / EXCLUDED)) if is_stated and (folder / EXCLUDED).is_file() else []


def read_list(file: Path) -> Iterator[dict[str, Any]]:
    """Yield what is kept of each row of a list, with its `hash`; raises DataError where a file is none."""
    if not file.is_file():
        raise DataError(f"{file} is {'a folder' if file.is_dir() else 'missing'}.", "A list is a file.", _FIX)
    if file.name.endswith(".json"):
        try:
            rows = read_object(file, _MOST_BYTES)[LEFT_OUT]
        except (JsonError, KeyError) as error:
            raise DataError(f"{file} is no list of documents.", f"It has no {LEFT_OUT!r}: {error}.", _FIX) from error
        for number, row in enumerate(rows if isinstance(rows, list) else []):
            yield _check(f"{file}, row {number}", row)
        return
    is_empty = True
    with open_table(file) as stream:
        lines = LineReader(file, TextStream(".txt", stream, lambda: 0, False)).read()
        for number, (_, line) in enumerate(lines, 1):
            if _has_words(line):
                is_empty = False
                yield _read_line(f"{file}:{number}", line)
    if is_empty:
        raise DataError(f"{file} is empty.", "It names no document.", _FIX)


def read_reasons(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a list of which all are meant, each with `why`, by default that it is in the list."""
    for row in read_list(file):
        yield row | {WHY: row.get(WHY) or f"in {file.name}"}


def _has_words(line: object) -> bool:
    return not isinstance(line, str) or not line.isspace()


def _read_line(where: str, line: object) -> dict[str, Any]:
    if not isinstance(line, str):
        raise DataError(f"{where} is not text.", "", _FIX)
    word = line.strip("\ufeff \t\r\n")
    if not word.startswith("{"):
        return _check(where, {HASH: word})
    try:
        return _check(where, json.loads(word))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON.", f"{error}.", _FIX) from error


def _check(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get(HASH), str) or not is_hash(row[HASH]):
        raise DataError(f"{where} names no document.", "A hash of a document has 64 digits from 0 to f.", _FIX)
    kept = {key: row[key] for key in (*_KEPT, WHY) if row.get(key) is not None}
    if isinstance(kept.get(FILE), str):
        kept[FILE] = sys.intern(kept[FILE])  # many rows name the same one
    return {HASH: row[HASH].lower()} | kept


def choose(file: Path, rows: Iterable[dict[str, Any]], rules: RowRules) -> dict[str, dict[str, Any]]:
    """Return the rows that are meant, by hash, each with `why`; raises DataError where a row has no bits per byte.

    A text that has several copies counts once.  Of the rows, those that are meant are kept in memory.
    """
    strangest, boring = _End(rules.strangest or 0, 1), _End(rules.boring or 0, -1)
    above: dict[str, dict[str, Any]] = {}
    below: dict[str, dict[str, Any]] = {}
    count, low, high = 0, math.inf, -math.inf
    for count, row in enumerate(rows, 1):
        bits = row.get(BITS_PER_BYTE)
        if not isinstance(bits, int | float) or isinstance(bits, bool) or not math.isfinite(bits):
            what = f"Row {count:,} of {file} has no bits per byte."
            raise DataError(what, "The strangest documents are chosen by them.", "Name a list of `lowvram data look`.")
        low, high = min(low, bits), max(high, bits)
        strangest.add(row, count)
        boring.add(row, count)
        if rules.above is not None and bits > rules.above:
            above.setdefault(row[HASH], row)
        if rules.below is not None and bits < rules.below:
            below.setdefault(row[HASH], row)
    meant = (
        (strangest.rows, f"one of the {rules.strangest} strangest"),
        (above, f"above {rules.above or 0:g} bits per byte"),
        (boring.rows, f"one of the {rules.boring} most boring"),
        (below, f"below {rules.below or 0:g} bits per byte"),
    )
    found: dict[str, dict[str, Any]] = {}
    for some, why in meant:
        for name, row in sorted(some.items(), key=lambda pair: -pair[1][BITS_PER_BYTE]):
            found.setdefault(name, row | {WHY: f"{why} of {file.name}"})
    if not found:
        why = f"{count_of(count, 'document')} there have {low:.3f} to {high:.3f} bits per byte." if count else ""
        raise DataError(f"No document of {file} is meant.", why, "Give another limit.")
    return found


class _End:
    """Keeps so many rows of one end of a list while it is read, each text once.  sign: 1 strangest, -1 most boring."""

    def __init__(self, most: int, sign: int) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self._most, self._sign = most, sign
        # The least of the kept rows comes first; where a text has a better copy, that of the other is out of date.
        self._heap: list[tuple[float, int, str]] = []
        self._ranks: dict[str, tuple[float, int]] = {}

    def add(self, row: dict[str, Any], number: int) -> None:
        """Keep a row if it belongs to the end; of equal ones the outer in the list, which is sorted, comes first."""
        name, rank = row[HASH], (self._sign * row[BITS_PER_BYTE], -self._sign * number)
        before = self._ranks.get(name)
        is_full = before is None and len(self.rows) == self._most
        if (before is not None and rank <= before) or (is_full and (not self._heap or rank < self._heap[0][:2])):
            return
        self.rows[name], self._ranks[name] = row, rank
        heapq.heappush(self._heap, (*rank, name))
        if is_full:
            self._drop(self._heap[0][2])
        while self._ranks.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)

    def _drop(self, name: str) -> None:
        del self.rows[name], self._ranks[name]


class Exclusion:
    """Leaves documents out while text is packed, and notes them.  listed: rows by hash."""

    def __init__(self, listed: Mapping[str, Mapping[str, Any]]) -> None:
        self.listed = listed
        self.rows: list[dict[str, Any]] = []
        self._seen: set[str] = set()

    def leaves_out(self, text: str, file: Path | str, line: int) -> bool:
        """Return whether a document is left out.  file, line: where it stands."""
        name = hash_document(text)
        row = self.listed.get(name)
        if row is None:
            return False
        self._seen.add(name)
        self.rows.append(keep_row({HASH: name} | dict(row), file=str(file), line=line, why=row.get(WHY)))
        return True

    @property
    def missing(self) -> int:
        """How many of the listed texts did not occur."""
        return len(self.listed) - len(self._seen)


def hash_document(text: str) -> str:
    """Return the hash by which a document is named: SHA-256 of its text in NFC and UTF-8, in hexadecimal."""
    return hashlib.sha256(nfc(text).encode("utf-8")).hexdigest()


def keep_row(row: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return what is kept of a row for the list in a folder of shards."""
    kept = {key: row[key] for key in _KEPT if row.get(key) is not None}
    return {HASH: row[HASH]} | kept | {key: value for key, value in more.items() if value is not None}
