"""Work that Ctrl-C can leave behind although it is native code; knows nothing of data."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_WAIT_S = 0.1


def run_interruptibly(work: Callable[[], _Result]) -> _Result:
    """Return what `work` returns; where Ctrl-C arrives meanwhile, raise KeyboardInterrupt and leave it behind.

    Native code answers no signal until it returns: one word of many megabytes would hold Ctrl-C for as long.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()  # signals reach the main thread alone
    outcome: Future[_Result] = Future()

    def carry_out() -> None:
        with _Passing(outcome):
            outcome.set_result(work())

    # A daemon: Python does not wait for it at its end.
    threading.Thread(target=carry_out, daemon=True).start()
    while not outcome.done():
        # Without a limit Windows would not answer Ctrl-C in this wait.
        with contextlib.suppress(TimeoutError):
            outcome.exception(_WAIT_S)
    return outcome.result()


class _Passing:
    """Hands whatever is raised inside to whoever waits for the outcome."""

    def __init__(self, outcome: Future[Any]) -> None:
        self._outcome = outcome

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        """Pass an exception on."""
        if error:
            self._outcome.set_exception(error)
        return True
