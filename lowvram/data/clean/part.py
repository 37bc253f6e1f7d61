"""Cleans the documents of one part and keeps the result as arrays in a file; knows no other part.

A part is some megabytes of documents.  Its file holds what is left of their text and what finding duplicates needs: a
hash of each document and line, and signatures.  A sidecar in JSON has where each array lies, and the counts.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import threading
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowvram.config.cleaning import CleaningRules
from lowvram.data.clean.contamination import EvaluationIndex
from lowvram.data.clean.document_rules import Change, DocumentRules, Outcome
from lowvram.data.clean.examples import show_change
from lowvram.data.clean.signature import FUNCTIONS, sign
from lowvram.data.clean.toxicity import ToxicWords
from lowvram.data.places import ORIGIN, Place
from lowvram.storage.disk import Disk, explain_full_disk

# So many characters are arrays at once: they stay in a processor's cache, and in tens of megabytes.
_BATCH_CHARACTERS = 1 << 17
_EXAMPLES = 3
ARRAYS: dict[str, tuple[str, int]] = {
    "rows": ("u1", 1),
    "row_ends": ("<u8", 1),
    "lengths": ("<u4", 1),
    "files": ("<u4", 1),
    "document_hashes": ("<u8", 1),
    "line_hashes": ("<u8", 1),
    "line_documents": ("<u4", 1),
    "line_numbers": ("<u4", 1),
    "signed": ("<u4", 1),
    "signatures": ("<u2", FUNCTIONS),
}
_PLACES = {name: place for place, name in enumerate(ARRAYS)}


@dataclass(frozen=True)
class Lists:
    """What rules need beside their thresholds: words of the user's, and files with the hashes of evaluation sets."""

    toxic: tuple[str, ...] = ()
    evaluation: tuple[tuple[int, Path], ...] = ()


@dataclass(frozen=True)
class PartTask:
    """Documents to clean.  files, numbers: which file each is of, and which document of it, counted from 1.

    places: where each stands, with its file's name relative to the folder of the output.
    """

    texts: list[str]
    files: list[int]
    numbers: list[int]
    places: list[Place]
    rules: CleaningRules
    lists: Lists
    target: Path
    disk: Disk


@functools.lru_cache(1)
def _load_rules(rules: CleaningRules, lists: Lists) -> DocumentRules:
    evaluation = {length: np.fromfile(path, "<u8") for length, path in lists.evaluation}
    toxic = ToxicWords(lists.toxic) if rules.toxicity.on else None
    return DocumentRules(rules, toxic, EvaluationIndex(evaluation) if evaluation else None, _EXAMPLES)


def clean_part(task: PartTask) -> tuple[Path, dict[str, Any]]:
    """Clean a part and write its arrays to a file beside its target; return its path, and the rest of the sidecar."""
    rules = _load_rules(task.rules, task.lists)
    arrays: dict[str, list[NDArray[Any]]] = {name: [] for name in ARRAYS}
    total = Outcome([], [])
    documents = row_bytes = 0
    for first, texts in _batches(task.texts):
        outcome = rules.apply(texts)
        _add_counts(total, outcome, first)
        if outcome.batch is None:
            continue
        places = [first + index for index in outcome.kept]
        encoded = [
            write_row(task.numbers[place], task.places[place], text)
            for place, text in zip(places, outcome.texts, strict=True)
        ]
        ends = np.cumsum([len(row) for row in encoded]).astype("<u8")
        arrays["rows"].append(np.frombuffer(b"".join(encoded), "u1"))
        arrays["row_ends"].append(ends + np.uint64(row_bytes))
        arrays["lengths"].append(np.array([len(text) for text in outcome.texts], "<u4"))
        arrays["files"].append(np.array([task.files[place] for place in places], "<u4"))
        _add_hashes(arrays, outcome, task.rules, documents)
        documents += len(encoded)
        row_bytes += int(ends[-1])
    sidecar = {
        "documents": len(task.texts),
        "characters": sum(map(len, task.texts)),
        "removed": +total.removed,
        "changed": +total.changed,
        "parts": +total.parts,
        "characters_removed": +total.characters,
        "examples": [_describe(change, task) for change in total.examples],
    }
    return _write(task, arrays, sidecar)


def _batches(texts: list[str]) -> list[tuple[int, list[str]]]:
    found: list[tuple[int, list[str]]] = []
    first = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or index == len(texts) - 1:
            found.append((first, texts[first : index + 1]))
            first, characters = index + 1, 0
    return found


def _add_counts(total: Outcome, outcome: Outcome, first: int) -> None:
    total.removed += outcome.removed
    total.changed += outcome.changed
    total.parts += outcome.parts
    total.characters += outcome.characters
    shown = Counter(change.rule for change in total.examples)
    for change in outcome.examples:
        if shown[change.rule] < _EXAMPLES:
            shown[change.rule] += 1
            total.examples.append(Change(change.rule, first + change.document, change.before, change.after, change.why))


def _add_hashes(arrays: dict[str, list[NDArray[Any]]], outcome: Outcome, rules: CleaningRules, documents: int) -> None:
    """Add what finding duplicates needs.  documents: how many documents of the part stand before these."""
    batch, left = outcome.batch, outcome.left
    assert batch is not None
    # The number in the part of each document of the batch, -1 for those that were removed.
    numbers = np.full(len(batch.texts), -1, np.int64)
    numbers[left] = documents + np.arange(len(left))
    hashes = batch.document_hashes[left]
    for place in np.flatnonzero(batch.word_counts[left] == 0).tolist():  # only where the rule of length is off
        hashes[place] = hash_text(outcome.texts[place])
    arrays["document_hashes"].append(hashes)
    if rules.duplicate_lines.on:
        lines = np.flatnonzero(
            (batch.line_words >= rules.duplicate_lines.least_words) & (numbers[batch.line_documents] >= 0)
        )
        owners = batch.line_documents[lines]
        first_lines = np.searchsorted(batch.line_documents, np.arange(len(batch.texts)))
        arrays["line_hashes"].append(batch.line_hashes[lines])
        arrays["line_documents"].append(numbers[owners].astype("<u4"))
        arrays["line_numbers"].append((lines - first_lines[owners]).astype("<u4"))
    if rules.near_duplicates.on:
        which, signatures = sign(batch, rules.near_duplicates.least_words)
        is_left = numbers[which] >= 0
        arrays["signed"].append(numbers[which[is_left]].astype("<u4"))
        arrays["signatures"].append(signatures[is_left])


def write_row(number: int, place: Place, text: str) -> bytes:
    """Return a document as a row of the result, with its line end."""
    return _encode_row({"document": number, ORIGIN: place._asdict(), "text": text})


def replace_text(row: bytes, text: str) -> bytes:
    """Return a row of the result with another text."""
    return _encode_row(json.loads(row) | {"text": text})


def _encode_row(value: dict[str, Any]) -> bytes:
    # The name of a file may have bytes that are not UTF-8, which Python keeps as lone surrogates.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def read_row(row: bytes) -> tuple[int, str]:
    """Return the number and the text of a document from its row."""
    value = json.loads(row)
    return value["document"], value["text"]


def hash_text(text: str) -> int:
    """Return 64 bits of a text's BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _describe(change: Change, task: PartTask) -> dict[str, Any]:
    place = {"file": task.files[change.document], "document": task.numbers[change.document]}
    shown = show_change(change.before, change.after)
    return {"rule": change.rule, **place, **shown} | ({"why": change.why} if change.why else {})


def _write(
    task: PartTask, arrays: dict[str, list[NDArray[Any]]], sidecar: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    places: dict[str, list[int]] = {}
    offset = 0
    digest = hashlib.sha256()
    # The name contains the thread's id: a thread that Ctrl-C left running may still write its own file.
    beside = task.target.with_name(f"{task.target.name}.{threading.get_native_id()}.tmp")
    with explain_full_disk(task.target.parent), open(beside, "wb") as file:
        for name, (dtype, _) in ARRAYS.items():
            rows = 0
            for array in arrays[name]:
                data = np.ascontiguousarray(array, dtype).tobytes()
                task.disk.write_handle(file, data)
                digest.update(data)
                rows += len(array)
            places[name] = [offset, rows]
            offset = file.tell()
        task.disk.sync_handle(file)
    return beside, _plain(sidecar) | {"arrays": places, "bytes": offset, "sha256": digest.hexdigest()}


def _plain(sidecar: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Counter) else value for key, value in sidecar.items()}


class Part:
    """A cleaned part, to read.  first_document, first_line, first_signed: how many of them stand in parts before it."""

    def __init__(self, path: Path, sidecar: dict[str, Any], before: Part | None = None) -> None:
        self.path = path
        # Packed, because a large text has many thousands of parts.
        self._places = array("Q", itertools.chain.from_iterable(sidecar["arrays"][name] for name in ARRAYS))
        self.first_document: int = before.first_document + before.documents if before else 0
        self.first_line: int = before.first_line + before.lines if before else 0
        self.first_signed: int = before.first_signed + before.signed if before else 0

    @property
    def documents(self) -> int:
        """How many documents are left."""
        return self._find("row_ends")[1]

    @property
    def lines(self) -> int:
        """How many lines may be duplicates."""
        return self._find("line_hashes")[1]

    @property
    def signed(self) -> int:
        """How many documents have a signature."""
        return self._find("signed")[1]

    def _find(self, name: str) -> tuple[int, int]:
        """Return where an array begins in the file, and how many rows it has."""
        place = 2 * _PLACES[name]
        return self._places[place], self._places[place + 1]

    def read(self, name: str) -> NDArray[Any]:
        """Return an array: [rows] or [rows, columns]."""
        offset, rows = self._find(name)
        dtype, columns = ARRAYS[name]
        found = np.fromfile(self.path, dtype, rows * columns, offset=offset)
        return found.reshape(rows, columns) if columns > 1 else found

    def read_signatures(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """Return some signatures; they are read one by one, because few documents of a part are compared."""
        offset, _ = self._find("signatures")
        size = FUNCTIONS * 2
        data = bytearray()
        with open(self.path, "rb") as file:
            for row in rows.tolist():
                file.seek(offset + row * size)
                data += file.read(size)
        return np.frombuffer(data, "<u2").reshape(-1, FUNCTIONS)

    def rows(self) -> list[bytes]:
        """Return the documents that are left, each as the row that is written."""
        data, ends = self.read("rows").tobytes(), self.read("row_ends").tolist()
        return [data[start:end] for start, end in itertools.pairwise([0, *ends])]
