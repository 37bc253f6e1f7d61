"""A socket, uvicorn on it, and an orderly end: answers that run are finished or told; knows no command line."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from lowvram.errors import MachineError
from lowvram.serve.batch import Batcher

_GRACE_S = 10.0  # answers that run when the server is asked to stop may take so long
_UNREAD_S = 3  # a client that reads nothing holds the end up for no longer than this
_IN_USE = (errno.EADDRINUSE, errno.EACCES)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any that is free.  Raises MachineError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        fix = "Choose another with --port." if error.errno in _IN_USE else "Mend --host."
        why = f"The system says: {error.strerror or error}."
        raise MachineError(f"{host} port {port} cannot be listened on.", why, fix) from error


class Server(uvicorn.Server):
    """uvicorn that lets the batcher end first: one signal waits for the answers that run, a second cuts them."""

    def __init__(self, app: ASGIApp, batcher: Batcher, grace_s: float = _GRACE_S) -> None:
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace_s) + _UNREAD_S,
        )
        super().__init__(config)
        self._batcher, self._grace_s = batcher, grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; asked again, do not wait."""
        self._batcher.stop(0.0 if self.should_exit else self._grace_s)
        self.should_exit = True

    def serve_on(self, listening: socket.socket) -> None:
        """Answer until a signal comes; returns when every answer has ended."""
        self._batcher.start()
        try:
            with _survive_signals():
                self.run(sockets=[listening])
        finally:
            self._batcher.stop()
            self._batcher.join()
            listening.close()


@contextmanager
def _survive_signals() -> Iterator[None]:
    """uvicorn raises the signals that ended it once more; they have done their work by then."""
    try:
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        # Signals belong to the main thread; in another one uvicorn leaves them alone, too.
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
