"""A socket, its clients, and an orderly end: answers that run are finished or told; knows no command line."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from lowvram.errors import MachineError
from lowvram.serve.connection import Connection
from lowvram.serve.limits import BACKLOG, OWN_FILES, SEND_BUFFER, Limits
from lowvram.serve.scheduler import Scheduler

try:
    import resource
except ImportError:  # Windows, which limits no process's files
    resource = None  # type: ignore[assignment]

_GRACE_S = 10.0  # answers that run when the server is asked to stop may take so long
_UNREAD_S = 3  # a client that reads nothing holds the end up for no longer than this
_IN_USE = (errno.EADDRINUSE, errno.EACCES)
_FEWEST_CONNECTIONS = 8  # also where the system allows hardly any file: those that cannot be accepted wait
# After the system had no room for another connection: until one has been closed, and where there is none to close.
_CLOSING_S, _RETRY_S = 0.005, 0.2
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes any that is free.  Raises MachineError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        fix = "Choose another with --port." if error.errno in _IN_USE else "Mend --host."
        why = f"The system says: {error.strerror or error}."
        raise MachineError(f"{host} port {port} cannot be listened on.", why, fix) from error


def find_most_connections(wanted: int) -> int:
    """Return how many connections the system lets this process have, at most `wanted`; asks it for that many."""
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted + OWN_FILES:
        most = wanted + OWN_FILES if hard == resource.RLIM_INFINITY else min(wanted + OWN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        return max(_FEWEST_CONNECTIONS, min(wanted, max(soft, most) - OWN_FILES))
    return wanted


class Server(uvicorn.Server):
    """uvicorn with limits on its connections, that lets the batcher end first.

    One signal waits for the answers that run, a second cuts them.
    """

    def __init__(self, app: ASGIApp, batcher: Scheduler, limits: Limits, grace_s: float = _GRACE_S) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="error",  # its warnings are of what clients do wrong, and those are told
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=limits.header_bytes,
            timeout_graceful_shutdown=int(grace_s) + _UNREAD_S,
        )
        super().__init__(config)
        self._batcher, self._limits, self._grace_s = batcher, limits, grace_s
        self._most_connections = find_most_connections(limits.connections)
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept.  asyncio's own way to do it logs a traceback for each try beyond the limit of files."""
        self.servers: list[asyncio.Server] = []
        self._accepting = [asyncio.create_task(self._accept(listening)) for listening in sockets or ()]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept nothing more, and wait for the answers that are on their way."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        await super().shutdown(sockets)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError as error:
                # sock_accept fails without giving way: without a wait here nothing else in the process would ever run.
                await asyncio.sleep(self._find_wait_s(error))
                continue
            is_full = len(self.server_state.connections) >= self._most_connections
            is_refused = is_full and not self._close_longest_waiting()

            def connect(is_refused: bool = is_refused) -> Connection:
                return Connection(self.config, self.server_state, self.lifespan.state, self._limits, is_refused)

            try:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                await loop.connect_accepted_socket(connect, client)
            except OSError:  # the client has gone
                client.close()

    def _find_wait_s(self, error: OSError) -> float:
        """Return how long to wait before the next try to accept; closes a connection where there is no room for one."""
        if error.errno == errno.ECONNABORTED:
            return 0.0  # the client has gone already, and the next one may be there
        return _CLOSING_S if error.errno in _FULL and self._close_longest_waiting() else _RETRY_S

    def _close_longest_waiting(self) -> bool:
        """Close the connection whose client has sent no whole request, or read nothing, for the longest time.

        Returns whether there was one.
        """
        connections = [one for one in self.server_state.connections if isinstance(one, Connection)]
        longest = min((one for one in connections if not one.is_answering), key=lambda one: one.since, default=None)
        if longest is None:
            return False
        self.server_state.connections.discard(longest)
        longest.transport.abort()
        return True

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
