"""Writes the demo's generated Turkish as a text file of a stated size, so that it can be a source like others."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from pathlib import Path

from lowvram.data.sample import write_document
from lowvram.storage.disk import DISK, Disk, explain_full_disk

# The stream of documents; `lowvram demo` learns from it too and holds out another one.
SEED = 1
# A source needs at least some windows of text.
LEAST_BYTES = 200_000
_BLOCK_BYTES = 1 << 20


def write_demo_text(folder: Path, size_bytes: int, disk: Disk = DISK) -> Generator[tuple[int, int], None, Path]:
    """Write documents 0, 1, … until they have at least `size_bytes`; yield bytes done and wanted, return the file.

    A longer text begins with a shorter one.  A file of that size which is there already is kept, others are deleted.
    """
    size_bytes = max(LEAST_BYTES, size_bytes)
    file = folder / f"{size_bytes}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.iterdir():
        if other != file and other.name.removesuffix(".tmp").removesuffix(".txt").isdigit():
            disk.delete(other)
    if file.is_file():
        return file
    unfinished = folder / f"{size_bytes}.txt.tmp"
    written, waiting = 0, bytearray()
    with explain_full_disk(folder, size_bytes):
        with open(unfinished, "wb") as handle:
            for number in itertools.count():
                waiting += (write_document(SEED, number) + "\n\n").encode("utf-8")
                is_last = written + len(waiting) >= size_bytes
                if is_last or len(waiting) >= _BLOCK_BYTES:
                    disk.write_handle(handle, bytes(waiting))
                    written += len(waiting)
                    waiting.clear()
                    yield min(written, size_bytes), size_bytes
                if is_last:
                    break
            disk.sync_handle(handle)
        disk.rename(unfinished, file)
    return file
