"""Work beside the event loop: a few threads at once, given up when nobody waits for it; knows no requests.

The threads are daemons, so that a process that was asked to end does not wait for what they do.
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
GoOn = Callable[[], None]  # raises where nobody waits for the result any more


class AbandonedError(LowvramError):
    """Work that nobody waits for any more; it is raised within the work and read by nobody."""


class Workers:
    """Runs functions in threads, so many at once; further ones wait in the order in which they came.

    explain_stop: returns what all work raises from now on, None while it may go on.
    """

    def __init__(self, at_once: int, explain_stop: Callable[[], LowvramError | None] = lambda: None) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._explain_stop = explain_stop
        self.waiting = 0

    async def run(self, work: Callable[[GoOn], Result]) -> Result:
        """Return what `work` returns; raises the LowvramError that it raises.

        work: is given a function to call between its steps.  That one raises once this coroutine was cancelled, or
        where all work stops; until it is called the thread keeps its place.
        """
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        has_left = threading.Event()

        def go_on() -> None:
            if has_left.is_set():
                raise AbandonedError("Nobody waits for this any more.")
            if (stop := self._explain_stop()) is not None:
                raise stop

        thread = threading.Thread(target=self._work, args=(work, go_on, result), name="lowvram-request", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            self._free.release()
            raise
        try:
            return await result
        finally:
            has_left.set()

    def _work(self, work: Callable[[GoOn], Result], go_on: GoOn, result: asyncio.Future[Result]) -> None:
        # Stands where `work` raises what it should not; the thread's own traceback then says more.
        end = partial(result.set_exception, RuntimeError("A request's work ended by a mistake of the server."))
        try:
            go_on()
            end = partial(result.set_result, work(go_on))
        except LowvramError as error:
            end = partial(result.set_exception, error)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                result.get_loop().call_soon_threadsafe(self._leave, end, result)

    def _leave(self, end: Callable[[], None], result: asyncio.Future[Result]) -> None:
        self._free.release()
        if not result.done():
            end()
