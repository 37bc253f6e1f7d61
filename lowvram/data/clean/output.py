"""Writes cleaned documents to one .jsonl for each file that was read; knows no rule."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from lowvram.data.clean.duplicates import Found, left_documents
from lowvram.data.clean.part import Part, read_row, replace_text
from lowvram.data.clean.work_folder import WorkFolder
from lowvram.data.text_files import DATASET, STANDARD_INPUT, is_dataset, is_stream
from lowvram.errors import DataError
from lowvram.storage.disk import Disk, explain_full_disk

_PACKINGS = (".gz", ".zst")
ENDING = ".jsonl"


def name_outputs(files: Sequence[Path]) -> list[Path]:
    """Return for each file the relative name of its output; folders below the common one stay as they are."""
    parents = [os.path.abspath(file.parent) for file in files if not _is_nameless(file)]
    try:
        home = Path(os.path.commonpath(parents)) if parents else Path()
    except ValueError:  # other drives of Windows
        home = Path(Path(parents[0]).anchor)
    short = [_relative(file, home, is_whole=False) for file in files]
    counts = Counter(short)
    named = [
        name if counts[name] == 1 else _relative(file, home, is_whole=True)
        for file, name in zip(files, short, strict=True)
    ]
    seen: Counter[Path] = Counter()
    for index, name in enumerate(named):
        seen[name] += 1
        if seen[name] > 1:
            named[index] = name.with_name(f"{name.name.removesuffix(ENDING)}-{seen[name]}{ENDING}")
    return named


def _is_nameless(file: Path) -> bool:
    return file == STANDARD_INPUT or is_stream(file)


def _relative(file: Path, home: Path, is_whole: bool) -> Path:
    if is_dataset(file):
        return Path(f"{re.sub('[^0-9A-Za-z@._]+', '-', str(file).removeprefix(DATASET)).strip('-')}{ENDING}")
    if _is_nameless(file):
        return Path(f"{'stdin' if file == STANDARD_INPUT else file.name}{ENDING}")
    absolute = Path(os.path.abspath(file))
    name = absolute.name
    for packing in () if is_whole else _PACKINGS:
        if name.lower().endswith(packing):
            name = name[: -len(packing)]
    stem = name if is_whole else Path(name).stem
    inside = absolute.parent.relative_to(home) if home in [absolute.parent, *absolute.parent.parents] else Path()
    return inside / f"{stem}{ENDING}"


@dataclass
class Written:
    """How much was written of one file."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0


class Output:
    """The files of the result, written in the order of the parts; a file that is finished is not written again."""

    def __init__(self, folder: WorkFolder, outputs: Sequence[Path], disk: Disk) -> None:
        self._folder, self._outputs, self._disk = folder, outputs, disk
        self.written: list[Written] = []
        self.removed, self.changed, self.characters = Counter[str](), Counter[str](), Counter[str]()
        self.lines = 0
        self._text_hash = ""

    def refuse_others(self) -> None:
        """Raise DataError where a file that is not ours has the name of an output, or of the report."""
        fix = "Name a folder of its own as `out`, or move that file."
        for number, name in enumerate(self._outputs):
            path = self._folder.out / name
            if path.exists() and not self._is_done(number):
                raise DataError(f"{path} is in the way.", "A cleaned text would get that name.", fix)
        if foreign := self._folder.find_foreign_report():
            raise DataError(f"{foreign} is in the way.", "The report of the cleaning would get that name.", fix)

    def _mark(self, number: int) -> Path:
        return self._folder.work / f"written-{number:05d}.json"

    def _is_done(self, number: int) -> bool:
        # The mark is written before the file gets its name, so that no file is ever without.
        return self._mark(number).is_file()

    def _read_done(self, number: int) -> Written | None:
        stated = self._folder.read(self._mark(number))
        stated.pop("output", None)
        is_same = stated.pop("text", "") == self._text_hash
        path = self._folder.out / self._outputs[number]
        if not is_same or stated.keys() != Written().__dict__.keys():
            return None
        is_there = path.is_file() and path.stat().st_size == stated["bytes"]
        return Written(**stated) if is_there else None

    def write(self, parts: Sequence[Part], found: Found, text_hash: str) -> Iterator[int]:
        """Write all files, and yield after each part how many are done.  text_hash: of all text that was read."""
        self._text_hash = text_hash
        current, done, handle = -1, Written(), None
        temporary = self._folder.work / "output.0.tmp"
        is_skipped = False
        with explain_full_disk(self._folder.out):
            try:
                for count, part in enumerate(parts, 1):
                    files = part.read("files").tolist()
                    for place, row in enumerate(_rows(part, found)):
                        if row.rule:
                            self._count(row)
                        if files[place] != current:
                            self._finish(current, done, handle, temporary, is_skipped)
                            self._pass_over(current + 1, files[place])
                            current = files[place]
                            before = self._read_done(current)
                            is_skipped, done = before is not None, before or Written()
                            handle = None if is_skipped else open(temporary, "wb")  # noqa: SIM115 (open across parts)
                        if row.data and not is_skipped and handle is not None:
                            self._write_row(handle, done, row)
                    yield count
                self._finish(current, done, handle, temporary, is_skipped)
                self._pass_over(current + 1, len(self._outputs))
            finally:
                if handle is not None:
                    handle.close()

    def _count(self, row: _Row) -> None:
        self.lines += row.lines
        self.characters[row.rule] += row.characters
        self.removed[row.rule] += not row.data
        self.changed[row.rule] += bool(row.data and row.lines)

    def _write_row(self, handle: IO[bytes], done: Written, row: _Row) -> None:
        done.documents += 1
        done.characters += row.length
        self._disk.write_handle(handle, row.data)

    def _pass_over(self, start: int, stop: int) -> None:
        """Note files of which no document reached the parts, and delete what an earlier start wrote of them."""
        for number in range(start, stop):
            self._forget(number)
            self.written.append(Written())

    def _forget(self, number: int) -> None:
        """Delete an output of an earlier start, whose text was another; what is not ours was refused before."""
        if self._is_done(number):
            (self._folder.out / self._outputs[number]).unlink(missing_ok=True)
            self._mark(number).unlink()

    def _finish(self, number: int, done: Written, handle: IO[bytes] | None, temporary: Path, is_skipped: bool) -> None:
        if number < 0:
            return
        self.written.append(done)
        if is_skipped or handle is None:
            return
        done.bytes = handle.tell()
        self._disk.sync_handle(handle)
        handle.close()
        if not done.documents:
            self._forget(number)
            temporary.unlink()
            return
        name = self._outputs[number].as_posix()
        self._folder.write(self._mark(number), done.__dict__ | {"output": name, "text": self._text_hash})
        path = self._folder.out / self._outputs[number]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._disk.rename(temporary, path)


class _Row(NamedTuple):
    """A document as it is written: nothing if it is left out.  length: of its text, in characters.

    rule: what took `lines` lines, or all of it, `characters` in all.
    """

    data: bytes
    length: int
    rule: str = ""
    lines: int = 0
    characters: int = 0


def _rows(part: Part, found: Found) -> Iterator[_Row]:
    """Yield each document of a part."""
    is_copy = (found.documents.read(part.first_document, part.documents) != 0).tolist()
    left = left_documents(part, found).tolist()
    lengths = part.read("lengths").tolist()
    dropped = np.flatnonzero(found.lines.read(part.first_line, part.lines))
    by_document: dict[int, set[int]] = {}
    owners, lines = part.read("line_documents")[dropped].tolist(), part.read("line_numbers")[dropped].tolist()
    for owner, line in zip(owners, lines, strict=True):
        by_document.setdefault(owner, set()).add(line)
    for place, data in enumerate(part.rows()):
        out = by_document.get(place)
        if not left[place]:
            rule = "duplicate_documents" if is_copy[place] else "near_duplicates"
            yield _Row(b"", 0, rule, 0, lengths[place])
        elif not out:
            yield _Row(data, lengths[place])
        else:
            _, text = read_row(data)
            kept = "\n".join(line for number, line in enumerate(text.split("\n")) if number not in out).strip("\n")
            kept = "" if kept.isspace() else kept
            after = replace_text(data, kept) if kept else b""
            yield _Row(after, len(kept), "duplicate_lines", len(out), len(text) - len(kept))
