"""Reads a packed directory of shards as one sequence of tokens, and defines its format; knows no text, batch or model.

A packed directory: 00000.bin (ids, little-endian), 00000.json (its sidecar), 00000.places (where its documents come
from; older packings have none), … and shards.json, written last.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lowvram.config.mix import is_mix
from lowvram.data.unpacked import explain_unpacked
from lowvram.errors import DataError
from lowvram.storage.disk import sha256
from lowvram.storage.json_files import JsonError, read_object

FORMAT = 1
INDEX = "shards.json"
# The ending of the file with a shard's places, and the key of its SHA-256 in the sidecar.
PLACES = "places"
COUNTS = ("tokens", "documents", "text_bytes")
_SHARD_NAME = re.compile(r"[0-9]{5,}\.bin")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one if the file is missing or torn, since that counts as not packed."""
    try:
        return read_object(path)
    except (OSError, JsonError):
        return {}


def read_bytes(path: Path) -> bytes | None:
    """Return what a file holds, None where there is none."""
    return path.read_bytes() if path.is_file() else None


def has_counts(record: dict[str, Any]) -> bool:
    """Say whether a record has counts of tokens, documents and bytes, all whole numbers from 0 on."""
    counts = [record.get(key) for key in COUNTS]
    return all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)


def _check_records(shards: list[dict[str, Any]]) -> None:
    """Raise TypeError where a record of an index has no valid name, counts or hash."""
    for shard in shards:
        name, digest = shard["file"], shard["sha256"]
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name) or not isinstance(digest, str):
            raise TypeError(f"{name!r} is no shard's name, or {digest!r} no hash")
        if not has_counts(shard):
            raise TypeError(f"{name} has no counts")


def add_up(shards: list[dict[str, Any]]) -> dict[str, int]:
    """Return the totals of the counts in the shards' records."""
    return {key: sum(shard[key] for shard in shards) for key in COUNTS}


def other_tokenizer(directory: Path, found: str, wanted: str, fix: str) -> DataError:
    """Return the error for shards that were made with another tokenizer."""
    why = f"They were made with tokenizer {found[:12]}…, not with {wanted[:12]}…."
    return DataError(f"{directory} holds shards of another tokenizer.", why, fix)


def _unreadable(path: Path, error: OSError) -> DataError:
    why = f"The system says: {error.strerror}."
    return DataError(f"The shard {path} cannot be read.", why, "If the drive fails, pack again on another one.")


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return a file's size, time of change, inode and device, to notice changes; None where there is no file."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


class ShardPart(NamedTuple):
    """One shard of a set.  start: the number of its first token in the set."""

    path: Path
    start: int
    tokens: int
    documents: int
    text_bytes: int
    sha256: str


class ShardSet:
    """The tokens of a packed directory as one sequence; the files are memory-mapped and never wholly in memory.

    Where a file system has no memory maps, or no address space is left for one, what is needed is read instead.

    hash: a hash of the shards' SHA-256, which identifies the data.  text_bytes: UTF-8 bytes of the documents in NFC,
    for which the ids stand; shards of older versions may count the bytes of the text as it was read.
    vocabulary: the number of ids, if it is known; reading an id that is not below it is an error.
    """

    def __init__(self, directory: Path, index: dict[str, Any], vocabulary: int | None = None) -> None:
        self.directory, self.vocabulary = directory, vocabulary
        if index["format"] != FORMAT:
            raise KeyError("format")
        self.tokenizer_hash: str = index["tokenizer"]
        self.dtype = DTYPES[index["dtype"]]
        self._shards: list[dict[str, Any]] = index["shards"]
        _check_records(self._shards)
        totals = add_up(self._shards)
        self.tokens, self.documents, self.text_bytes = (totals[key] for key in COUNTS)
        self.hash = hashlib.sha256("\n".join(shard["sha256"] for shard in self._shards).encode()).hexdigest()
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in self._shards)])
        self._maps: list[np.ndarray | None] = [None] * len(self._shards)
        self._is_unmapped = False
        self._paths = [directory / shard["file"] for shard in self._shards]
        # The stamp of each file when its size was checked.
        self._stamps: list[tuple[int, ...] | None] = [None] * len(self._shards)

    @staticmethod
    def open(directory: Path, tokenizer_hash: str | None = None, vocabulary: int | None = None) -> ShardSet:
        """Open a packed directory; every file's size is checked, but its content only by `verify`.

        vocabulary: see the class.
        Raises DataError: not (wholly) packed, a file missing or of another size, shards of another tokenizer.
        """
        index = Path(directory) / INDEX
        if not index.exists() and (unpacked := explain_unpacked(Path(directory), INDEX)):
            raise unpacked
        if not Path(directory).is_dir():
            fix = "Name the folder that `lowvram data pack` wrote."
            raise DataError(f"The folder {directory} does not exist.", "Shards were to be read from it.", fix)
        if is_mix(Path(directory)):
            why = "Each of them has shards of its own, in its folders train and valid."
            raise DataError(f"{directory} is a mix of several sources.", why, "Name the shards of one.")
        if not index.exists():
            inside = [
                str(Path(directory) / name) for name in ("train", "valid") if (Path(directory) / name / INDEX).exists()
            ]
            if inside:
                raise DataError(
                    f"{directory} holds no shards itself.", f"They are in {' and '.join(inside)}.", "Name one."
                )
            why = f"It has no {INDEX}: nothing was packed there, or a packing was interrupted."
            raise DataError(f"{directory} holds no shards.", why, "Type `lowvram data pack`, again if need be.")
        try:
            shards = ShardSet(Path(directory), read_json(index), vocabulary)
        except (KeyError, TypeError, AttributeError) as error:
            why = f"It is damaged, or of another format than {FORMAT}."
            raise DataError(f"{index} cannot be read.", why, "Pack the text again.") from error
        if tokenizer_hash not in (None, shards.tokenizer_hash):
            fix = "Name the tokenizer that they were packed with, or pack the text again."
            raise other_tokenizer(directory, shards.tokenizer_hash, str(tokenizer_hash), fix)
        shards._check_sizes()
        return shards

    def parts(self) -> list[ShardPart]:
        """Return the shards in their order."""
        starts = self._starts.tolist()
        return [
            ShardPart(path, start, shard["tokens"], shard["documents"], shard["text_bytes"], shard["sha256"])
            for path, start, shard in zip(self._paths, starts, self._shards, strict=False)
        ]

    def _check_sizes(self) -> None:
        # Reading a mapped file that is too short raises SIGBUS, which ends the process without an error message.
        for number, (path, shard) in enumerate(zip(self._paths, self._shards, strict=True)):
            expected, stamp = shard["tokens"] * self.dtype.itemsize, _stamp(path)
            size, self._stamps[number] = stamp[0] if stamp else None, stamp
            if size != expected:
                what = f"The shard {path} is {'missing' if size is None else 'damaged'}."
                why = f"It has {size or 0} bytes of {expected}."
                raise DataError(what, why, "Pack the text again into this folder.")
        if self.tokens < 2:
            why = "To learn a next token takes two."
            raise DataError(f"{self.directory} holds {self.tokens} token(s).", why, "Pack more text.")

    def verify(self) -> None:
        """Read every byte, several shards at once; raises DataError naming the first damaged shard."""
        # Hashing releases the interpreter's lock; more than four files at once would make a spinning disk seek.
        pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        try:
            for path, shard, found in zip(self._paths, self._shards, pool.map(sha256, self._paths), strict=True):
                if found != shard["sha256"]:
                    why = "Its SHA-256 is not the one of the packed bytes."
                    raise DataError(
                        f"The shard {path} is damaged.", why, "To mend it, pack again into the same folder."
                    )
        except OSError as error:
            raise _unreadable(Path(error.filename or self.directory), error) from error
        finally:
            pool.shutdown(cancel_futures=True)

    def refuse_changed(self, number: int) -> None:
        """Raise DataError where a shard's file is gone, or has other bytes than when it was opened.

        Called before a shard's ids are used: reading a mapped file that was cut short ends the process with SIGBUS.
        """
        now = _stamp(self._paths[number])
        if now is not None and now == self._stamps[number]:
            return
        path, shard = self._paths[number], self._shards[number]
        has_size = now is not None and now[0] == shard["tokens"] * self.dtype.itemsize
        if has_size and sha256(path) == shard["sha256"]:
            self._stamps[number] = now  # the file was copied or touched, but its bytes are the same
            return
        raise DataError(
            f"The shard {path} is {'missing' if now is None else 'damaged'}.",
            "It was whole when it was opened; its size, or its SHA-256, is not that of the packed bytes any more.",
            "To mend it, pack again into the same folder.",
        )

    def refuse_unknown(self, ids: np.ndarray, number: int) -> None:
        """Raise DataError where an id of a shard is beyond the vocabulary."""
        if self.vocabulary is None or int(greatest := ids.max()) < self.vocabulary:
            return
        raise DataError(
            f"The shard {self._paths[number]} holds the id {greatest}.",
            f"The tokenizer has {self.vocabulary} ids, so the shard is damaged, or was packed with another tokenizer.",
            "To mend it, pack again into the same folder.",
        )

    def numbers(self, starts: np.ndarray) -> np.ndarray:
        """Return the number of the shard that holds each position."""
        return np.searchsorted(self._starts, starts, "right") - 1

    def _map(self, number: int) -> np.ndarray | None:
        """Return a shard's mapping; None where the system maps no files there."""
        mapped = self._maps[number]
        if mapped is None and not self._is_unmapped:
            path = self._paths[number]
            try:
                mapped = self._maps[number] = np.memmap(path, self.dtype, "r").view(np.ndarray)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EACCES, errno.EIO):
                    raise _unreadable(path, error) from error
                self._is_unmapped = True
        return mapped

    def _ids(self, number: int, offset: int, count: int) -> np.ndarray:
        """Return at most `count` ids of a shard, from its mapping or read from its file."""
        mapped, path = self._map(number), self._paths[number]
        if mapped is not None:
            return mapped[offset : offset + count]
        count = min(count, self._shards[number]["tokens"] - offset)
        try:
            with open(path, "rb") as file:
                file.seek(offset * self.dtype.itemsize)
                data = file.read(count * self.dtype.itemsize)
        except OSError as error:
            raise _unreadable(path, error) from error
        if len(data) < count * self.dtype.itemsize:
            raise DataError(
                f"The shard {path} is damaged.",
                f"{count} ids from number {offset} on were to be read, and the file ends before them.",
                "To mend it, pack again into the same folder.",
            )
        return np.frombuffer(data, self.dtype)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [count] from position `start` on; the array is read-only if one shard holds them all."""
        assert 0 <= start < start + count <= self.tokens
        number = bisect_right(self._starts, start) - 1
        pieces = []
        while count:
            offset = start - int(self._starts[number])
            self.refuse_changed(number)
            pieces.append(self._ids(number, offset, count))
            self.refuse_unknown(pieces[-1], number)
            start, count, number = start + len(pieces[-1]), count - len(pieces[-1]), number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def spans(self, starts: np.ndarray, count: int) -> list[tuple[np.ndarray, int]]:
        """Return for each start an array with its `count` contiguous tokens, and their offset in it."""
        numbers = self.numbers(starts)
        offsets = starts - self._starts[numbers]
        is_whole = starts + count <= self._starts[numbers + 1]
        spans = []
        for number, offset, whole, start in zip(
            numbers.tolist(), offsets.tolist(), is_whole.tolist(), starts.tolist(), strict=True
        ):
            mapped = self._map(number) if whole else None
            spans.append((mapped, offset) if mapped is not None else (self.read(start, count), 0))
        return spans
