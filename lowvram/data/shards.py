"""Packs documents into files of token ids (shards), with several processes; knows no batch and no model."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.config.mix import MIX, is_mix
from lowvram.data.bad_rows import BadRows
from lowvram.data.encoders import EncodeTask, encode_in
from lowvram.data.exclusion_list import Excluded, Exclusion
from lowvram.data.holdout import Holdout
from lowvram.data.places import Cursor, PlaceList
from lowvram.data.shard_folder import ShardFolder, holds_shards
from lowvram.data.shard_set import COUNTS, ShardSet
from lowvram.data.text import documents, find_files
from lowvram.data.text_files import is_stream, size_of
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.finish import finish
from lowvram.storage.disk import DISK, Disk

__all__ = ["PackProgress", "ShardSet", "pack", "pack_each_shard"]

# The folders of a split: the training data and the held-out documents.
SIDES = ("train", "valid")
PART_BYTES = 8 << 20
_BLOCK_CHARACTERS = 1 << 20
# The largest uint16 is 65,535, so that type can store this many ids.
_MOST_UINT16_IDS = 0x10000


@dataclass(frozen=True)
class PackProgress:
    """The progress of a packing: totals of the shards finished so far, reused ones included."""

    file: Path
    shards: int
    reused: int
    documents: int
    tokens: int
    text_bytes: int
    read_bytes: int
    total_bytes: int


@dataclass
class _Part:
    """Whole documents that become one shard.

    file: the file of the last document.  read_bytes: the bytes of all files read up to its end, as stored on disk.
    places: where the documents stand in their files, as a `PlaceList` writes it.
    """

    folder: ShardFolder
    number: int
    file: Path
    texts: list[str]
    hash: str
    read_bytes: int
    places: bytes


def pack(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    field: str = "text",
    processes: int | None = None,
    disk: Disk = DISK,
    *,
    replace: bool = False,
    bad_rows: BadRows | None = None,
) -> ShardSet:
    """Do what `pack_each_shard` does without a holdout, all at once."""
    work = pack_each_shard(paths, tokenizer, out, field, processes, disk, replace=replace, bad_rows=bad_rows)
    [shards] = finish(work)
    return shards


def pack_each_shard(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    field: str = "text",
    processes: int | None = None,
    disk: Disk = DISK,
    *,
    holdout: Holdout | None = None,
    replace: bool = False,
    bad_rows: BadRows | None = None,
    is_packed: Callable[[str], bool] | None = None,
    exclusion: Exclusion | None = None,
) -> Generator[PackProgress, None, tuple[ShardSet, ...]]:
    """Encode the documents of `paths` into shards in `out`, and yield after each shard how far it is.

    Shards finished by an interrupted packing are kept.  Each document becomes BOS and the ids of its NFC form, in the
    order of `find_files`.  The bytes of the shards depend on text and tokenizer alone.
    processes: None for one per core; with more than one, a script must guard its entry with
    `if __name__ == "__main__"`.  holdout: None: one set of shards in `out`; else two, in `out/train`, and in
    `out/valid` the documents that are held out.  replace: whether another text in `out` may be replaced.
    bad_rows: what is done with rows that are not text; None stops at the first.  is_packed: which documents are packed
    at all; None for all of them.  exclusion: takes documents that are left out; the first folder keeps a list of them.
    Raises DataError (unreadable text; text, or shards of another text or tokenizer, in `out`; a holdout that leaves one
    side without a document), BusyError, DiskFullError.
    """
    refuse_other_form(out, holdout is not None)
    outs = [out] if holdout is None else [out / name for name in SIDES]
    folders = [ShardFolder(folder, tokenizer.hash, _dtype_name(tokenizer), disk, replace) for folder in outs]
    files = find_files(paths)
    total_bytes = sum(map(size_of, files))
    reused, totals = 0, Counter[str]()
    with ExitStack() as stack:
        for folder in folders:
            _refuse_text_inside(folder.out, files)
            stack.enter_context(folder.claim())
        parts = _parts(files, field, folders, holdout, bad_rows or BadRows(), is_packed, exclusion)
        packed = stack.enter_context(closing(_packed(parts, tokenizer, processes or os.cpu_count() or 1, disk)))
        for done, (part, is_new) in enumerate(packed, 1):
            reused += not is_new
            totals.update({key: part.folder.shards[-1][key] for key in COUNTS})
            counts = {"shards": done, "reused": reused, **totals}
            yield PackProgress(part.file, read_bytes=part.read_bytes, total_bytes=total_bytes, **counts)
        if not any(folder.shards for folder in folders):
            raise DataError("There is no text to pack.", "Every row was left out.", "Name files that hold text.")
        for folder in folders:
            folder.check_end()
        excluded = [Excluded(exclusion.rows) if exclusion else None, None]
        return tuple(folder.finish(files, left_out) for folder, left_out in zip(folders, excluded, strict=False))
    raise AssertionError("the folders' locks let every error through")


def refuse_other_form(out: Path, is_split: bool) -> None:
    """Raise DataError where `out` holds a mix, or a split and is to hold none, or the other way round.

    A `valid` folder beside shards in `out` itself is allowed.
    """
    mix = next((folder for folder in (out, out.parent) if is_mix(folder)), None)
    if mix == out or (mix is not None and not is_split and out.name in SIDES):
        why = f"A run that is to read {mix} reads the sources of the mix alone, and would not see these shards."
        raise DataError(f"{mix} is a mix.", why, f"Name another `out`, or delete {mix / MIX} first.")
    if is_split and holds_shards(out):
        why = f"They were packed without `holdout`; beside {out / SIDES[0]} nobody could tell which of them are meant."
        raise DataError(f"{out} itself holds shards.", why, f"Name another `out`, or delete the shards in {out} first.")
    if is_split:
        return
    inside = [out / name for name in SIDES if holds_shards(out / name)]
    if inside and not (inside == [out / SIDES[1]] and holds_shards(out)):
        what = f"{' and '.join(map(str, inside))} {'holds' if len(inside) == 1 else 'hold'} shards already."
        why = f"Beside shards in {out} itself nobody could tell which of them are meant."
        raise DataError(
            what, why, f"Name another `out`, add `holdout`, or delete {' and '.join(map(str, inside))} first."
        )


def _refuse_text_inside(out: Path, files: Sequence[Path]) -> None:
    folder = out.resolve()
    for file in (file for file in files if not is_stream(file)):
        parent = file.parent.resolve()
        if folder == parent or folder in parent.parents:
            why = f"{file} lies in it, and packing deletes what it finds left over there."
            raise DataError(f"{out} holds text that is to be packed.", why, "Name a folder of its own as `out`.")


class _Collector:
    """Collects the documents of one folder's next shard."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder, self._number = folder, 0
        self.places = PlaceList(folder.out)
        self._clear()

    def _clear(self) -> None:
        self._texts, self.text_bytes, self._digest = list[str](), 0, hashlib.sha256()

    def add(self, text: str) -> None:
        if len(text) <= _BLOCK_CHARACTERS:
            data = text.encode("utf-8")
            blocks: Iterable[bytes] = (data,)
            size = len(data)
        else:
            blocks, size = _utf8_blocks(text), sum(map(len, _utf8_blocks(text)))
        self._digest.update(size.to_bytes(8, "little"))
        for block in blocks:
            self._digest.update(block)
        self._texts.append(text)
        self.text_bytes += size

    def take(self, file: Path, read_bytes: int) -> _Part:
        hash = self._digest.hexdigest()
        part = _Part(self._folder, self._number, file, self._texts, hash, read_bytes, self.places.take())
        self._number += 1
        self._clear()
        return part


def _utf8_blocks(text: str) -> Iterator[bytes]:
    for start in range(0, len(text), _BLOCK_CHARACTERS):
        yield text[start : start + _BLOCK_CHARACTERS].encode("utf-8")


def _parts(
    files: Sequence[Path],
    field: str,
    folders: Sequence[ShardFolder],
    holdout: Holdout | None,
    bad_rows: BadRows,
    is_packed: Callable[[str], bool] | None,
    exclusion: Exclusion | None,
) -> Iterator[_Part]:
    """Yield the parts of all folders; the second folder, if there is one, gets the held-out documents."""
    sides = [_Collector(folder) for folder in folders]
    before, inside, cursor = 0, 0, Cursor()

    def tell(read_bytes: int) -> None:
        nonlocal inside
        inside = read_bytes

    for file in files:
        for text in documents(file, field, tell, bad_rows, cursor):
            if is_packed is not None and not is_packed(text):
                continue
            place = cursor.origin or (file, cursor.line)
            if exclusion and exclusion.leaves_out(text, *place):
                continue
            side = sides[holdout is not None and holdout.takes(text)]
            side.add(text)
            side.places.add(*place)
            if side.text_bytes >= PART_BYTES:
                yield side.take(file, before + inside)
        before, inside = before + size_of(file), 0
    bad_rows.finish()
    if holdout:
        holdout.check()  # before the last parts are encoded, so that a small text leaves no shards behind
    for side in sides:
        if side.text_bytes:
            yield side.take(files[-1], before)


def _packed(
    parts: Iterator[_Part], tokenizer: Tokenizer, processes: int, disk: Disk
) -> Generator[tuple[_Part, bool], None, None]:
    """Yield each part when its shard is in the folder, and whether it was encoded now, in order."""
    # Processes take seconds to start, so a single part is encoded in this one.
    head = list(itertools.islice(parts, 2)) if processes > 1 else []
    running: deque[tuple[_Part, dict[str, Any], Callable[[], tuple[Path, dict[str, Any]]] | None]] = deque()

    def finish() -> tuple[_Part, bool]:
        # Only this process, which holds the lock, renames shards; a worker that outlives it must not.
        part, sidecar, encoded = running.popleft()
        beside, counts = encoded() if encoded else (None, {})
        part.folder.add(part.number, sidecar | counts, beside, part.places)
        return part, encoded is not None

    with encode_in(processes if len(head) > 1 else 1) as encoders:
        for part in itertools.chain(head, parts):
            finished = part.folder.find_done(part.number, part.hash)
            if finished:
                running.append((part, finished, None))
            else:
                part.folder.check_may_write(part.number, part.hash, len(part.texts))
                sidecar = {"tokenizer": tokenizer.hash, "text": part.hash, "dtype": part.folder.dtype}
                target = part.folder.path(part.number)
                task = EncodeTask(part.texts, tokenizer.directory, tokenizer.hash, part.folder.dtype, target, disk)
                running.append((part, sidecar, encoders.submit(task)))
            part.texts = []
            while len(running) >= encoders.most_waiting:
                yield finish()
        while running:
            yield finish()


def _dtype_name(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.size <= _MOST_UINT16_IDS else "uint32"
