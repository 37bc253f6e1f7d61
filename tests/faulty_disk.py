"""The disk's evil twin: fails, fills up or loses power at the n-th operation."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lowvram.storage.disk import Disk


class PowerCut(BaseException):
    """The machine went dark: nothing may catch this, and nothing after it runs."""


class FaultyDisk(Disk):
    """Counts operations and does `fault` at number `at`: "full" raises ENOSPC, "cut" raises PowerCut, "none" nothing.

    A file whose write is interrupted keeps only half of its bytes.
    """

    def __init__(self, fault: str = "none", at: int = -1) -> None:
        self.fault, self.at, self.count = fault, at, 0
        self.seen: list[str] = []

    def _happens(self, name: str, path: Path) -> None:
        self.seen.append(name)
        self.count += 1
        if self.count - 1 != self.at:
            return
        if self.fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if self.fault == "cut":
            raise PowerCut(f"at {name} {path.name}")

    def sync_file(self, path: Path) -> None:
        self._happens("sync_file", path)
        super().sync_file(path)

    def sync_handle(self, file: IO[bytes]) -> None:
        self._happens("sync_handle", Path(file.name))
        super().sync_handle(file)

    def sync_directory(self, path: Path) -> None:
        self._happens("sync_directory", path)
        super().sync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._happens("rename", source)
        super().rename(source, target)

    def write_with(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            self._happens("write_with", path)
        except (OSError, PowerCut):
            write(path)
            os.truncate(path, path.stat().st_size // 2)
            raise
        super().write_with(path, write)

    def write_handle(self, file: IO[bytes], data: bytes | memoryview) -> None:
        try:
            self._happens("write_handle", Path(file.name))
        except (OSError, PowerCut):
            file.write(data[: len(data) // 2])
            file.flush()
            raise
        super().write_handle(file, data)

    def preallocate(self, file: IO[bytes], size_bytes: int) -> None:
        self._happens("preallocate", Path(file.name))
        super().preallocate(file, size_bytes)

    def delete(self, path: Path) -> None:
        self._happens("delete", path)
        super().delete(path)

    def remove_tree(self, path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            self._happens("remove_tree", path)
        super().remove_tree(path, ignore_errors)
