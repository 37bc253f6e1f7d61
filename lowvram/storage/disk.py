"""Writing that survives a power cut: the only module that syncs, renames, preallocates and deletes.

Knows what each system can do: Windows cannot sync a directory, nor replace a file that is mapped; macOS needs
F_FULLFSYNC and has no posix_fallocate.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lowvram.errors import DiskFullError
from lowvram.units import show_bytes

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
# Errors of file systems that do not support a kind of sync: network and FAT drives, containers' mounts.
_UNSUPPORTED = {getattr(errno, name, errno.EINVAL) for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOTTY")}
_READ_BYTES = 1 << 20


class Disk:
    """The operations that change the disk, in one object so that a test can make any of them fail."""

    def sync_file(self, path: Path) -> None:
        """Sync a file: return only when the bytes of `path` are on the drive."""
        with open(path, "rb+") as file:
            self.sync_handle(file)

    def sync_handle(self, file: IO[bytes]) -> None:
        """Like `sync_file`, for a file that is open for writing."""
        file.flush()
        if sys.platform == "darwin":
            import fcntl

            # fsync on macOS leaves the bytes in the drive's cache (Apple, fsync(2)).
            try:
                fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
                return
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
        os.fsync(file.fileno())

    def sync_directory(self, path: Path) -> None:
        """Return only when the names in the directory `path` are on the drive; on Windows, which cannot, do nothing."""
        if sys.platform == "win32":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename, replacing a file of that name, and sync the directory, so that the name survives a power cut."""
        os.replace(source, target)
        self.sync_directory(target.parent)

    def write(self, path: Path, data: bytes) -> None:
        """Write `path` whole or not at all: to a temporary file beside it, which is synced and then renamed."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with explain_full_disk(path.parent, len(data)):
            try:
                with open(temporary, "wb") as file:
                    self.write_handle(file, data)
                    self.sync_handle(file)
                self.rename(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def write_with(self, path: Path, write: Callable[[Path], None]) -> None:
        """Let `write` create the file `path`, which has a temporary name or directory, and sync it."""
        write(path)
        self.sync_file(path)

    def write_handle(self, file: IO[bytes], data: bytes | memoryview) -> None:
        """Write bytes to an open file, not through a mapping, so that a full disk raises an error and no signal."""
        file.write(data)

    def preallocate(self, file: IO[bytes], size_bytes: int) -> None:
        """Reserve `size_bytes` for an open file, or raise OSError(ENOSPC) now instead of half-way."""
        # Checked first: a reservation that fails half-way keeps what it took, and so fills the disk for everybody.
        if free_bytes(Path(file.name).parent) < size_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        if size_bytes and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            except OSError:
                file.truncate(0)
                raise

    def write_preallocated(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file under a temporary name, its space reserved before; it is on the drive when this returns."""
        with explain_full_disk(path.parent, len(data)), open(path, "wb") as file:
            self.preallocate(file, len(data))
            self.write_handle(file, data)
            self.sync_handle(file)

    def link(self, source: Path, target: Path) -> bool:
        """Let `target`, a temporary name, mean the bytes of a file that never changes; a copy where links are refused.

        Windows gets a copy, too: there no name of a file can be replaced or deleted while a process maps the file.
        Returns whether no bytes were copied.  A copy is on the drive when this returns.
        """
        if sys.platform != "win32":
            try:
                os.link(source, target)
                return True
            except OSError:  # another drive, or a file system without links, each with an error of its own
                target.unlink(missing_ok=True)
        with explain_full_disk(target.parent, source.stat().st_size), open(source, "rb") as whole:
            with open(target, "wb") as copy:
                self.preallocate(copy, source.stat().st_size)
                while block := whole.read(_READ_BYTES):
                    self.write_handle(copy, block)
                self.sync_handle(copy)
        return False

    def delete(self, path: Path) -> None:
        """Delete a file or a whole directory; a directory is renamed first, so that nobody sees a part of it."""
        if path.is_dir() and not path.is_symlink():
            # Made absolute, so that even "." has a name.
            directory = Path(os.path.abspath(path))
            doomed = name_beside(directory, "deleted")
            os.replace(directory, doomed)
            self.remove_tree(doomed, ignore_errors=sys.platform == "win32")
        else:
            path.unlink(missing_ok=True)

    def delete_unless_in_use(self, path: Path) -> bool:
        """Like `delete`, but return False where Windows refuses because a process has a file of it open."""
        try:
            self.delete(path)
        except PermissionError:
            if sys.platform == "win32":
                return False
            raise
        return True

    def remove_tree(self, path: Path, ignore_errors: bool = False) -> None:
        """Remove a directory that nobody reads (a temporary one); with `ignore_errors`, as much of it as possible."""
        shutil.rmtree(path, ignore_errors=ignore_errors)


DISK = Disk()


def name_beside(path: Path, ending: str) -> Path:
    """Return `path` with `.<number>.<ending>` added, a name that does not exist; counts up from this process' id."""
    numbers = itertools.count(os.getpid())
    names = (path.with_name(f"{path.name}.{number}.{ending}") for number in numbers)
    return next(name for name in names if not name.exists())


def free_bytes(path: Path) -> int:
    """Return the bytes that this user can still write on the drive where `path` is or would be."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def explain_full_disk(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "file too large" inside the block into a DiskFullError that says where and how much.

    needed_bytes: what the whole block writes; where given, it replaces the size in an inner block's error.  Other
    errors of the system get `path` as their file name, where they had none.
    """
    try:
        yield
    except (OSError, DiskFullError) as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise DiskFullError(
                f"A file in {path} would be larger than is allowed there.",
                "Either this shell has a limit (ulimit -f), or the file system has one (FAT32: 4 GiB).",
                "Raise the limit, or name another directory; what was finished before is kept.",
            ) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        is_final = needed_bytes is None if isinstance(error, DiskFullError) else error.errno not in _NO_SPACE
        if is_final:
            raise
        need = f" {show_bytes(needed_bytes)} were needed and" if needed_bytes else ""
        raise DiskFullError(
            f"No space left to write in {path}.",
            f"At that moment{need} {show_bytes(free_bytes(path))} were free.",
            "Free some space and type the same command again; what was finished before is kept.",
        ) from error
