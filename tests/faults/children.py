"""Child processes that train and are killed; a server that has torch loaded forks them, so they begin at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from lowvram.config.run import RunConfig
from lowvram.storage.disk import Disk
from lowvram.train import background_save
from tests.faults.rule import train
from tests.faulty_disk import FaultyDisk

WAIT_S = 60.0
# What the server has loaded; torch's optimizers load torch._dynamo, which takes a second.
_LOADED = ["lowvram.train.prepare", "tests.faults.rule", "tests.faults.children", "torch._dynamo", "torch.profiler"]


class SlowDisk(Disk):
    """A disk on which a save takes so long that random moments fall inside one."""

    def sync_directory(self, path: Path) -> None:
        time.sleep(0.002)
        super().sync_directory(path)


class KillingDisk(FaultyDisk):
    """A disk that kills its process, as `kill -9` does, at operation `at`; half of what was being written stands."""

    def __init__(self, at: int) -> None:
        super().__init__("cut", at)

    def _happens(self, name: str, path: Path) -> None:
        self.seen.append(name)
        self.count += 1
        if self.count - 1 == self.at:
            if name in ("write_handle", "write_with"):
                self.at = -2  # the caller writes half of it first
                raise _HalfWritten
            die()

    def write_with(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            self._happens("write_with", path)
        except _HalfWritten:
            write(path)
            os.truncate(path, path.stat().st_size // 2)
            die()
        Disk.write_with(self, path, write)

    def write_handle(self, file: Any, data: Any) -> None:
        try:
            self._happens("write_handle", Path(file.name))
        except _HalfWritten:
            file.write(data[: len(data) // 2])
            file.flush()
            die()
        Disk.write_handle(self, file, data)


class _HalfWritten(BaseException):
    """A write is to stop half-way."""


def die() -> NoReturn:
    """End this process as `kill -9` would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL is never handled")


def train_on(what: RunConfig, disk: Disk) -> None:
    """Train in this child process; `train` with a disk that a parent made."""
    train(what, disk)


def train_and_save_beside(what: RunConfig, disk: Disk) -> None:
    """Train in this child process, and write every checkpoint in the thread beside training, however small it is."""
    background_save.LEAST_COPIED_BYTES = 0
    train(what, disk)


def start(work: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Start a child process that does `work`, and return it."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_LOADED)
    child = server.Process(target=work, args=arguments)
    child.start()
    return child


def end_of(work: Callable[..., object], *arguments: Any) -> int | None:
    """Do `work` in a child process and return its exit code: 0, or minus the signal that ended it."""
    child = start(work, *arguments)
    child.join(WAIT_S)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def is_at(run: Path, sign: str, pid: int | None) -> bool:
    """Say whether the child `pid` holds the run, and has written the file `sign` (a pattern) since it began."""
    try:
        owner = run / "owner"
        holds = owner.read_text().strip() == str(pid)
        return holds and (
            sign == "owner" or any(path.stat().st_mtime >= owner.stat().st_mtime for path in run.glob(sign))
        )
    except FileNotFoundError:  # not begun, or the draft was given its name between two looks
        return False


def kill_at(what: RunConfig, sign: str, within_s: float, moments: random.Random) -> int | None:
    """Let a child train on a slow disk, and kill it at a random moment after a sign of it; returns its exit code."""
    child = start(train_on, what, SlowDisk())
    until_s = time.monotonic() + WAIT_S
    while child.is_alive() and not is_at(what.run.dir, sign, child.pid):
        assert time.monotonic() < until_s, "the child hangs"
        time.sleep(0.001)
    child.join(moments.uniform(0.0, within_s))
    child.kill()
    child.join()
    return child.exitcode
