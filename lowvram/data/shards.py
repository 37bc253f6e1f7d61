"""Documents packed into files of token ids, by several processes; knows no batch and no model."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
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

from lowvram.data.normal_form import nfc
from lowvram.data.outside_tokenizer import load_tokenizer
from lowvram.data.shard_set import (
    COUNTS,
    DTYPES,
    FORMAT,
    INDEX,
    ShardSet,
    add_up,
    has_counts,
    other_tokenizer,
    read_json,
)
from lowvram.data.text import documents, find_files
from lowvram.data.tokenizer import Tokenizer, count_bytes
from lowvram.errors import BusyError, DataError, MachineError, TokenizerError
from lowvram.files import DISK, Disk, explain_full_disk, sha256

__all__ = ["PackProgress", "ShardSet", "pack"]

PART_BYTES = 8 << 20
_NAME = re.compile(r"([0-9]{5,})\.(bin|json)")
_UNFINISHED = re.compile(r"([0-9]{5,}\.(bin|json)|shards\.json)\.[0-9]+\.tmp")
# What a sidecar says of its shard; a file without them is not ours to delete.
_SIDECAR = {"tokenizer", "text", "dtype", "sha256", *COUNTS}


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
    Raises DataError (unreadable text, or text or shards of another tokenizer in `out`), BusyError, DiskFullError.
    """
    files = find_files(paths)
    total_bytes = sum(file.stat().st_size for file in files)
    _refuse_text_inside(out, files)
    shards: list[dict[str, Any]] = []
    reused = 0
    packed = _packed(_parts(files, field), tokenizer, out, processes, disk)
    with _claim(out, disk), closing(packed):
        _refuse_other_tokenizer(out, tokenizer)
        former = _find_ours(out)
        for part, shard, is_new in packed:
            row = {key: shard[key] for key in (*COUNTS, "sha256")}
            shards.append({"file": _name(out, part.number).name} | row)
            reused += not is_new
            if progress:
                reading = {"read_bytes": part.read_bytes, "total_bytes": total_bytes}
                progress(PackProgress(part.file, len(shards), reused, **add_up(shards), **reading))
        head = {"format": FORMAT, "tokenizer": tokenizer.hash, "dtype": _dtype_name(tokenizer)}
        _write_json(out / INDEX, head | add_up(shards) | {"shards": shards}, disk)
        # Sorted, a shard goes before its sidecar, by which it is still known as ours if this is interrupted.
        for path in sorted(former | _find_ours(out)):
            if int(path.stem) >= len(shards):
                disk.delete(path)
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


def _delete_leftovers(out: Path, disk: Disk) -> None:
    """Delete the unfinished files of a packing that was interrupted."""
    for path in sorted(out.iterdir()):
        if _UNFINISHED.fullmatch(path.name):
            disk.delete(path)


def _find_ours(out: Path) -> set[Path]:
    """Return the shards in `out` and their sidecars: those that its index lists, or whose sidecar is one of ours."""
    rows = read_json(out / INDEX).get("shards")
    listed = {str(row.get("file")) for row in rows if isinstance(row, dict)} if isinstance(rows, list) else set()
    named = [path for path in out.iterdir() if _NAME.fullmatch(path.name)]
    return {
        path
        for path in named
        if f"{path.stem}.bin" in listed or read_json(path.with_suffix(".json")).keys() >= _SIDECAR
    }


def _refuse_to_overwrite(target: Path, ours: set[Path]) -> None:
    for path in (target, target.with_suffix(".json")):
        if path.exists() and path not in ours:
            what, why = f"{path} is in the way.", "A shard would get that name, and this file is no shard of lowvram's."
            raise DataError(what, why, "Name a folder of its own as --out, or move that file.")


def _refuse_text_inside(out: Path, files: Sequence[Path]) -> None:
    folder = out.resolve()
    for file in files:
        place = file.parent.resolve()
        if folder == place or folder in place.parents:
            why = f"{file} lies in it, and packing deletes what it finds left over there."
            raise DataError(f"{out} holds text that is to be packed.", why, "Name a folder of its own as --out.")


def _refuse_other_tokenizer(out: Path, tokenizer: Tokenizer) -> None:
    for path in sorted(out.glob("*.json")):
        found = read_json(path).get("tokenizer", tokenizer.hash)
        if found != tokenizer.hash and (path.name == INDEX or _NAME.fullmatch(path.name)):
            raise other_tokenizer(out, str(found), tokenizer.hash, "Name another --out, or delete that folder.")


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
                yield _Part(number, file, texts, digest.hexdigest(), before + inside)
                number, texts, size, digest = number + 1, [], 0, hashlib.sha256()
        before, inside = before + file.stat().st_size, 0
    if texts:
        yield _Part(number, files[-1], texts, digest.hexdigest(), before)


_Running = tuple[_Part, dict[str, Any], Callable[[], tuple[Path, dict[str, Any]]] | None]


def _packed(
    parts: Iterator[_Part], tokenizer: Tokenizer, out: Path, processes: int | None, disk: Disk
) -> Generator[tuple[_Part, dict[str, Any], bool], None, None]:
    """Yield each part, its sidecar and whether it was encoded now, in order."""
    ours = _find_ours(out)
    processes = processes or os.cpu_count() or 1
    # Processes take seconds to start, so what is one part alone is encoded here.
    head = list(itertools.islice(parts, 2)) if processes > 1 else []
    pool = _start_pool(processes) if len(head) > 1 else None
    running: deque[_Running] = deque()
    try:
        for part in itertools.chain(head, parts):
            wanted = {"tokenizer": tokenizer.hash, "text": part.hash, "dtype": _dtype_name(tokenizer)}
            found, target = read_json(_name(out, part.number, "json")), _name(out, part.number)
            task = functools.partial(_encode, part, tokenizer.directory, tokenizer.hash, target, disk)
            if _is_done(found, wanted, target):
                running.append((part, found, None))
            else:
                _refuse_to_overwrite(target, ours)
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
        disk.delete(out / INDEX)
        # The sidecar comes first, so that no shard ever stands there of which nobody knows whose it is.
        _write_json(_name(out, part.number, "json"), shard, disk)
        disk.rename(beside, _name(out, part.number))
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
    dtype, bos = DTYPES[_dtype_name(tokenizer)], np.array([tokenizer.bos_id], np.uint32)
    texts = [nfc(text) for text in part.texts]
    ids = (tokenizer.encode_array(text) for text in texts)
    data = np.concatenate([piece for array in ids for piece in (bos, array)]).astype(dtype).tobytes()
    beside = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with explain_full_disk(target.parent, len(data)), open(beside, "wb") as file:
        disk.preallocate(file, len(data))
        disk.write_handle(file, data)
        disk.sync_handle(file)
    counts = {"tokens": len(data) // dtype.itemsize, "documents": len(texts)}
    # The bytes that a model predicts: those of the text that the ids spell, which is in NFC.
    text_bytes = sum(map(count_bytes, texts))
    return beside, counts | {"text_bytes": text_bytes, "sha256": hashlib.sha256(data).hexdigest()}


@functools.lru_cache(1)
def _load_tokenizer(directory: Path, expected_hash: str) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    if tokenizer.hash != expected_hash:
        why = "Another process wrote to that folder."
        raise TokenizerError(f"The tokenizer in {directory} has changed.", why, "Pack again.")
    return tokenizer


def _is_done(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> bool:
    """Whether a shard and its sidecar stand and are, byte for byte, what was written for this text."""
    is_wanted = (
        found.keys() >= _SIDECAR and has_counts(found) and all(found[key] == value for key, value in wanted.items())
    )
    return is_wanted and path.is_file() and sha256(path) == found["sha256"]


def _name(out: Path, number: int, kind: str = "bin") -> Path:
    return out / f"{number:05d}.{kind}"


def _dtype_name(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.size <= 0xFFFF else "uint32"


def _write_json(path: Path, record: dict[str, Any], disk: Disk) -> None:
    disk.write(path, (json.dumps(record, indent=1) + "\n").encode("utf-8"))
