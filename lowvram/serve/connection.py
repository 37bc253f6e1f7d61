"""One client's connection: time limits for its headers and for its reading, and half-closed clients; knows no paths.

uvicorn reads and writes HTTP.  It has no time limit for headers or for answers that nobody reads, and it drops a client
that closes its sending side after its request, as `nc -N` does.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from lowvram.serve.limits import Limits
from lowvram.serve.responses import error_body, to_json

# A client that has closed its sending side may be gone altogether, and only writing to it shows that: the first write
# after it has gone is answered by a reset, and the second one fails.
_PROBES_S = (0.1, 1.0)


class Connection(H11Protocol):
    """A connection of the server.

    waiting_since: the time (time.monotonic) from which on the server has waited for the client to send or to read.
    is_refused: the server has no room for this connection, and answers it with 503.
    """

    def __init__(
        self, config: Config, state: ServerState, app_state: dict[str, Any], limits: Limits, is_refused: bool = False
    ) -> None:
        super().__init__(config, state, app_state)
        self.waiting_since = time.monotonic()
        self._limits, self._is_refused = limits, is_refused
        self._headers: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._unread_bytes = 0  # size of the write buffer at the last check
        self._is_half_closed = self._has_sent = False

    @property
    def is_answering(self) -> bool:
        """Whether the client waits for the server: its request is complete, and it has read what was written so far."""
        return self._owes_answer and self._unread is None

    @property
    def _owes_answer(self) -> bool:
        """Whether a request has arrived completely and its answer is not completely written."""
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return self.cycle is not None and not self.cycle.response_complete and is_whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if self._is_refused:
            self.refuse(503, "The server has no room for another connection. Ask again in a moment.", "server_error")
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all timers."""
        for timer in (self._headers, self._unread, self._probe):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent.  Sending a byte now and then does not extend the time limit for the headers."""
        if self.transport.is_closing():
            return
        self._has_sent = True
        if self.cycle is None or self.cycle.response_complete:
            self._await_headers()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete and self._headers is not None:
            self._headers.cancel()
            self._headers = None

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open: it does while a complete request is not answered yet."""
        self._is_half_closed = True
        if self._owes_answer:
            self._probe_client(0)
        return self._owes_answer

    def on_response_complete(self) -> None:
        """Wait for the next request, where one can come."""
        self.waiting_since = time.monotonic()
        self._has_sent = False
        super().on_response_complete()
        if self._is_half_closed and not self._owes_answer:
            self.transport.close()

    def pause_writing(self) -> None:
        """Wait until the client reads what was sent, for as long as it makes progress."""
        super().pause_writing()
        self.waiting_since = time.monotonic()
        self._await_reader()

    def resume_writing(self) -> None:
        """Go on writing."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, or has headers above the limit."""
        self.refuse(400, f"{msg} Send HTTP/1.1, with headers of at most {self._limits.header_bytes} bytes.")

    def refuse(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        """Send an error without a complete request, and close the connection."""
        body = to_json(error_body(message, kind))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii") + body)
        self.transport.close()

    def _should_upgrade(self) -> bool:
        # A request to upgrade to another protocol may be ignored (RFC 9110, 7.8).
        return False

    def _await_headers(self) -> None:
        if self._headers is None:
            self._headers = self.loop.call_later(self._limits.header_wait_s, self._give_up_headers)

    def _give_up_headers(self) -> None:
        if self.transport.is_closing():
            return
        if self._has_sent:
            self.refuse(408, f"The request's headers did not come within {self._limits.header_wait_s:g} s.")
        else:
            self.transport.close()

    def _await_reader(self) -> None:
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(self._limits.unread_wait_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Drop a client that has read nothing since the last check; one that reads slowly may take any time."""
        if self.transport.get_write_buffer_size() >= self._unread_bytes:
            self.transport.abort()
        else:
            self.waiting_since = time.monotonic()
            self._await_reader()

    def _probe_client(self, number: int) -> None:
        """Send 100 Continue, which every HTTP/1.1 client ignores (RFC 9110, 15.2), to notice a client that is gone."""
        if self.transport.is_closing() or not self._owes_answer:
            return
        # Once an answer has begun, writing its own pieces shows it.  HTTP/1.0 has no 100 Continue.
        if self.conn.our_state is h11.SEND_RESPONSE and self.conn.their_http_version != b"1.0":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            wait_s = _PROBES_S[min(number, len(_PROBES_S) - 1)]
            self._probe = self.loop.call_later(wait_s, self._probe_client, number + 1)
