"""Runs native code in a thread, so that Ctrl-C can interrupt the wait for it; knows nothing of data."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from lowvram.finish import finish

_Result = TypeVar("_Result")
_WAIT_S = 0.1


def run_interruptibly(work: Callable[[], _Result]) -> _Result:
    """Return what `work` returns; on Ctrl-C, raise KeyboardInterrupt at once and leave the work running.

    Native code handles no signal until it returns: one word of many megabytes would delay Ctrl-C for as long.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # only the main thread receives signals
    return finish(wait_for(work))


def wait_for(work: Callable[[], _Result]) -> Generator[None, None, _Result]:
    """Do the work in a thread, yield several times a second until it is done, and return what it returns.

    Where the generator is closed or Ctrl-C ends the wait, the work is left running.
    """
    outcome: Future[_Result] = Future()

    def carry_out() -> None:
        with _PassExceptions(outcome):
            outcome.set_result(work())

    # It is a daemon thread, so Python does not wait for it at exit.
    threading.Thread(target=carry_out, daemon=True).start()
    while not outcome.done():
        # Without a timeout, Windows would not handle Ctrl-C during this wait.
        with contextlib.suppress(TimeoutError):
            outcome.exception(_WAIT_S)
        yield
    return outcome.result()


class _PassExceptions:
    """Stores an exception raised inside the block in the future, for the thread that waits for it."""

    def __init__(self, outcome: Future[Any]) -> None:
        self._outcome = outcome

    def __enter__(self) -> None:
        """Do nothing at the start."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        """Store an exception in the future."""
        if error:
            self._outcome.set_exception(error)
        return True
