"""Encodes documents into the bytes of a shard; knows no folder."""

from __future__ import annotations

import functools
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.data.nfc import nfc
from lowvram.data.shard_set import DTYPES
from lowvram.data.tokenizer import Tokenizer, count_bytes
from lowvram.data.worker_pool import WorkerPool
from lowvram.errors import TokenizerError
from lowvram.storage.disk import Disk

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


def encode_in(processes: int) -> WorkerPool[EncodeTask, tuple[Path, dict[str, Any]]]:
    """Return a pool that encodes tasks in order; a result is the written file and its counts for the sidecar."""
    return WorkerPool(processes, encode, "packing", "Pack again with fewer `processes`; finished shards are kept.")


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
    task.disk.write_preallocated(beside, data)
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
