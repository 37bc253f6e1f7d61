"""Signals that end a command (Ctrl-C, SIGTERM, a closed terminal): what hears them, and how long; knows no work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

# The exit code of a command that a signal ended before it could save.
INTERRUPTED = 130
# Sent when the terminal closes; on Windows Ctrl-Break, and the closing of the console, are another signal.
HANG_UP = getattr(signal, "SIGHUP", None)
_BREAK = getattr(signal, "SIGBREAK", None)
# What `train --supervise` sends its process when it is asked to end.  That process may have heard the same request
# itself, as every process of a terminal or of a session does, so this one is never counted as its repetition.
FROM_SUPERVISOR = getattr(signal, "SIGUSR1", None)
# A closed terminal may send SIGHUP more than once.
_NEVER_AT_ONCE = (HANG_UP, FROM_SUPERVISOR)


class Terminated(SystemExit):
    """Raised where SIGTERM or a closed terminal ends a command, so that files, locks and processes are left in order.

    It is no KeyboardInterrupt: Ctrl-C may end one answer or one step, and these end the whole command.
    """


@contextmanager
def heard_signals(hear: Callable[[int, object], None], with_interrupt: bool = True) -> Iterator[None]:
    """Let `hear` handle SIGTERM, a closed terminal, a supervisor and, `with_interrupt`, Ctrl-C inside the block.

    SIGHUP that was ignored when the process began, as nohup does, stays ignored.  Outside of the main thread, which
    alone receives signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT] if with_interrupt else []
    numbers += [number for number in (signal.SIGTERM, HANG_UP, FROM_SUPERVISOR, _BREAK) if number is not None]
    heard = [number for number in numbers if number != HANG_UP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def means_at_once(number: int, asked: Collection[int]) -> bool:
    """Say whether a signal, after those that were heard before it, asks for an end at once, without saving."""
    return number in asked and number not in _NEVER_AT_ONCE


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise Terminated inside the block at SIGTERM or when the terminal closes; SIGTERM again ends the process at once.

    The end of a session may send SIGTERM and SIGHUP together, and a terminal that closes SIGHUP more than once.
    """
    asked: set[int] = set()

    def end(number: int, _frame: object) -> None:
        if means_at_once(number, asked):
            os._exit(INTERRUPTED)
        is_first = not asked
        asked.add(number)
        if is_first:
            raise Terminated(INTERRUPTED)

    with heard_signals(end, with_interrupt=False):
        yield
