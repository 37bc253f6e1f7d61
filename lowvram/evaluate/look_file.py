"""A file of JSON lines with a score for each document, strangest first; an unfinished one is gone on with.

While documents are scored, their rows are added to FILE.KEY.unfinished, and each piece of them ends with a line that
says so: what stands behind the last of these is dropped when the work goes on.  Other work has another key, which the
first row of a finished list states, too.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from lowvram.data.exclusion_list import BITS_PER_BYTE, BYTES, DOCUMENT, EXCERPT, FILE, HASH, LINE, SHARD, TOKENS
from lowvram.errors import BusyError, DataError
from lowvram.evaluate.document_score import DocumentScore
from lowvram.storage.disk import DISK, Disk, explain_full_disk
from lowvram.storage.folder_lock import locked_file

_UNFINISHED = "unfinished"
_KEY_LETTERS = 12
_MOST_LINE_BYTES = 1 << 16
_FOREIGN = "foreign"  # stands for a first line that is no row
# Only the first row of a list has it: the key of the work.
_LOOK = "look"
_PIECE_END = b'{"piece": "finished"}\n'


def describe_row(score: DocumentScore) -> dict[str, Any]:
    """Return the row of a document."""
    return {
        HASH: score.hash,
        BITS_PER_BYTE: score.bits_per_byte,
        BYTES: score.text_bytes,
        TOKENS: score.tokens,
        FILE: score.place.file if score.place else None,
        LINE: score.place.line if score.place else None,
        SHARD: score.shard,
        DOCUMENT: score.number,
        EXCERPT: score.excerpt,
    }


class LookFile:
    """The rows of all documents that were scored; use it as a context.

    key: tells the same work from another.  replace: whether the list of other work may be replaced.
    """

    def __init__(self, out: Path, key: str, disk: Disk = DISK, replace: bool = False) -> None:
        self._out, self._key, self._disk, self._replace = out, key, disk, replace
        self._claim = ExitStack()
        self._path = out.with_name(f"{out.name}.{key[:_KEY_LETTERS]}.{_UNFINISHED}")
        self._head = json.dumps({"key": key}).encode() + b"\n"
        self._file: IO[bytes] | None = None
        self._bits_per_byte, self._begins = array("d"), array("q")

    def __len__(self) -> int:
        """Return how many documents have a row."""
        return len(self._begins)

    def __enter__(self) -> LookFile:
        """Open the unfinished file of the same work, or begin one.

        Raises BusyError where another process writes this list, DataError where `out` is something else.
        """
        refuse_other_file(self._out)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        why, fix = "Another process is writing this list.", "Wait until it is done, or name another file as `out`."
        with ExitStack() as claim:
            claim.enter_context(locked_file(self._out, BusyError(f"{self._out} is in use.", why, fix)))
            if not self._replace:
                _refuse_other_work(self._out, self._key)
            is_same = self._path.is_file() and self._has_head()
            self._file = claim.enter_context(open(self._path, "r+b" if is_same else "w+b"))
            if not is_same:
                self._disk.write_handle(self._file, self._head)
            self._claim = claim.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file, and let other processes have the list."""
        self._claim.close()

    def _has_head(self) -> bool:
        with open(self._path, "rb") as file:
            return file.readline() == self._head

    def read_kept(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of whole pieces that are there already, and drop what stands behind them."""
        assert self._file is not None
        self._file.seek(len(self._head))
        end = len(self._head)
        piece: list[tuple[int, dict[str, Any]]] = []
        while line := self._file.readline():
            begin = self._file.tell() - len(line)
            if line == _PIECE_END:
                end = self._file.tell()
                for place, row in piece:
                    self._note(row, place)
                    yield row
                piece = []
                continue
            try:
                piece.append((begin, json.loads(line)))
            except ValueError:  # cut short when the process or the machine went down
                break
        self._file.seek(end)
        self._file.truncate()

    def _note(self, row: dict[str, Any], begin: int) -> None:
        self._bits_per_byte.append(row[BITS_PER_BYTE])
        self._begins.append(begin)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a finished piece."""
        assert self._file is not None
        with explain_full_disk(self._out.parent):
            for row in rows:
                self._note(row, self._file.tell())
                self._disk.write_handle(self._file, _encode(row))
            self._disk.write_handle(self._file, _PIECE_END)
            self._disk.sync_handle(self._file)

    def finish(self) -> None:
        """Write the file itself, strangest documents first, and delete the unfinished ones, also of other work."""
        temporary = self._out.with_name(f"{self._out.name}.tmp")
        with explain_full_disk(self._out.parent):
            try:
                with open(temporary, "wb") as target:
                    for number, line in enumerate(self._lines(self._order())):
                        first = line if number else _encode(json.loads(line) | {_LOOK: self._key})
                        self._disk.write_handle(target, first)
                    self._disk.sync_handle(target)
                self._disk.rename(temporary, self._out)
            finally:
                temporary.unlink(missing_ok=True)
        assert self._file is not None
        self._file.close()
        for path in self._out.parent.iterdir():
            if self._is_unfinished(path.name):
                self._disk.delete(path)

    def _is_unfinished(self, name: str) -> bool:
        before, _, key = name.removesuffix(f".{_UNFINISHED}").rpartition(".")
        return name.endswith(f".{_UNFINISHED}") and before == self._out.name and 0 < len(key) <= _KEY_LETTERS

    def _order(self) -> np.ndarray:
        return np.argsort(-np.frombuffer(self._bits_per_byte, np.float64), kind="stable")

    def _lines(self, order: np.ndarray) -> Iterator[bytes]:
        assert self._file is not None
        for place in order.tolist():
            self._file.seek(self._begins[place])
            yield self._file.readline()

    def extremes(self, most: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the rows of the strangest and of the most boring documents, each text once; none is in both."""
        order = self._order()
        half = (len(order) + 1) // 2
        strangest = _take(self._lines(order[:half]), most)
        boring = _take(self._lines(order[half:][::-1]), most)
        return strangest, boring


def _take(lines: Iterator[bytes], most: int) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        found.setdefault(row[HASH], row)
        if len(found) == most:
            break
    return list(found.values())


def _encode(row: dict[str, Any]) -> bytes:
    # The name of a file may have bytes that are not UTF-8, which Python keeps as lone surrogates.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _refuse_other_work(out: Path, key: str) -> None:
    """Raise DataError where a list of another model, of other shards or by other options would be replaced."""
    row = _read_first(out)
    if row and row.get(_LOOK) != key:
        what = f"{out} is a list of another look: of another model, of other shards, or by other options."
        fix = "Name another file as `out`, or add `replace=True`."
        raise DataError(what, "It would be replaced.", fix)


def _read_first(file: Path) -> dict[str, Any]:
    """Return the first row of a list, empty where there is none."""
    if not file.is_file():
        return {}
    with open(file, "rb") as stream:
        head = stream.readline(_MOST_LINE_BYTES)
    try:
        row = json.loads(head) if head else {}
    except ValueError:
        return {_FOREIGN: True}
    return row if isinstance(row, dict) else {_FOREIGN: True}


def refuse_other_file(out: Path) -> None:
    """Raise DataError where a file of this name exists that is no such list, or a folder."""
    fix = "Name another file as `out`."
    if out.is_dir():
        raise DataError(f"{out} is a folder.", "The list of documents needs a file.", fix)
    row = _read_first(out)
    if row and not row.keys() >= {HASH, BITS_PER_BYTE}:
        raise DataError(f"{out} is in the way.", "It is no list of scored documents, which would replace it.", fix)
