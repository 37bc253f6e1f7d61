"""Writing that survives a power cut: the only code that syncs, renames, preallocates and deletes.

Knows each system's limits: Windows cannot sync a directory, macOS needs F_FULLFSYNC and has no posix_fallocate.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowvram.errors import DiskFullError
from lowvram.units import show_bytes

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_READ_BYTES = 1 << 20


class Disk:
    """The operations that reach the disk, in one object so that a test can make any of them fail."""

    def sync_file(self, path: Path) -> None:
        """Return only when the bytes of `path` are on the drive."""
        with open(path, "rb+") as file:
            self.sync_handle(file)

    def sync_handle(self, file: IO[bytes]) -> None:
        """Like `sync_file`, for a file that is open for writing."""
        file.flush()
        if sys.platform == "darwin":
            import fcntl

            # fsync on macOS leaves the bytes in the drive's cache (Apple, fsync(2)).
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
        else:
            os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        """Return only when the names inside `path` are on the drive; Windows offers no such call."""
        if sys.platform == "win32":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename, replacing a file of that name, and keep the new name through a power cut."""
        os.replace(source, target)
        self.sync_directory(target.parent)

    def write(self, path: Path, data: bytes) -> None:
        """Write `path` whole or not at all: beside it first, then synced, then renamed."""
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with explain_full_disk(path.parent, len(data)):
            try:
                with open(beside, "wb") as file:
                    self.write_handle(file, data)
                    self.sync_handle(file)
                self.rename(beside, path)
            finally:
                beside.unlink(missing_ok=True)

    def write_handle(self, file: IO[bytes], data: bytes) -> None:
        """Write bytes to an open file: a plain write, so that a full disk is an error and never a signal."""
        file.write(data)

    def preallocate(self, file: IO[bytes], size_bytes: int) -> None:
        """Reserve `size_bytes` for an open file, or raise OSError(ENOSPC) now instead of half-way."""
        # Asked first: a reservation that fails half-way keeps what it took, and so fills the disk for everybody.
        if free_bytes(Path(file.name).parent) < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        if size_bytes and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            except OSError:
                file.truncate(0)
                raise

    def delete(self, path: Path) -> None:
        """Delete a file or a whole directory; a directory loses its name first, so no half of it is ever seen."""
        if path.is_dir():
            doomed = path.with_name(f"{path.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=sys.platform == "win32")
        else:
            path.unlink(missing_ok=True)


DISK = Disk()


def free_bytes(path: Path) -> int:
    """Return the bytes that this user can still write where `path` is or would be."""
    place = path
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def explain_full_disk(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" inside the block into a DiskFullError that says where and how much."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        need = f" {show_bytes(needed_bytes)} were needed and" if needed_bytes else ""
        raise DiskFullError(
            f"No space left to write in {path}.",
            f"At that moment{need} {show_bytes(free_bytes(path))} were free.",
            "Free some space and type the same command again; what was finished before is kept.",
        ) from error
