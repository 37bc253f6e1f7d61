"""Lists of documents to leave out, by hash: how they are read and chosen from, and what shards keep of them.

A list is `look.jsonl`, with a row for each document; the `excluded.json` of a folder of shards; or a hash in each line.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
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
# Of a row these are kept for people; `why` says by which rule the document was chosen.
_KEPT = ("bits_per_byte", "bytes", "file", "line")
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
class Choice:
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


def read_list(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a list, each with its `hash`; raises DataError where a file is none."""
    if not file.is_file():
        raise DataError(f"{file} is {'a folder' if file.is_dir() else 'missing'}.", "A list is a file.", _FIX)
    if file.name.endswith(".json"):
        try:
            rows = read_object(file, _MOST_BYTES)[LEFT_OUT]
        except (JsonError, KeyError) as error:
            raise DataError(f"{file} is no list of documents.", f"It has no {LEFT_OUT!r}: {error}.", _FIX) from error
        rows = rows if isinstance(rows, list) else []
        return [_check(f"{file}, row {number}", row) for number, row in enumerate(rows)]
    with open_table(file) as stream:
        lines = LineReader(file, TextStream(".txt", stream, lambda: 0, False)).read()
        found = [_read_line(f"{file}:{number}", line) for number, (_, line) in enumerate(lines, 1) if _has_words(line)]
    if not found:
        raise DataError(f"{file} is empty.", "It names no document.", _FIX)
    return found


def _has_words(line: object) -> bool:
    return not isinstance(line, str) or not line.isspace()


def _read_line(where: str, line: object) -> dict[str, Any]:
    if not isinstance(line, str):
        raise DataError(f"{where} is not text.", "", _FIX)
    word = line.strip("\ufeff \t\r\n")
    if not word.startswith("{"):
        return _check(where, {"hash": word})
    try:
        return _check(where, json.loads(word))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON.", f"{error}.", _FIX) from error


def _check(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("hash"), str) or not is_hash(row["hash"]):
        raise DataError(f"{where} names no document.", "A hash of a document has 64 digits from 0 to f.", _FIX)
    return row | {"hash": row["hash"].lower()}


def choose(file: Path, rows: Sequence[dict[str, Any]], choice: Choice) -> dict[str, dict[str, Any]]:
    """Return the rows that are meant, by hash, each with `why`; raises DataError where a row has no bits per byte.

    A text that has several copies counts once.
    """
    for number, row in enumerate(rows, 1):
        value = row.get("bits_per_byte")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            what = f"Row {number:,} of {file} has no bits per byte."
            raise DataError(what, "The strangest documents are chosen by them.", "Name a list of `lowvram data look`.")
    ordered = sorted(rows, key=lambda row: -row["bits_per_byte"])
    by_hash = {row["hash"]: row for row in reversed(ordered)}
    distinct = sorted(by_hash.values(), key=lambda row: -row["bits_per_byte"])
    found: dict[str, dict[str, Any]] = {}

    def add(some: Iterable[dict[str, Any]], why: str) -> None:
        for row in some:
            found.setdefault(row["hash"], row | {"why": f"{why} of {file.name}"})

    if choice.strangest is not None:
        add(distinct[: choice.strangest], f"one of the {choice.strangest} strangest")
    if choice.above is not None:
        add((row for row in distinct if row["bits_per_byte"] > choice.above), f"above {choice.above:g} bits per byte")
    if choice.boring is not None:
        add(distinct[::-1][: choice.boring], f"one of the {choice.boring} most boring")
    if choice.below is not None:
        add((row for row in distinct if row["bits_per_byte"] < choice.below), f"below {choice.below:g} bits per byte")
    if not found:
        low, high = distinct[-1]["bits_per_byte"], distinct[0]["bits_per_byte"]
        what = f"No document of {file} is meant."
        why = f"{count_of(len(distinct), 'document')} there have {low:.3f} to {high:.3f} bits per byte."
        raise DataError(what, why, "Give another limit.")
    return found


class Exclusion:
    """Leaves documents out while text is packed, and notes them.  listed: rows by hash."""

    def __init__(self, listed: Mapping[str, Mapping[str, Any]]) -> None:
        self.listed = listed
        self.rows: list[dict[str, Any]] = []
        self._seen: set[str] = set()

    def takes(self, text: str, file: Path | str, line: int) -> bool:
        """Return whether a document is left out.  file, line: where it stands."""
        name = hash_document(text)
        row = self.listed.get(name)
        if row is None:
            return False
        self._seen.add(name)
        self.rows.append(keep_row({"hash": name} | dict(row), file=str(file), line=line, why=row.get("why")))
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
    return {"hash": row["hash"]} | kept | {key: value for key, value in more.items() if value is not None}
