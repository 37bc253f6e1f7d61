"""Locks a folder or a file that one process at a time writes to; where nothing was written, nothing stays behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from lowvram.errors import LowvramError


@contextmanager
def locked_folder(folder: Path, name: str, is_no_folder: LowvramError, is_busy: LowvramError) -> Iterator[None]:
    """Make the folder where it does not exist, and hold the file `name` in it as its lock.

    At the end a folder that holds nothing else is deleted, with those above it that were made for it.  Even kill -9
    releases the lock.  Raises `is_no_folder` where a file is in the way, `is_busy` where another process has the lock.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / name, timeout=0)
        lock.acquire()
    except (FileExistsError, NotADirectoryError) as error:
        raise is_no_folder from error
    except filelock.Timeout as error:
        raise is_busy from error
    try:
        yield
    finally:
        is_empty = folder.is_dir() and {path.name for path in folder.iterdir()} <= {name}
        if is_empty:
            # Deleted before it is released, so that nobody locks a file that is about to go; Windows deletes it itself.
            with contextlib.suppress(PermissionError):
                (folder / name).unlink(missing_ok=True)
        lock.release()
        if is_empty:
            # Another process may be writing there by now.
            with contextlib.suppress(OSError):
                for each in made:
                    each.rmdir()


@contextmanager
def locked_file(file: Path, is_busy: LowvramError) -> Iterator[None]:
    """Hold FILE.lock, which is deleted at the end; raises `is_busy` where another process has it."""
    path = file.parent / f"{file.name}.lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise is_busy from error
    try:
        yield
    finally:
        # As above: before it is released.
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
        lock.release()
