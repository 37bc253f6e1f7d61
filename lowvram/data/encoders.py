"""Encodes documents into the bytes of a shard, in several processes that end at once on request; knows no folder."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.data.interruptible import run_interruptibly
from lowvram.data.nfc import nfc
from lowvram.data.shard_set import DTYPES
from lowvram.data.tokenizer import Tokenizer, count_bytes
from lowvram.errors import MachineError, TokenizerError
from lowvram.storage.disk import Disk, explain_full_disk

# This is longer than the runs of white space that the tokenizer cuts, so that a piece is cut as in the whole text.
_PIECE_CHARACTERS = 1_000_000
_LINE_START = re.compile(r"\n(?=\S)")


@dataclass(frozen=True)
class EncodeTask:
    """Whole documents that become one shard, written to a temporary file beside `target` with ids of type `dtype`."""

    texts: list[str]
    tokenizer: Path
    tokenizer_hash: str
    dtype: str
    target: Path
    disk: Disk


class Encoders:
    """Encodes tasks in order; processes = 1 means in this process.  If an exception leaves the block, all work ends."""

    def __init__(self, processes: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._hang_up: Connection | None = None
        if processes > 1:
            self._pool, self._hang_up = _start_pool(processes)
        self.most_waiting = 1 if processes == 1 else 2 * processes

    def __enter__(self) -> Encoders:
        """Return the encoders; their processes have started."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for submitted tasks, or end them after an exception.  Raises MachineError where a process died."""
        if not self._pool or not self._hang_up:
            return
        if kind:
            self._hang_up.close()
        self._pool.shutdown(cancel_futures=True)
        self._hang_up.close()
        if isinstance(error, BrokenProcessPool):
            raise MachineError(
                "A packing process died.",
                "Most often the system ran out of memory and ended it.",
                "Pack again with fewer `processes`; finished shards are kept.",
            ) from error

    def submit(self, task: EncodeTask) -> Callable[[], tuple[Path, dict[str, Any]]]:
        """Return a function that waits for the task and returns the written file and its counts for the sidecar."""
        if self._pool:
            return self._pool.submit(encode, task).result
        return functools.partial(run_interruptibly, functools.partial(encode, task))


def _start_pool(processes: int) -> tuple[ProcessPoolExecutor, Connection]:
    """Return the pool and a connection; the workers exit when it is closed, or when this process dies."""
    context = multiprocessing.get_context("spawn")
    listen, hang_up = context.Pipe(duplex=False)
    if sys.platform == "win32":
        processes = min(processes, 61)  # Windows cannot wait for more at once, and ProcessPoolExecutor refuses more
    return ProcessPoolExecutor(processes, context, _prepare_worker, (listen,)), hang_up


def _prepare_worker(listen: Connection) -> None:
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(listen,), daemon=True).start()


def _end_with_parent(listen: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        listen.recv_bytes()
    os._exit(1)


def encode(task: EncodeTask) -> tuple[Path, dict[str, Any]]:
    """Write the ids of a task's documents to a file beside its target; return its path, and counts for the sidecar."""
    tokenizer = _load_tokenizer(task.tokenizer, task.tokenizer_hash)
    dtype = DTYPES[task.dtype]
    bos = np.array([tokenizer.bos_id], dtype)
    ids: list[np.ndarray] = []
    text_bytes = 0
    for text in task.texts:
        ids.append(bos)
        # Another program's tokenizer may look beyond the end of a line, so its texts are not cut.
        for piece in cut_at_lines(text) if type(tokenizer) is Tokenizer else [text]:
            composed = nfc(piece)
            ids.append(tokenizer.encode_array(composed).astype(dtype))
            # A model predicts the bytes of the text that the ids stand for, which is in NFC.
            text_bytes += count_bytes(composed)
    joined = np.concatenate(ids)
    data = joined.data.cast("B")
    # The name contains the thread's id: a thread that Ctrl-C left running may still write its own file.
    beside = task.target.with_name(f"{task.target.name}.{threading.get_native_id()}.tmp")
    with explain_full_disk(task.target.parent, data.nbytes), open(beside, "wb") as file:
        task.disk.preallocate(file, data.nbytes)
        task.disk.write_handle(file, data)
        task.disk.sync_handle(file)
    counts = {"tokens": len(joined), "documents": len(task.texts), "text_bytes": text_bytes}
    return beside, counts | {"sha256": hashlib.sha256(data).hexdigest()}


def cut_at_lines(text: str) -> Iterator[str]:
    """Yield a text in pieces of about a million characters; their ids are the same as those of the whole text.

    A cut is after a line feed and before a character that is not white space: no match of our pre-tokenizer crosses it,
    no run of white space is split, and no composed form begins with a line feed.
    """
    start = 0
    while len(text) - start >= 2 * _PIECE_CHARACTERS and (match := _LINE_START.search(text, start + _PIECE_CHARACTERS)):
        if len(text) - match.end() < _PIECE_CHARACTERS:
            break
        yield text[start : match.end()]
        start = match.end()
    yield text[start:] if start else text


@functools.lru_cache(1)
def _load_tokenizer(directory: Path, expected_hash: str) -> Tokenizer:
    tokenizer = load_tokenizer(directory)
    if tokenizer.hash != expected_hash:
        why = "Another process wrote to that folder."
        raise TokenizerError(f"The tokenizer in {directory} has changed.", why, "Pack again.")
    return tokenizer
