"""Cleans texts from beginning to end: parts in several processes, duplicates, the result; prints nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowvram import __version__
from lowvram.config.cleaning import CleaningRules
from lowvram.data.bad_rows import BadRows
from lowvram.data.clean.contamination import build_index
from lowvram.data.clean.duplicates import Found, find_duplicates, open_flags
from lowvram.data.clean.examples import show_text
from lowvram.data.clean.language import check_languages
from lowvram.data.clean.output import Output, name_outputs
from lowvram.data.clean.part import Lists, Part, PartTask, clean_part, read_row
from lowvram.data.clean.report import Totals, describe_rules, find_eaters, write_page
from lowvram.data.clean.toxicity import read_words
from lowvram.data.clean.work_folder import FORMAT, WorkFolder, refuse_text_inside
from lowvram.data.places import Cursor, Place, name_from
from lowvram.data.text import documents, find_files
from lowvram.data.text_files import REPORT, is_stream, size_of
from lowvram.data.worker_pool import WorkerPool
from lowvram.errors import DataError, argument
from lowvram.storage.disk import DISK, Disk, explain_full_disk
from lowvram.units import count_of

PART_BYTES = 2 << 20


@dataclass(frozen=True)
class CleanProgress:
    """How far a cleaning is.

    stage: what it does now.  done, total: in bytes read, or as a share; total 0: unknown.  reused: documents of parts
    that an earlier start finished.
    """

    stage: str
    done: float
    total: float
    detail: str = ""
    reused: int = 0


COMPARING = "Comparing with the finished result"


@dataclass
class _Batch:
    """The documents of one part.  read_bytes: of all files up to its end, as stored on disk."""

    number: int
    texts: list[str] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    hash: str = ""
    read_bytes: int = 0


def clean_each_part(
    paths: Sequence[Path],
    out: Path,
    rules: CleaningRules,
    field: str = "text",
    processes: int | None = None,
    disk: Disk = DISK,
    *,
    replace: bool = False,
    bad_rows: BadRows | None = None,
    notes: Callable[[], Sequence[str]] = tuple,
    leave_out: Collection[Path] = (),
) -> Generator[CleanProgress, None, dict[str, Any]]:
    """Clean the documents of `paths` into `out`, yield how far it is, and return the report.

    A cleaning that was interrupted goes on where it stopped.  What is written depends on text and rules alone.
    processes: None for one per core; with more than one, a script must guard its entry with
    `if __name__ == "__main__"`.  replace: whether the result of other text or rules in `out` may be replaced.
    bad_rows: what is done with rows that are not text; None skips a few.  notes: sentences for the report, asked for
    when everything was read.  leave_out: files of `paths` that are not read; they keep their places, so that parts of
    the others that are finished are kept.
    Raises DataError (unreadable text, lists or evaluation sets, nothing left, files in the way), BusyError,
    DiskFullError, MachineError.
    """
    files = find_files(paths)
    refuse_text_inside(out, [path for path in (*paths, *files) if not is_stream(path)])
    if rules.language.on and rules.language.keep:
        check_languages(rules.language.keep)
    work = _Cleaning(files, out, rules, field, disk, bad_rows or BadRows("skip"), replace, leave_out)
    with work.folder.claim():
        return (yield from work.run(processes or os.cpu_count() or 1, notes))


class _Cleaning:
    """One cleaning and what it needs."""

    def __init__(
        self,
        files: Sequence[Path],
        out: Path,
        rules: CleaningRules,
        field: str,
        disk: Disk,
        bad_rows: BadRows,
        replace: bool,
        leave_out: Collection[Path],
    ) -> None:
        self.files, self.left_out, self.rules, self.field = files, leave_out, rules, field
        self.disk, self.bad_rows = disk, bad_rows
        self.toxic = tuple(read_words(rules.toxicity.words)) if rules.toxicity.on and rules.toxicity.words else ()
        against = [Path(name) for name in rules.contamination.against] if rules.contamination.on else []
        self.against = find_files(against) if against else []
        self.evaluation = build_index(rules.contamination, self.against) if self.against else None
        self.outputs = name_outputs(files)
        self.folder = WorkFolder(out, self._key(), disk, replace)
        self.output = Output(self.folder, self.outputs, disk)
        self.totals = Totals()
        self.parts: list[Part] = []
        self.input = hashlib.sha256()
        self.read_documents = Counter[int]()

    def _key(self) -> str:
        """Return a hash of everything but the text on which the result depends."""
        digest = hashlib.sha256()
        names = [name.as_posix() for name in self.outputs]
        table = self.rules.model_dump(mode="json")
        table["toxicity"]["words"] = table["contamination"]["against"] = None  # their contents count, not their names
        stated = [FORMAT, __version__, table, self.toxic, names, PART_BYTES]
        digest.update(json.dumps(stated, ensure_ascii=False).encode("utf-8"))
        for length, hashes in sorted(self.evaluation.hashes.items()) if self.evaluation else ():
            digest.update(length.to_bytes(4, "little") + hashes.tobytes())
        return digest.hexdigest()

    def run(self, processes: int, notes: Callable[[], Sequence[str]]) -> Generator[CleanProgress, None, dict[str, Any]]:
        """Do all of it, or find that it was done."""
        if finished := self.folder.finished:
            yield from self._compare(finished)
            return finished
        self.output.refuse_others()
        yield from self._clean(processes)
        if not self.parts:
            raise DataError("There is no text to clean.", "Every row was skipped.", "Name files that hold text.")
        found = open_flags(self.parts, self.folder.work / "flags")
        try:
            yield from self._find_duplicates(found)
            yield from self._write(found)
            report = self._report(found, notes())
        finally:
            found.close()
        self.folder.write_report(report, write_page(report))
        return report

    def _batches(self) -> Generator[_Batch, None, None]:
        """Yield the documents in parts of about the same size, whose ends depend on the text alone."""
        batch, size, before, inside = _Batch(0), 0, 0, 0
        digest, cursor = hashlib.sha256(), Cursor()

        def tell(read_bytes: int) -> None:
            nonlocal inside
            inside = read_bytes

        def close() -> _Batch:
            batch.hash, batch.read_bytes = digest.hexdigest(), before + inside
            self.input.update(digest.digest())
            return batch

        for index, file in enumerate(self.files):
            folder = (self.folder.out / self.outputs[index]).parent
            name = name_from(file, folder)
            texts = () if file in self.left_out else documents(file, self.field, tell, self.bad_rows, cursor)
            for number, text in enumerate(texts, 1):
                data = text.encode("utf-8")
                place = _place_of(cursor, name, folder)
                where = place.file.encode("utf-8", "surrogatepass")
                digest.update(f"{index} {number} {place.line} {len(where)} {len(data)} ".encode())
                digest.update(where)
                digest.update(data)
                batch.texts.append(text)
                batch.files.append(index)
                batch.numbers.append(number)
                batch.places.append(place)
                size += len(data)
                self.read_documents[index] += 1
                if size >= PART_BYTES:
                    yield close()
                    batch, size, digest = _Batch(batch.number + 1), 0, hashlib.sha256()
            before, inside = before + size_of(file), 0
        self.bad_rows.finish()
        if batch.texts:
            yield close()

    def _compare(self, finished: dict[str, Any]) -> Iterator[CleanProgress]:
        """Read all text again, and raise DataError where it is not the text of a finished result."""
        total = sum(map(size_of, self.files))
        for batch in self._batches():
            yield CleanProgress(COMPARING, batch.read_bytes, total)
        is_whole = all(
            (self.folder.out / row["output"]).is_file()
            and (self.folder.out / row["output"]).stat().st_size == row["bytes"]
            for row in finished["files"]
            if row["output"]
        )
        if self.input.hexdigest() != finished["input"] or not is_whole:
            what = f"{self.folder.out} holds " + ("another cleaned text." if is_whole else "a result that was changed.")
            fix = "Name another `out`, or add `replace=True` to put this text in its place."
            raise DataError(what, f"{REPORT} there says so.", fix)

    def _clean(self, processes: int) -> Iterator[CleanProgress]:
        total = sum(map(size_of, self.files))
        lists = Lists(self.toxic, self._store_evaluation())
        running: deque[tuple[_Batch, dict[str, Any] | None, Callable[[], tuple[Path, dict[str, Any]]] | None]] = deque()
        kept = reused = 0

        def finish() -> CleanProgress:
            # Only this process, which holds the lock, renames parts; a worker that outlives it must not.
            nonlocal kept, reused
            batch, sidecar, cleaned = running.popleft()
            if cleaned is not None:
                beside, sidecar = cleaned()
                sidecar["text"] = batch.hash
                self.folder.add(batch.number, sidecar, beside)
            assert sidecar is not None
            reused += 0 if cleaned else sidecar["documents"]
            self.totals.add(sidecar)
            last = self.parts[-1] if self.parts else None
            self.parts.append(Part(self.folder.path(batch.number), {"arrays": sidecar["arrays"]}, last))
            kept += self.parts[-1].documents
            detail = f"{kept:,} of {count_of(self.totals.documents, 'document')} kept"
            return CleanProgress("Cleaning", batch.read_bytes, total, detail, reused)

        fix = "Clean again with fewer `processes`; what is finished is kept."
        pool = WorkerPool(self._count_processes(processes), clean_part, "cleaning", fix)
        with pool, closing(self._batches()) as batches:
            for batch in batches:
                sidecar = self.folder.find_done(batch.number, batch.hash)
                if sidecar is None:
                    target = self.folder.path(batch.number)
                    given = (batch.texts, batch.files, batch.numbers, batch.places)
                    task = PartTask(*given, self.rules, lists, target, self.disk)
                    running.append((batch, None, pool.submit(task)))
                else:
                    running.append((batch, sidecar, None))
                batch.texts, batch.files, batch.numbers, batch.places = [], [], [], []
                while len(running) >= pool.most_waiting:
                    yield finish()
            while running:
                yield finish()

    def _count_processes(self, asked: int) -> int:
        """Return how many processes pay: they take a second to start, so a small text is cleaned in this one."""
        is_small = not any(map(is_stream, self.files)) and sum(map(size_of, self.files)) < PART_BYTES
        return 1 if is_small else asked

    def _store_evaluation(self) -> tuple[tuple[int, Path], ...]:
        """Write the hashes of evaluation sets to files, which the processes read."""
        stored = []
        for length, hashes in sorted(self.evaluation.hashes.items()) if self.evaluation else ():
            path = self.folder.work / f"evaluation-{length}.hashes"
            self.disk.write(path, hashes.tobytes())
            stored.append((length, path))
        return tuple(stored)

    def _find_duplicates(self, found: Found) -> Iterator[CleanProgress]:
        pairs = self.folder.work / "pairs"
        if pairs.exists():
            self.disk.remove_tree(pairs)
        with explain_full_disk(self.folder.out):
            for share in find_duplicates(self.parts, pairs, self.rules, found):
                yield CleanProgress("Finding duplicates", share, 1.0)

    def _write(self, found: Found) -> Iterator[CleanProgress]:
        for done in self.output.write(self.parts, found, self.input.hexdigest()):
            yield CleanProgress("Writing", done, len(self.parts))
        totals, output = self.totals, self.output
        for name in ("duplicate_documents", "near_duplicates", "duplicate_lines"):
            totals.removed[name] += output.removed[name]
            totals.changed[name] += output.changed[name]
            totals.characters_removed[name] += output.characters[name]
        totals.parts["duplicate_lines"] += output.lines
        if not any(written.documents for written in output.written):
            self.folder.forget()
            eaters = find_eaters(totals)
            what = f"Nothing is left of {count_of(totals.documents, 'document')}."
            why = f"Documents were removed by: {', '.join(f'{rule} {count:,}' for rule, count in eaters)}."
            off = argument("overrides", [f"{eaters[0][0]}.on=false"])
            fix = f"Loosen these rules, or switch them off, as in {off}."
            raise DataError(what, why, fix)

    def _report(self, found: Found, notes: Sequence[str]) -> dict[str, Any]:
        for rule, pairs in found.examples.items():
            self.totals.examples[rule] = [self._show_pair(rule, *pair) for pair in pairs]
        rows = describe_rules(self.totals, self.rules)
        for row in rows:
            for example in row["examples"]:
                for shown in (example, example.get("like", {})):
                    if isinstance(shown.get("file"), int):
                        shown["file"] = self.files[shown["file"]].as_posix()
        rows_of_files = zip(self.files, self.outputs, self.output.written, strict=True)
        files = [
            {
                "file": file.as_posix(),
                "output": name.as_posix() if written.documents else None,
                "left_out": file in self.left_out,
                "documents_read": self.read_documents[index],
                "documents": written.documents,
                "characters": written.characters,
                "bytes": written.bytes,
            }
            for index, (file, name, written) in enumerate(rows_of_files)
        ]
        return {
            "format": FORMAT,
            "lowvram": __version__,
            "key": self.folder.key,
            "input": self.input.hexdigest(),
            "documents_read": self.totals.documents,
            "characters_read": self.totals.characters,
            "documents": sum(written.documents for written in self.output.written),
            "characters": sum(written.characters for written in self.output.written),
            "bytes": sum(written.bytes for written in self.output.written),
            "bad_rows": dict(self.bad_rows.kinds),
            "evaluation_sets": [file.as_posix() for file in self.against],
            "notes": list(notes),
            "rules": rows,
            "files": files,
        }

    def _show_pair(self, rule: str, document: int, original: int, similar: float) -> dict[str, Any]:
        shown = self._show(document)
        why = f"similarity {similar:.2f}" if rule == "near_duplicates" else ""
        return {"rule": rule, **shown, "like": self._show(original)} | ({"why": why} if why else {})

    def _show(self, document: int) -> dict[str, Any]:
        part = next(part for part in reversed(self.parts) if part.first_document <= document)
        place = document - part.first_document
        number, text = read_row(part.rows()[place])
        return {"file": int(part.read("files")[place]), "document": number, "before": show_text(text)}


def _place_of(cursor: Cursor, name: str, folder: Path) -> Place:
    """Return a document's place: where it was cleaned from before, or its line in the file of this name."""
    origin = cursor.origin
    return Place(name, cursor.line) if origin is None else Place(name_from(origin.file, folder), origin.line)
