"""Writes shards without some of their documents, which are named by hash; shards that lose none are linked.

The shards that are read stay as they are.  What was written before an interruption is not written again.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowvram.data.exclusion_list import BYTES, FILE, HASH, LINE, WHY, Excluded, keep_row, read_excluded
from lowvram.data.places import PlaceList
from lowvram.data.shard_documents import ShardDocuments, open_documents
from lowvram.data.shard_folder import ShardFolder
from lowvram.data.shard_set import COUNTS, INDEX, ShardPart, ShardSet, read_json
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.storage.disk import DISK, Disk

_TEXT = "text"


@dataclass
class FoundDocuments:
    """The documents of shards that are to be left out.

    numbers: of each shard, which of its documents, from 0 on.  rows: what is kept of each of them, in their order.
    copies: how often each hash occurs.  counts: what is left out: tokens, documents, text_bytes.
    """

    numbers: list[np.ndarray] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    copies: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


def find_documents(
    shards: ShardSet, tokenizer: Tokenizer, listed: Mapping[str, Mapping[str, Any]]
) -> Generator[tuple[int, int], None, FoundDocuments]:
    """Return which documents of shards are listed; yields the tokens that were read and those that there are.

    listed: rows by hash.  Raises DataError where a shard is damaged.
    """
    found = FoundDocuments()
    for part in shards.parts():
        yield part.start, shards.tokens
        documents = open_documents(shards, part, tokenizer)
        if hashlib.sha256(np.ascontiguousarray(documents.id_T).data).hexdigest() != part.sha256:
            why = "Its SHA-256 is not the one of the packed bytes."
            raise DataError(f"The shard {part.path} is damaged.", why, "To mend it, pack again into the same folder.")
        numbers: list[int] = []
        if listed:
            hashes = enumerate(documents.hashes())
            numbers = [number for number, name in hashes if _note(found, documents, number, name, listed)]
        found.numbers.append(np.array(numbers, np.int64))
        found.counts["documents"] += len(numbers)
        found.counts["tokens"] += len(numbers) + int((documents.stop_D - documents.start_D)[numbers].sum())
        found.counts["text_bytes"] += int(documents.byte_count_D[numbers].sum())
    return found


def _note(
    found: FoundDocuments, documents: ShardDocuments, number: int, name: str, listed: Mapping[str, Mapping[str, Any]]
) -> bool:
    row = listed.get(name)
    if row is None:
        return False
    found.copies[name] += 1
    place = documents.places[number] if documents.places is not None else None
    more = {BYTES: int(documents.byte_count_D[number]), WHY: row.get(WHY)}
    where = {FILE: place.file, LINE: place.line} if place is not None else {}
    found.rows.append(keep_row({HASH: name} | dict(row), **more, **where))
    return True


def write_rest(
    shards: ShardSet, found: FoundDocuments, tokenizer: Tokenizer, out: Path, disk: Disk = DISK, replace: bool = False
) -> Generator[tuple[int, int], None, ShardSet]:
    """Write a folder of shards without the documents that were found; yields the shards done and those there are.

    replace: whether shards of another text in `out` may be replaced.
    Raises DataError where nothing is left or `out` holds another text, BusyError, DiskFullError.
    """
    parts = shards.parts()
    if found.counts["documents"] == shards.documents:
        what = f"Nothing is left of {shards.directory}."
        raise DataError(what, "Every document of it is listed.", "Leave fewer documents out.")
    dtype = f"uint{8 * shards.dtype.itemsize}"
    folder = ShardFolder(out, tokenizer.hash, dtype, disk, replace)
    with folder.claim():
        folder.dtype = dtype  # shards are taken over as they are, whatever was in the folder before
        for done, (part, numbers) in enumerate(zip(parts, found.numbers, strict=True), 1):
            if len(numbers) < part.documents:
                documents = open_documents(shards, part, tokenizer)
                _add(folder, _Rest(part, documents, numbers), disk)
            yield done, len(parts)
        folder.check_end()
        sources = read_json(shards.directory / INDEX).get("sources")
        earlier = read_excluded(shards.directory)
        return folder.finish([], Excluded([*earlier, *found.rows], sources if isinstance(sources, dict) else {}))
    raise AssertionError("the folder's lock lets every error through")


@dataclass(frozen=True)
class _Rest:
    """A shard, its documents, and the numbers of those that are left out."""

    part: ShardPart
    documents: ShardDocuments
    numbers: np.ndarray

    @property
    def is_whole(self) -> bool:
        return not len(self.numbers)

    def is_kept(self) -> np.ndarray:
        """Return for each document whether it stays."""
        is_kept_D = np.ones(self.part.documents, bool)
        is_kept_D[self.numbers] = False
        return is_kept_D

    def ids(self) -> np.ndarray:
        """Return the ids of the documents that stay, with BOS before each."""
        length_D = self.documents.stop_D - self.documents.start_D + 1
        return self.documents.id_T[np.repeat(self.is_kept(), length_D)]

    def hash_text(self) -> str:
        """Return the hash of the text that packing these documents would note."""
        digest = hashlib.sha256()
        for is_kept, data in zip(self.is_kept().tolist(), self.documents.all_bytes(), strict=True):
            if is_kept:
                digest.update(len(data).to_bytes(8, "little"))
                digest.update(data)
        return digest.hexdigest()

    def places(self, folder: Path) -> bytes | None:
        """Return the places of the documents that stay, as a folder of shards keeps them."""
        if self.documents.places is None:
            return None
        listed = PlaceList(folder)
        for is_kept, place in zip(self.is_kept().tolist(), self.documents.places, strict=True):
            if is_kept:
                listed.add(*place)
        return listed.take()


def _add(folder: ShardFolder, rest: _Rest, disk: Disk) -> None:
    """Add what is left of a shard to a folder, unless it is there already."""
    number, part = len(folder.shards), rest.part
    noted = read_json(part.path.with_suffix(".json")).get(_TEXT) if rest.is_whole else None
    text = noted if isinstance(noted, str) else rest.hash_text()
    places = rest.places(folder.out)
    if finished := folder.find_done(number, text):
        folder.add(number, finished, None, places)
        return
    kept = part.documents - len(rest.numbers)
    folder.check_may_write(number, text, kept)
    target = folder.path(number)
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    sidecar: dict[str, Any] = {"tokenizer": rest.documents.tokenizer.hash, _TEXT: text, "dtype": folder.dtype}
    if rest.is_whole:
        disk.link(part.path, beside)
        counts: dict[str, Any] = {key: getattr(part, key) for key in (*COUNTS, "sha256")}
    else:
        id_T = rest.ids()
        disk.write_preallocated(beside, np.ascontiguousarray(id_T).data.cast("B"))
        size = int(rest.documents.byte_count_D[rest.is_kept()].sum())
        counts = {"tokens": len(id_T), "documents": kept, "text_bytes": size}
        counts["sha256"] = hashlib.sha256(id_T.data).hexdigest()
    folder.add(number, sidecar | counts, beside, places)
