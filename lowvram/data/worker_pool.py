"""Processes that do work in order and end at once on request, or when this process dies; knows no work."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Generic, TypeVar

from lowvram.data.interruptible import run_interruptibly
from lowvram.errors import MachineError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


class WorkerPool(Generic[_Task, _Result]):
    """Applies one function to tasks; processes = 1 means in this process.  If an exception leaves the block, all ends.

    work: a function at the top of a module.  what: the work in one word, and fix: what to do where a process died.
    """

    def __init__(self, processes: int, work: Callable[[_Task], _Result], what: str, fix: str) -> None:
        self._work, self._what, self._fix = work, what, fix
        self._pool: ProcessPoolExecutor | None = None
        self._hang_up: Connection | None = None
        if processes > 1:
            self._pool, self._hang_up = _start_pool(processes)
        self.most_waiting = 1 if processes == 1 else 2 * processes

    def __enter__(self) -> WorkerPool[_Task, _Result]:
        """Return the pool; its processes have started."""
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
            why = "Most often the system ran out of memory and ended it."
            raise MachineError(f"A {self._what} process died.", why, self._fix) from error

    def submit(self, task: _Task) -> Callable[[], _Result]:
        """Return a function that waits for the task and returns its result."""
        if self._pool:
            return self._pool.submit(self._work, task).result
        return functools.partial(run_interruptibly, functools.partial(self._work, task))


def _start_pool(processes: int) -> tuple[ProcessPoolExecutor, Connection]:
    """Return the pool and a connection; the workers exit when it is closed, or when this process dies."""
    context = multiprocessing.get_context("spawn")
    _start_tracker()
    listen, hang_up = context.Pipe(duplex=False)
    if sys.platform == "win32":
        processes = min(processes, 61)  # Windows cannot wait for more at once, and ProcessPoolExecutor refuses more
    return ProcessPoolExecutor(processes, context, _prepare_worker, (listen,)), hang_up


def _start_tracker() -> None:
    """Start the process in which Python counts semaphores, so that no hang-up ends it.

    It ignores Ctrl-C and SIGTERM by itself; where it dies before this process, a traceback appears in the terminal.
    """
    if sys.platform != "win32":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            resource_tracker.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker(listen: Connection) -> None:
    # Ctrl-C and the end of a session reach the whole process group; only the parent handles them.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(listen,), daemon=True).start()


def _end_with_parent(listen: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        listen.recv_bytes()
    os._exit(1)
