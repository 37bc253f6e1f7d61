"""Where documents come from: noted while they are read, and kept in a file beside their shard; knows no tokens.

Such a file is JSON.  It has a run for documents of one file that follow each other: the file's name, relative to the
folder of the shards so that both can move together, the first document's line, and from each line the step to the next.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lowvram.data.text_files import STANDARD_INPUT, is_dataset, is_stream, name_unpacked
from lowvram.storage.json_files import JsonError, parse_object

FORMAT = 1
# The field of a cleaned row that holds where its document stood before.
ORIGIN = "origin"
_ROWS = (".parquet",)
_WHOLE = (".pdf", ".docx")


class Place(NamedTuple):
    """A document's file and its first line there, from 1 on; of Parquet and of data sets its row, from 0 on."""

    file: str
    line: int

    def __str__(self) -> str:
        """Return the place as error messages have it: `a.txt:7`, `a.parquet, row 7`, `a.pdf`."""
        return self.file + self.within_file

    @property
    def within_file(self) -> str:
        """What follows the file's name: `:7`, `, row 7`, or nothing."""
        name = name_unpacked(Path(self.file))
        if name.endswith(_WHOLE):
            return ""
        return f", row {self.line}" if name.endswith(_ROWS) or is_dataset(Path(self.file)) else f":{self.line}"


class Cursor:
    """The place of the document that a reader has yielded last.

    line: as in a `Place`.  origin: where the document was cleaned from, None where nothing says that it was.
    """

    __slots__ = ("line", "origin")

    def __init__(self) -> None:
        self.line = 1
        self.origin: Place | None = None

    def reset(self) -> None:
        """Forget the place; a new file begins."""
        self.line, self.origin = 1, None


def read_origin(file: Path, record: Mapping[str, Any]) -> Place | None:
    """Return where a cleaned row says that its document stood, None where it does not.  file: which holds the row."""
    origin = record.get(ORIGIN)
    if not isinstance(origin, dict):
        return None
    name, line = origin.get("file"), origin.get("line")
    if not isinstance(name, str) or not isinstance(line, int) or isinstance(line, bool) or line < 0:
        return None
    return Place(locate(name, str(file.parent)), line)


def name_from(file: Path | str, folder: Path) -> str:
    """Return a file's name relative to a folder, with `/`; a stream, a data set or another drive keep their name."""
    path = Path(file)
    if path == STANDARD_INPUT or is_dataset(path) or is_stream(path):
        return path.as_posix()
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive of Windows
        return Path(os.path.abspath(path)).as_posix()


def locate(name: str, folder: str) -> str:
    """Return the path of a file by its name relative to a folder: below the working directory a relative one."""
    return _locate(name, folder, os.getcwd())


@functools.lru_cache(256)
def _locate(name: str, folder: str, here: str) -> str:
    path = Path(name)
    if path == STANDARD_INPUT or is_dataset(path):
        return name
    absolute = Path(os.path.normpath(os.path.join(here, folder, path)))
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


class PlaceList:
    """The places of a shard's documents, in their order.  folder: of the shards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clear()

    def _clear(self) -> None:
        self._documents, self._line = 0, 0
        self._file: Path | str | None = None
        self._runs: list[dict[str, Any]] = []
        self._steps: list[int] = []

    def add(self, file: Path | str, line: int) -> None:
        """Add the place of the next document."""
        self._documents += 1
        if file is not self._file and file != self._file:
            self._steps = []
            self._runs.append({"file": name_from(file, self._folder), "line": line, "steps": self._steps})
        else:
            self._steps.append(line - self._line)
        self._file, self._line = file, line

    def take(self) -> bytes:
        """Return the contents of the file of places, and begin anew."""
        stated = {"format": FORMAT, "documents": self._documents, "runs": self._runs}
        self._clear()
        return (json.dumps(stated, separators=(",", ":")) + "\n").encode("utf-8")


def read_places(data: bytes, folder: Path, documents: int) -> list[Place] | None:
    """Return the places that `PlaceList.take` wrote; None where these are not the places of so many documents."""
    try:
        stated = parse_object(data)
        places: list[Place] = []
        for run in stated["runs"] if stated["format"] == FORMAT else ():
            file, line = locate(str(run["file"]), str(folder)), int(run["line"])
            places.append(Place(file, line))
            for step in run["steps"]:
                line += int(step)
                places.append(Place(file, line))
    except (JsonError, KeyError, TypeError, ValueError):
        return None
    return places if len(places) == documents else None
