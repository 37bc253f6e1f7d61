"""A file that keeps space free on a run's drive, so that the last save fits where the drive fills up.

Knows no checkpoint: how much is kept is what its owner says.
"""

from __future__ import annotations

import os
from pathlib import Path

from lowvram.errors import DiskFullError
from lowvram.storage.disk import DISK, Disk, explain_full_disk, free_bytes
from lowvram.units import show_bytes

_NAME = "reserve"
_BLOCK_BYTES = 1 << 20


def explain_too_little_room(run: Path, size_bytes: int) -> str:
    """Return a sentence about a drive that has too little room for the next save."""
    free = show_bytes(free_bytes(run))
    return f"The next checkpoint in {run} needs {show_bytes(size_bytes)}, and {free} are free."


class Reserve:
    """The file `reserve` of a run directory."""

    def __init__(self, run: Path, disk: Disk = DISK) -> None:
        self._path, self._disk = run / _NAME, disk

    def take(self, size_bytes: int) -> bool:
        """Let the file have `size_bytes`; return whether it has them, False where the drive has too little room."""
        if self._path.is_file() and self._path.stat().st_size == size_bytes:
            return True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.give_back()
        try:
            with explain_full_disk(self._path.parent, size_bytes), open(self._path, "xb") as file:
                self._disk.preallocate(file, size_bytes)
                if not hasattr(os, "posix_fallocate"):  # a file that was only made longer may take no space
                    for start in range(0, size_bytes, _BLOCK_BYTES):
                        self._disk.write_handle(file, bytes(min(_BLOCK_BYTES, size_bytes - start)))
                    self._disk.sync_handle(file)
        except DiskFullError:
            self.give_back()
            return False
        return True

    def give_back(self) -> bool:
        """Delete the file; return whether there was one."""
        was_there = self._path.exists()
        self._disk.delete(self._path)
        return was_there
