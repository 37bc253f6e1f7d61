"""Runs work in a few threads beside the event loop, and cancels it when nobody waits for it; knows no requests.

The threads are daemons, so that a process that was asked to end does not wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from lowvram.errors import LowvramError

Result = TypeVar("Result")
CancelCheck = Callable[[], None]  # raises if nobody waits for the result any more


class AbandonedError(LowvramError):
    """Raised inside work that nobody waits for any more, to end it; no user sees it."""


class Workers:
    """Runs functions in threads, `at_once` at a time; further ones wait in the order of their calls.

    explain_stop: returns the error that all work raises from now on, None while work may go on.
    """

    def __init__(self, at_once: int, explain_stop: Callable[[], LowvramError | None] = lambda: None) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._explain_stop = explain_stop
        self.waiting = 0

    async def run(self, work: Callable[[CancelCheck], Result]) -> Result:
        """Return what `work` returns; raises the LowvramError that it raises.

        work: gets a function to call between its steps, which raises if this coroutine was cancelled or all work stops.
        Cancelled work occupies its thread until it calls that function.
        """
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        is_cancelled = threading.Event()

        def check_cancelled() -> None:
            if is_cancelled.is_set():
                raise AbandonedError("Nobody waits for this any more.")
            if (stop := self._explain_stop()) is not None:
                raise stop

        thread = threading.Thread(
            target=self._work, args=(work, check_cancelled, result), name="lowvram-request", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # the system allows no more threads
            self._free.release()
            raise
        try:
            return await result
        finally:
            is_cancelled.set()

    def _work(
        self, work: Callable[[CancelCheck], Result], check_cancelled: CancelCheck, result: asyncio.Future[Result]
    ) -> None:
        # The outcome if `work` raises anything but a LowvramError; the thread's own traceback then says more.
        complete = partial(result.set_exception, RuntimeError("A request's work ended by a fault of the server."))
        try:
            check_cancelled()
            complete = partial(result.set_result, work(check_cancelled))
        except LowvramError as error:
            complete = partial(result.set_exception, error)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                result.get_loop().call_soon_threadsafe(self._finish, complete, result)

    def _finish(self, complete: Callable[[], None], result: asyncio.Future[Result]) -> None:
        self._free.release()
        if not result.done():
            complete()
