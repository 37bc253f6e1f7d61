"""Documents packed into files of token ids, and those files read back; knows no batch and no model.

A packed directory: 00000.bin (ids, little-endian), 00000.json (its sidecar), … and shards.json, written last.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
import unicodedata
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from lowvram.data.text import documents, find_files
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import BusyError, DataError, MachineError, TokenizerError
from lowvram.files import DISK, Disk, explain_full_disk, sha256

FORMAT = 1
PART_BYTES = 8 << 20
_INDEX = "shards.json"
_NAME = re.compile(r"(\d{5,})\.(bin|json)")
_COUNTS = ("tokens", "documents", "text_bytes")
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class PackProgress:
    """How far a packing is: totals of the shards finished so far, reused ones included."""

    file: Path
    shards: int
    reused: int
    documents: int
    tokens: int
    text_bytes: int
    read_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class _Part:
    """Whole documents that become one shard.  file, read_bytes: where their last ends; bytes as they lie on disk."""

    number: int
    file: Path
    texts: list[str]
    text_bytes: int
    hash: str
    read_bytes: int


def pack(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    field: str = "text",
    processes: int | None = None,
    progress: Callable[[PackProgress], None] | None = None,
    disk: Disk = DISK,
) -> ShardSet:
    """Encode the documents of `paths` into shards in `out`; what an interrupted try finished is kept.

    Each document becomes BOS and the ids of its NFC form, in the order of `find_files`.  The bytes written
    depend on text and tokenizer alone.  processes: None for one per core; with more than one, a script must
    guard its entry with `if __name__ == "__main__"`.
    Raises DataError (unreadable text, shards of another tokenizer in `out`), BusyError, DiskFullError.
    """
    files = find_files(paths)
    total_bytes = sum(file.stat().st_size for file in files)
    if total_bytes <= PART_BYTES:
        processes = 1
    shards: list[dict[str, Any]] = []
    reused = 0
    packed = _packed(_parts(files, field), tokenizer, out, processes, disk)
    with _claim(out, disk), closing(packed):
        _refuse_other_tokenizer(out, tokenizer)
        for part, shard, is_new in packed:
            row = {key: shard[key] for key in (*_COUNTS, "sha256")}
            shards.append({"file": _name(out, part.number).name} | row)
            reused += not is_new
            if progress:
                reading = {"read_bytes": part.read_bytes, "total_bytes": total_bytes}
                progress(PackProgress(part.file, len(shards), reused, **_totals(shards), **reading))
        head = {"format": FORMAT, "tokenizer": tokenizer.hash, "dtype": _dtype_name(tokenizer)}
        _write_json(out / _INDEX, head | _totals(shards) | {"shards": shards}, disk)
        _delete_leftovers(out, disk, len(shards))
    return ShardSet.open(out, tokenizer.hash)


@contextmanager
def _claim(out: Path, disk: Disk) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / "lock", timeout=0).acquire()
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{out} is no folder.", "Shards need one of their own.", "Name another --out.") from error
    except filelock.Timeout as error:
        why = "Another process is packing into it."
        raise BusyError(f"{out} is in use.", why, "Wait until it is done, or name another --out.") from error
    with lock:
        try:
            _delete_leftovers(out, disk)
            yield
        finally:
            _delete_leftovers(out, disk)


def _delete_leftovers(out: Path, disk: Disk, shards: int | None = None) -> None:
    """Delete unfinished files and, where the number of shards is given, the shards behind the last one."""
    for path in sorted(out.iterdir()):
        match = _NAME.match(path.name)
        is_unfinished = path.suffix == ".tmp" and (match or path.name.startswith(_INDEX))
        if is_unfinished or (match and shards is not None and int(match[1]) >= shards):
            disk.delete(path)


def _refuse_other_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    for path in sorted(out.glob("*.json")):
        found = _read_json(path).get("tokenizer", tokenizer.hash)
        if found != tokenizer.hash and (path.name == _INDEX or _NAME.fullmatch(path.name)):
            raise _other_tokenizer(out, str(found), tokenizer.hash, "Name another --out, or delete that folder.")


def _other_tokenizer(directory: Path, found: str, wanted: str, fix: str) -> DataError:
    why = f"They were made with tokenizer {found[:12]}…, not with {wanted[:12]}…."
    return DataError(f"{directory} holds shards of another tokenizer.", why, fix)


def _parts(files: Sequence[Path], field: str) -> Iterator[_Part]:
    number, texts, size, digest = 0, list[str](), 0, hashlib.sha256()
    before, inside = 0, 0

    def tell(read_bytes: int) -> None:
        nonlocal inside
        inside = read_bytes

    for file in files:
        for text in documents(file, field, tell):
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "little") + data)
            texts.append(text)
            size += len(data)
            if size >= PART_BYTES:
                yield _Part(number, file, texts, size, digest.hexdigest(), before + inside)
                number, texts, size, digest = number + 1, [], 0, hashlib.sha256()
        before, inside = before + file.stat().st_size, 0
    if texts:
        yield _Part(number, files[-1], texts, size, digest.hexdigest(), before)


_Running = tuple[_Part, dict[str, Any], Callable[[], tuple[Path, dict[str, Any]]] | None]


def _packed(
    parts: Iterator[_Part], tokenizer: Tokenizer, out: Path, processes: int | None, disk: Disk
) -> Generator[tuple[_Part, dict[str, Any], bool], None, None]:
    """Yield each part, its sidecar and whether it was encoded now, in order."""
    processes = processes or os.cpu_count() or 1
    pool = _start_pool(processes) if processes > 1 else None
    running: deque[_Running] = deque()
    try:
        for part in parts:
            wanted = {"tokenizer": tokenizer.hash, "text": part.hash, "dtype": _dtype_name(tokenizer)}
            found, target = _read_json(_name(out, part.number, "json")), _name(out, part.number)
            task = functools.partial(_encode, part, tokenizer.directory, tokenizer.hash, target, disk)
            if _is_done(found, wanted, target):
                running.append((part, found, None))
            else:
                running.append((part, wanted, pool.submit(task).result if pool else task))
            while len(running) >= (2 * processes if pool else 1):
                yield _finish(running.popleft(), out, disk)
        while running:
            yield _finish(running.popleft(), out, disk)
    except BrokenProcessPool as error:
        raise MachineError(
            "A packing process died.",
            "Most often the system ran out of memory and ended it.",
            "Type the same command again with fewer --processes; finished shards are kept.",
        ) from error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def _finish(running: _Running, out: Path, disk: Disk) -> tuple[_Part, dict[str, Any], bool]:
    """Give a shard its name: only the holder of the lock does so, never a worker that outlived it."""
    part, shard, encoded = running
    if encoded:
        beside, counts = encoded()
        shard = shard | counts
        # From here on the directory is no longer what an older index says.
        disk.delete(out / _INDEX)
        disk.rename(beside, _name(out, part.number))
        _write_json(_name(out, part.number, "json"), shard, disk)
    return part, shard, encoded is not None


def _start_pool(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare_worker)


def _prepare_worker() -> None:
    # Ctrl-C reaches the whole group: the parent alone answers it.  A killed parent cannot, so watch it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(part: _Part, directory: Path, tokenizer_hash: str, target: Path, disk: Disk) -> tuple[Path, dict[str, Any]]:
    """Write the ids of a part beside `target`; return where, and what its sidecar says of them."""
    tokenizer = _load_tokenizer(directory, tokenizer_hash)
    dtype, bos = _DTYPES[_dtype_name(tokenizer)], np.array([tokenizer.bos_id], np.uint32)
    ids = (tokenizer.encode_array(unicodedata.normalize("NFC", text)) for text in part.texts)
    data = np.concatenate([piece for array in ids for piece in (bos, array)]).astype(dtype).tobytes()
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with explain_full_disk(target.parent, len(data)), open(beside, "wb") as file:
        disk.preallocate(file, len(data))
        disk.write_handle(file, data)
        disk.sync_handle(file)
    counts = {"tokens": len(data) // dtype.itemsize, "documents": len(part.texts)}
    return beside, counts | {"text_bytes": part.text_bytes, "sha256": hashlib.sha256(data).hexdigest()}


@functools.lru_cache(1)
def _load_tokenizer(directory: Path, expected_hash: str) -> Tokenizer:
    tokenizer = Tokenizer.load(directory)
    if tokenizer.hash != expected_hash:
        why = "Another process wrote to that folder."
        raise TokenizerError(f"The tokenizer in {directory} has changed.", why, "Pack again.")
    return tokenizer


def _is_done(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> bool:
    if any(found.get(key) != value for key, value in wanted.items()) or not path.exists():
        return False
    return bool(path.stat().st_size == found["tokens"] * _DTYPES[wanted["dtype"]].itemsize)


def _name(out: Path, number: int, kind: str = "bin") -> Path:
    return out / f"{number:05d}.{kind}"


def _dtype_name(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.size <= 0xFFFF else "uint32"


def _totals(shards: list[dict[str, Any]]) -> dict[str, int]:
    return {key: sum(shard[key] for shard in shards) for key in _COUNTS}


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where it is missing or torn, which counts as not done."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_json(path: Path, record: dict[str, Any], disk: Disk) -> None:
    disk.write(path, (json.dumps(record, indent=1) + "\n").encode("utf-8"))


class ShardSet:
    """The tokens of a packed directory as one sequence, mapped and never wholly in memory.

    hash: over the shards' own SHA-256, so that it names the data.  text_bytes: UTF-8 bytes of the documents.
    """

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.directory = directory
        if index["format"] != FORMAT:
            raise KeyError("format")
        self.tokenizer_hash: str = index["tokenizer"]
        self.dtype = _DTYPES[index["dtype"]]
        self._shards: list[dict[str, Any]] = index["shards"]
        totals = _totals(self._shards)
        self.tokens, self.documents, self.text_bytes = (totals[key] for key in _COUNTS)
        self.hash = hashlib.sha256("\n".join(shard["sha256"] for shard in self._shards).encode()).hexdigest()
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in self._shards)])
        self._maps: list[np.ndarray | None] = [None] * len(self._shards)

    @staticmethod
    def open(directory: Path, tokenizer_hash: str | None = None) -> ShardSet:
        """Open a packed directory; every file's size is checked, its content by `verify` alone.

        Raises DataError: not (wholly) packed, a file missing or of another size, shards of another tokenizer.
        """
        index = Path(directory) / _INDEX
        if not index.exists():
            why = f"It has no {_INDEX}: nothing was packed there, or a packing was interrupted."
            raise DataError(f"{directory} holds no shards.", why, "Type `lowvram data pack`, again if need be.")
        try:
            shards = ShardSet(Path(directory), _read_json(index))
        except (KeyError, TypeError, AttributeError) as error:
            why = f"It is damaged, or of another format than {FORMAT}."
            raise DataError(f"{index} cannot be read.", why, "Pack the text again.") from error
        if tokenizer_hash not in (None, shards.tokenizer_hash):
            fix = "Name the tokenizer that they were packed with, or pack the text again."
            raise _other_tokenizer(directory, shards.tokenizer_hash, str(tokenizer_hash), fix)
        shards._check_sizes()
        return shards

    def _check_sizes(self) -> None:
        # A mapped file that is too short ends in SIGBUS at the first read, not in an error.
        for shard in self._shards:
            path, expected = self.directory / shard["file"], shard["tokens"] * self.dtype.itemsize
            size = path.stat().st_size if path.exists() else None
            if size != expected:
                what = f"The shard {path} is {'missing' if size is None else 'damaged'}."
                why = f"It has {size or 0} bytes of {expected}."
                raise DataError(what, why, "Pack the text again into this folder.")
        if self.tokens < 2:
            why = "To learn a next token takes two."
            raise DataError(f"{self.directory} holds {self.tokens} token(s).", why, "Pack more text.")

    def verify(self) -> None:
        """Read every byte; raises DataError naming the first shard that is not as it was written."""
        for shard in self._shards:
            path = self.directory / shard["file"]
            if sha256(path) != shard["sha256"]:
                why = "Its SHA-256 is not the one of the packed bytes."
                raise DataError(f"The shard {path} is damaged.", why, "Delete it and pack the text again.")

    def _map(self, number: int) -> np.ndarray:
        found = self._maps[number]
        if found is None:
            path = self.directory / self._shards[number]["file"]
            found = self._maps[number] = np.memmap(path, self.dtype, "r").view(np.ndarray)
        return found

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [count] from position `start` on, read-only where one shard holds them all."""
        assert 0 <= start < start + count <= self.tokens
        number = bisect_right(self._starts, start) - 1
        pieces = []
        while count:
            at = start - int(self._starts[number])
            pieces.append(self._map(number)[at : at + count])
            start, count, number = start + len(pieces[-1]), count - len(pieces[-1]), number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def spans(self, starts: np.ndarray, count: int) -> list[tuple[np.ndarray, int]]:
        """Return for each start the array, and the place in it, where its `count` tokens lie in one piece."""
        numbers = np.searchsorted(self._starts, starts, "right") - 1
        places = starts - self._starts[numbers]
        is_whole = starts + count <= self._starts[numbers + 1]
        return [
            (self._map(number), place) if whole else (self.read(start, count), 0)
            for number, place, whole, start in zip(
                numbers.tolist(), places.tolist(), is_whole.tolist(), starts.tolist(), strict=True
            )
        ]
