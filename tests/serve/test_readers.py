"""Clients that do not read what they asked for: they keep nobody out, and who reads slowly gets all of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from lowvram.data.tokenizer import Tokenizer
from lowvram.serve.connection import Connection
from lowvram.serve.limits import SEND_BUFFER, Limits
from tests.serve.place import served
from tests.serve.test_crowd import wait_until

PAGE = b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Client(asyncio.Transport):
    """A connection's other end; unread: bytes that it has not read yet."""

    def __init__(self) -> None:
        super().__init__()
        self.unread, self.is_aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def write(self, data: Any) -> None:
        self.unread += len(data)

    def abort(self) -> None:
        self.is_aborted = True

    close = abort

    def is_closing(self) -> bool:
        return self.is_aborted


class Clock:
    """In place of an event loop: its timers run out when they are told to."""

    def __init__(self) -> None:
        self.timers: dict[asyncio.TimerHandle, Callable[[], None]] = {}

    def call_later(self, seconds: float, function: Callable[..., None], *words: Any) -> asyncio.TimerHandle:
        del seconds
        timer = asyncio.TimerHandle(0.0, function, words, self)  # type: ignore[arg-type]
        self.timers[timer] = partial(function, *words)
        return timer

    def get_debug(self) -> bool:
        return False

    def _timer_handle_cancelled(self, timer: asyncio.TimerHandle) -> None:
        self.timers.pop(timer, None)

    def run_out(self) -> None:
        """Let the one timer run out that there is."""
        ((timer, function),) = self.timers.items()
        del self.timers[timer]
        function()


async def answer_nothing(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


def connect(client: Client) -> Connection:
    config = uvicorn.Config(answer_nothing, log_config=None)
    connection = Connection(config, ServerState(), {}, Limits(prompt_tokens=1, output_tokens=1))
    connection.connection_made(client)
    return connection


async def pause(client: Client, clock: Clock, unread: int) -> Connection:
    """Return a connection whose client has so many bytes to read."""
    connection = connect(client)
    connection._headers.cancel()
    connection.loop = clock  # type: ignore[assignment]
    client.unread = unread
    connection.pause_writing()
    return connection


def test_who_reads_is_waited_for_however_long_and_who_stops_is_given_up() -> None:
    client, clock = Client(), Clock()
    connection = asyncio.run(pause(client, clock, 1000))
    for unread in (999, 998, 1):
        began, connection.waiting_since = connection.waiting_since, 0.0
        client.unread = unread
        clock.run_out()
        assert not client.is_aborted
        assert connection.waiting_since >= began, "it has read, so others go first"
    connection.waiting_since = 0.0
    clock.run_out()
    assert client.is_aborted
    assert connection.waiting_since == 0.0
    assert clock.timers == {}


@pytest.mark.parametrize("unread", [1000, 1025], ids=["the same", "more"])
def test_who_reads_nothing_at_all_is_given_up_at_the_first_look(unread: int) -> None:
    client, clock = Client(), Clock()
    asyncio.run(pause(client, clock, 1000))
    client.unread = unread
    clock.run_out()
    assert client.is_aborted


def test_an_answer_that_waits_for_its_reader_is_the_servers_no_longer_but_still_owed() -> None:
    async def ask() -> tuple[bool, ...]:
        connection, clock = connect(Client()), Clock()
        connection.data_received(PAGE)
        waits = [connection.is_answering]
        connection.loop = clock  # type: ignore[assignment]
        connection.waiting_since = 0.0
        connection.pause_writing()
        try:
            waits += [connection.is_answering, connection.waiting_since == 0.0, connection.eof_received()]
        finally:
            connection.resume_writing()  # or the answer's task could not end
        return (*waits, connection.is_answering)

    assert asyncio.run(ask()) == (True, False, False, True, True)


def test_clients_that_read_nothing_keep_nobody_out(small_tokenizer: Tokenizer) -> None:
    # Pages need no key, and so many answers in a row fill every buffer of the system.
    with served(small_tokenizer, connections=4, api_key="k") as place, ExitStack() as stack:
        port = int(place.url.rsplit(":", 1)[1])
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(PAGE * 600)
        connections = place.server.server_state.connections
        wait_until(lambda: len(connections) == 4 and all(one.flow.write_paused for one in connections.copy()))
        for one in connections.copy():
            # Linux tells twice what it was asked for.
            buffer = one.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
            assert buffer <= 2 * SEND_BUFFER
        for _ in range(6):
            with place.http() as http:
                assert http.get("/health").status_code == 200
