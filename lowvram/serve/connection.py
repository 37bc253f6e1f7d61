"""One client's connection: how long its request and its reading may take, and what its end means; knows no requests.

uvicorn reads and writes HTTP.  It has no time limit for headers or for answers that nobody reads, and gives up a client
that closes its sending side behind its request, as `nc -N` does.
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

# A client that sends nothing more has perhaps gone, which only writing to it tells: the first write after it went is
# answered by a reset, and the second one fails.
_PROBES_S = (0.1, 1.0)


class Connection(H11Protocol):
    """A connection of the server.  since: from when on the server has waited for the client to send or to read.

    is_refused: whether the server has no room for it, which it is told.
    """

    def __init__(
        self, config: Config, state: ServerState, app_state: dict[str, Any], limits: Limits, is_refused: bool = False
    ) -> None:
        super().__init__(config, state, app_state)
        self.since = time.monotonic()
        self._limits, self._is_refused = limits, is_refused
        self._headers: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._unread_bytes = 0  # when they were last looked at
        self._is_half_closed = self._has_sent = False

    @property
    def is_answering(self) -> bool:
        """Whether the client waits for the server: its request is whole, and what was written of the answer is read."""
        return self._owes_answer and self._unread is None

    @property
    def _owes_answer(self) -> bool:
        """Whether a whole request has come and its answer has not all been written."""
        is_whole = self.conn.their_state in (h11.DONE, h11.MUST_CLOSE)
        return self.cycle is not None and not self.cycle.response_complete and is_whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if self._is_refused:
            self.refuse(503, "The server has as many connections as it takes.  Ask again in a moment.", "server_error")
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        for timer in (self._headers, self._unread, self._probe):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sent.  However often it sends a byte, its headers must be complete in time."""
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
        """Return whether the connection stays: it does until a request that is all here is answered."""
        self._is_half_closed = True
        if self._owes_answer:
            self._probe_client(0)
        return self._owes_answer

    def on_response_complete(self) -> None:
        """Wait for the next request, where one can come."""
        self.since = time.monotonic()
        self._has_sent = False
        super().on_response_complete()
        if self._is_half_closed and not self._owes_answer:
            self.transport.close()

    def pause_writing(self) -> None:
        """Wait until the client reads what was sent, as long as it reads at all."""
        super().pause_writing()
        self.since = time.monotonic()
        self._await_reader()

    def resume_writing(self) -> None:
        """Go on writing."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, or has longer headers than are read."""
        self.refuse(400, f"{msg}  Send HTTP/1.1, with headers of at most {self._limits.header_bytes} bytes.")

    def refuse(self, status: int, message: str, kind: str = "invalid_request_error") -> None:
        """Answer a request that did not come, or not as one, and close."""
        body = to_json(error_body(message, kind))
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode("ascii") + body)
        self.transport.close()

    def _should_upgrade(self) -> bool:
        # Whoever asks for another protocol may be answered in this one (RFC 9110, 7.8).
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
        """Give up a client that has read nothing; one large answer may take a slow one many times as long."""
        if self.transport.get_write_buffer_size() >= self._unread_bytes:
            self.transport.abort()
        else:
            self.since = time.monotonic()
            self._await_reader()

    def _probe_client(self, number: int) -> None:
        """Tell the client to go on waiting, which every client of HTTP/1.1 passes over (RFC 9110, 15.2)."""
        if self.transport.is_closing() or not self._owes_answer:
            return
        # Once an answer has begun, its own pieces tell.  HTTP/1.0 knows no such message.
        if self.conn.our_state is h11.SEND_RESPONSE and self.conn.their_http_version != b"1.0":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            wait_s = _PROBES_S[min(number, len(_PROBES_S) - 1)]
            self._probe = self.loop.call_later(wait_s, self._probe_client, number + 1)
