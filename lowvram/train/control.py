"""Hears what another terminal asks of a run, and writes down what the run does; pauses and stops nothing itself.

A thread looks at the file twice a second, so that a request is answered at once also where a step takes a minute.
"""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lowvram.errors import DiskFullError
from lowvram.storage.control_file import (
    CONTROL,
    Asks,
    RunState,
    Status,
    read_request,
    withdraw_request,
    write_status,
)
from lowvram.storage.disk import DISK, Disk

POLL_S = 0.5


class Control:
    """What was asked of a run since its start, and what is told of it.

    is_pause_asked, is_stop_asked: other threads may read them at any time.
    """

    def __init__(self, run: Path, disk: Disk = DISK) -> None:
        self.is_pause_asked = self.is_stop_asked = False
        self._run, self._disk = run, disk
        self._stop: Callable[[], None] | None = None
        self._stamp: tuple[int, int] | None = None
        self._written: Status | None = None
        self._status = Status(start=uuid.uuid4().hex, pid=os.getpid(), host=socket.gethostname())
        self._busy, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Say that the run is starting, and listen from now on."""
        self.poll()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="lowvram-control")
        self._thread.start()

    def attach(self, stop: Callable[[], None]) -> None:
        """Let `stop` be called, in this object's thread, where a stop is asked for; now, where it was asked before."""
        with self._busy:
            self._stop = stop
        if self.is_stop_asked:
            stop()

    def tell(self, state: RunState, step: int, why: str = "", is_asked: bool = False) -> None:
        """Note what the run does; it is written by the thread, for training once and not after every step."""
        with self._busy:
            told = {"state": state, "step": step, "why": why, "is_asked": is_asked}
            self._status = self._status.model_copy(update=told)

    def poll(self) -> None:
        """Read the request where there is a new one, and write the status where it has changed."""
        with self._busy:
            asks = self._read()
            self._write()
        if asks == "stop" and self._stop is not None:
            self._stop()

    def close(self) -> None:
        """Listen no more, and say that the run has ended."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with self._busy:
            self._status = self._status.model_copy(update={"state": "ended", "is_asked": False})
            self._write()
            with suppress(OSError):
                withdraw_request(self._run, disk=self._disk)

    def _listen(self) -> None:
        while not self._ended.wait(POLL_S):
            self.poll()

    def _read(self) -> Asks | None:
        """Return what is asked for in a request that was not read before."""
        try:
            found = os.stat(self._run / CONTROL)
        except OSError:  # there is none, or the drive does not answer for a moment
            return None
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp == self._stamp:
            return None
        request = read_request(self._run)
        if request is None:  # Windows may refuse to open it for a moment; what is broken is read again and again
            return None
        self._stamp = stamp
        if request.start != self._status.start:
            return None
        if request.asks == "stop":  # a pause lasts until the run has ended
            self.is_stop_asked = True
        else:
            self.is_pause_asked = request.asks == "pause"
        self._status = self._status.model_copy(update={"heard": request.id})
        return request.asks

    def _write(self) -> None:
        if self._written is not None and not _differs(self._written, self._status):
            return
        try:
            write_status(self._run, self._status, self._disk)
        except (DiskFullError, OSError):  # a full drive, or a directory that is gone: the run itself says so
            return
        self._written = self._status


@contextmanager
def hear_requests(run: Path) -> Iterator[Control]:
    """Hear what is asked of the run in a directory inside the block."""
    control = Control(run)
    control.start()
    try:
        yield control
    finally:
        control.close()


def _differs(written: Status, now: Status) -> bool:
    """Say whether a status is worth a write: the step of a run that trains is not."""
    ignored = {"step": written.step} if now.state == written.state == "training" and now.heard == written.heard else {}
    return now.model_copy(update=ignored) != written
