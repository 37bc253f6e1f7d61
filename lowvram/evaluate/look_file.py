"""A file of JSON lines with a score for each document, strangest first; an unfinished one is gone on with.

While documents are scored, their rows are added to FILE.KEY.unfinished, and each piece of them ends with a line that
says so: what stands behind the last of these is dropped when the work goes on.  Other work has another key.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from lowvram.data.exclusion_list import BITS_PER_BYTE, BYTES, DOCUMENT, EXCERPT, FILE, HASH, LINE, SHARD, TOKENS
from lowvram.errors import DataError
from lowvram.evaluate.document_score import DocumentScore
from lowvram.storage.disk import DISK, Disk, explain_full_disk
from lowvram.units import count_of

_UNFINISHED = "unfinished"
_KEY_LETTERS = 12
_BLOCK_BYTES = 1 << 20
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
    """The rows of all documents that were scored; use it as a context.  key: tells the same work from another."""

    def __init__(self, out: Path, key: str, disk: Disk = DISK) -> None:
        self._out, self._disk = out, disk
        self._path = out.with_name(f"{out.name}.{key[:_KEY_LETTERS]}.{_UNFINISHED}")
        self._head = json.dumps({"key": key}).encode() + b"\n"
        self._file: IO[bytes] | None = None
        self._bits_per_byte, self._begins = array("d"), array("q")

    def __len__(self) -> int:
        """Return how many documents have a row."""
        return len(self._begins)

    def __enter__(self) -> LookFile:
        """Open the unfinished file of the same work, or begin one; raises DataError where `out` is something else."""
        refuse_other_file(self._out)
        self._out.parent.mkdir(parents=True, exist_ok=True)
        is_same = self._path.is_file() and self._has_head()
        self._file = open(self._path, "r+b" if is_same else "w+b")
        if not is_same:
            self._disk.write_handle(self._file, self._head)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

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
        """Write the file itself, strangest documents first, and delete the unfinished one."""
        temporary = self._out.with_name(f"{self._out.name}.tmp")
        with explain_full_disk(self._out.parent):
            try:
                with open(temporary, "wb") as target:
                    for line in self._lines(self._order()):
                        self._disk.write_handle(target, line)
                    self._disk.sync_handle(target)
                self._disk.rename(temporary, self._out)
            finally:
                temporary.unlink(missing_ok=True)
        assert self._file is not None
        self._file.close()
        self._disk.delete(self._path)

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


def refuse_longer_list(out: Path, documents: int) -> None:
    """Raise DataError where a list of more documents than so many, which took longer, would be replaced."""
    if not out.is_file():
        return
    with open(out, "rb") as file:
        rows = sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK_BYTES), b""))
    if rows > documents:
        what = f"{out} is a list of {count_of(rows, 'document')}."
        why = f"One of {count_of(documents, 'document')} would replace it."
        raise DataError(what, why, "Name another file as `out`, or delete that one.")


def refuse_other_file(out: Path) -> None:
    """Raise DataError where a file of this name exists that is no such list, or a folder."""
    fix = "Name another file as `out`."
    if out.is_dir():
        raise DataError(f"{out} is a folder.", "The list of documents needs a file.", fix)
    if not out.exists():
        return
    with open(out, "rb") as file:
        head = file.readline(1 << 16)
    try:
        row = json.loads(head) if head else {HASH: "", BITS_PER_BYTE: 0}
    except ValueError:
        row = None
    if not isinstance(row, dict) or not row.keys() >= {HASH, BITS_PER_BYTE}:
        raise DataError(f"{out} is in the way.", "It is no list of scored documents, which would replace it.", fix)
