"""Clients that are slow, silent, too many, half gone or speak no HTTP harm nobody else, and are told what is wrong."""

from __future__ import annotations

import errno
import json
import logging
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from lowvram.data.tokenizer import Tokenizer
from lowvram.serve import server
from lowvram.serve.server import find_most_connections
from tests.serve.place import Place, Scripted, served
from tests.serve.test_crowd import wait_until

ACCEPTS = pytest.mark.skipif(sys.platform == "win32", reason="asyncio on Windows does not call socket.accept")
HOST = b"Host: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
BODY = json.dumps({"prompt": "Kış", "max_tokens": 2}).encode()


def post(body: bytes = BODY, version: str = "1.1", length: int | None = None, path: str = "/v1/completions") -> bytes:
    head = f"POST {path} HTTP/{version}\r\nContent-Length: {len(body) if length is None else length}\r\n"
    return head.encode() + HOST + b"\r\n" + body


@contextmanager
def connected(place: Place, *sent: bytes) -> Iterator[socket.socket]:
    port = int(place.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        for data in sent:
            client.sendall(data)
        yield client


def read_all(client: socket.socket) -> bytes:
    """Return everything until the server closes; what a reset destroys is not there."""
    found = b""
    try:
        while data := client.recv(65536):
            found += data
    except ConnectionResetError:
        pass
    return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.fixture(scope="module")
def place(small_tokenizer: Tokenizer) -> Iterator[Place]:
    with served(small_tokenizer) as place:
        yield place


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the server logs."""
    caplog.set_level(logging.DEBUG)
    for name in ("asyncio", "uvicorn", "uvicorn.error"):
        logging.getLogger(name).propagate = True
    return caplog


@pytest.mark.parametrize(
    "sent, status",
    [((), None), ((b"GET / HT",), 408), ((b"POST /v1 HTTP/1.1\r\n", b"A: 1\r\n"), 408), ((HEALTH, b"G"), 408)],
    ids=["nothing", "half a line", "half the headers", "half of a second request"],
)
def test_headers_that_do_not_come_end_the_connection(
    small_tokenizer: Tokenizer, sent: tuple[bytes, ...], status: int | None
) -> None:
    with served(small_tokenizer, header_wait_s=0.2) as place, connected(place) as client:
        for data in sent:
            client.sendall(data)
            if data == HEALTH:
                assert status_of(client.recv(65536)) == 200
        answer = read_all(client)
        assert (status_of(answer) if answer else None) == status
        if status:
            assert "0.2 s" in error_of(answer)["message"]


def test_a_byte_from_time_to_time_does_not_make_the_time_longer(small_tokenizer: Tokenizer) -> None:
    with served(small_tokenizer, header_wait_s=0.3) as place, connected(place, b"GET / HTTP/1.1\r\n") as client:
        client.settimeout(0.05)
        for _ in range(600):
            try:
                client.sendall(b"A")
                answer = client.recv(1000)
                break
            except TimeoutError:
                continue
        assert status_of(answer) == 408


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_body_that_does_not_come_is_a_408(small_tokenizer: Tokenizer, path: str) -> None:
    with served(small_tokenizer, body_wait_s=0.2) as place:
        with connected(place, post(length=10_000, path=path)) as client:
            answer = client.recv(65536)
        assert status_of(answer) == 408


@pytest.mark.parametrize("times, status", [(0.9, 200), (1.1, 400), (100, 400)])
def test_headers_have_a_limit_of_bytes(small_tokenizer: Tokenizer, times: float, status: int) -> None:
    with served(small_tokenizer, header_bytes=2000) as place:
        line = b"A: " + b"b" * (round(2000 * times) - len(HEALTH)) + b"\r\n"
        with connected(place, HEALTH[:-2] + line) as client:
            if status == 200:
                client.sendall(b"\r\n")
            answer = client.recv(65536)
        assert status_of(answer) == status
        assert status == 200 or "at most 2000 bytes" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\x01\x00", b"garbage\r\n\r\n", b"\xff" * 1000, b"GET / HTCPCP/1.0"]
)
def test_what_is_no_http_is_refused_in_the_form_of_an_error(place: Place, sent: bytes) -> None:
    with connected(place, sent + b"\r\n\r\n") as client:
        answer = read_all(client)
    assert status_of(answer) == 400
    assert "HTTP/1.1" in error_of(answer)["message"]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_client_that_closes_its_sending_side_gets_its_answer(
    small_tokenizer: Tokenizer, version: str, streams: bool
) -> None:
    decoder = Scripted(small_tokenizer, "Kar yağar.", 90, 1)
    decoder.may_write.clear()
    with served(small_tokenizer, decoder=decoder) as place:
        body = json.dumps({"prompt": "Kış", "max_tokens": 90, "stream": streams}).encode()
        with connected(place, post(body, version)) as client:
            client.shutdown(socket.SHUT_WR)
            wait_until(lambda: place.scheduler.running == 1)
            if version == "1.1":
                assert client.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            decoder.may_write.set()
            answer = read_all(client)
        final = answer[answer.index(b" 200 OK") - 8 :]
        assert final.startswith(b"HTTP/1.1 200 OK")
        assert b"[DONE]" in final if streams else json.loads(final.partition(b"\r\n\r\n")[2])["choices"][0]["text"]


def test_two_requests_in_one_piece_are_both_answered_to_a_half_closed_client(place: Place) -> None:
    with connected(place, post() + post()) as client:
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert answer.count(b"HTTP/1.1 200 OK") == 2


def test_half_a_request_of_a_half_closed_client_is_given_up(place: Place) -> None:
    for sent in (b"GET /", post(length=10_000)):
        with connected(place, sent) as client:
            client.shutdown(socket.SHUT_WR)
            assert b" 200 " not in read_all(client)
    wait_until(lambda: not place.server.server_state.connections)


@pytest.mark.parametrize("is_reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_is_gone_for_good_is_noticed(small_tokenizer: Tokenizer, is_reset: bool) -> None:
    decoder = Scripted(small_tokenizer, "Kar yağar.", 90, 1)
    decoder.may_write.clear()
    with served(small_tokenizer, decoder=decoder) as place, place.http() as http:
        with connected(place, post()) as client:
            wait_until(lambda: place.scheduler.running == 1)
            if is_reset:
                # Two ints, two shorts on Windows: closing sends a reset at once.
                linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        wait_until(lambda: 'completions",status="499"} 1' in http.get("/metrics").text)
        decoder.may_write.set()


def test_another_protocol_is_answered_in_this_one_and_nothing_is_logged(
    place: Place, log: pytest.LogCaptureFixture
) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n"
    with connected(place, HEALTH[:-2] + upgrade) as client:
        assert status_of(client.recv(65536)) == 200
    assert [record for record in log.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    "sent", [(), (b"GET /",), (HEALTH,), (post(length=10**6),)], ids=["new", "slow", "idle", "body"]
)
def test_beyond_the_limit_who_waited_longest_without_a_request_goes(
    small_tokenizer: Tokenizer, sent: tuple[bytes, ...]
) -> None:
    with served(small_tokenizer, connections=4) as place:
        with connected(place, *sent) as first:
            wait_until(lambda: len(place.server.server_state.connections) == 1)
            for _ in range(4 * 100):
                with connected(place, HEALTH) as client:
                    assert status_of(client.recv(65536)) == 200
                    held = [client]
                if len(place.server.server_state.connections) == 4:
                    break
            others = [socket.create_connection(first.getpeername()) for _ in range(8)]
            wait_until(lambda: len(place.server.server_state.connections) <= 4)
            read_all(first)  # it has ended
            for one in [*others, *held]:
                one.close()


def test_where_all_are_being_answered_one_more_is_told_so(small_tokenizer: Tokenizer) -> None:
    decoder = Scripted(small_tokenizer, "Kar yağar.", 90, 1)
    decoder.may_write.clear()
    with served(small_tokenizer, decoder=decoder, connections=2) as place:
        with connected(place, post()) as first, connected(place, post()) as second:
            wait_until(lambda: place.scheduler.running + place.scheduler.waiting == 2)
            with connected(place) as third:
                answer = read_all(third)
            assert status_of(answer) == 503
            assert "no room for another connection" in error_of(answer)["message"]
            decoder.may_write.set()
            assert [status_of(client.recv(65536)) for client in (first, second)] == [200, 200]


def test_a_client_that_reads_nothing_is_given_up(small_tokenizer: Tokenizer) -> None:
    # So many answers in a row that no buffer of the system holds them all.
    with served(small_tokenizer, unread_wait_s=0.2) as place, connected(place) as client:
        client.setblocking(False)
        page = b"GET /page.js HTTP/1.1\r\n" + HOST + b"\r\n"
        sending = memoryview(page * 20_000)

        def is_given_up() -> bool:
            nonlocal sending
            try:
                sending = sending[client.send(sending) :]
            except BlockingIOError:
                pass
            except ConnectionError:
                return True
            return not place.server.server_state.connections

        wait_until(is_given_up)


@ACCEPTS
def test_beyond_the_systems_limit_of_files_the_server_goes_on_and_logs_nothing(
    small_tokenizer: Tokenizer, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(small_tokenizer) as place:
        refused = 0
        accept = socket.socket.accept

        def out_of_files(self: socket.socket) -> Any:
            nonlocal refused
            if refused < 3:
                refused += 1
                raise OSError(24, "Too many open files")
            return accept(self)

        with connected(place) as slow:
            wait_until(lambda: len(place.server.server_state.connections) == 1)
            monkeypatch.setattr(socket.socket, "accept", out_of_files)
            assert httpx.get(f"{place.url}/health", trust_env=False, timeout=30).status_code == 200
            assert read_all(slow) == b"", "who had no request made room"
    assert refused == 3
    assert [record for record in log.records if record.levelno >= logging.WARNING] == []


@ACCEPTS
@pytest.mark.parametrize("number", [errno.EPERM, errno.ECONNABORTED, errno.EMFILE, errno.EIO])
def test_a_system_that_lets_accept_nothing_hinders_no_open_connection_and_no_end(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    waits: list[float] = []

    def fail(_: socket.socket) -> Any:
        raise OSError(number, "refused")

    with served(small_tokenizer) as place, place.http() as http:
        assert http.get("/health").status_code == 200
        find_wait_s = place.server._find_wait_s
        monkeypatch.setattr(place.server, "_find_wait_s", lambda error: waits.append(find_wait_s(error)) or waits[-1])
        monkeypatch.setattr(socket.socket, "accept", fail)
        port = int(place.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)):
            wait_until(lambda: len(waits) > 1)
            if number != errno.EMFILE:  # which closes the connection that has no request
                assert http.get("/health").status_code == 200
    # `served` has seen that the server ended.
    assert number == errno.ECONNABORTED or min(waits) > 0.0, "a pause before each other try"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no process's files")
@pytest.mark.parametrize(
    "soft, hard, most, raised",
    [(1024, 4096, 512, 1024), (100, 4096, 512, 560), (100, 100, 52, 100), (64, 300, 252, 300), (20, 20, 8, 20)],
)
def test_the_connections_fit_into_what_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, most: int, raised: int
) -> None:
    held = [(soft, hard)]
    monkeypatch.setattr(server.resource, "getrlimit", lambda _: held[0])
    monkeypatch.setattr(server.resource, "setrlimit", lambda _, both: held.__setitem__(0, both))
    assert find_most_connections(512) == most
    assert held == [(raised, hard)]


def test_two_hundred_silent_clients_keep_nobody_from_an_answer(small_tokenizer: Tokenizer) -> None:
    with served(small_tokenizer, connections=100) as place, place.http() as http:
        port = int(place.url.rsplit(":", 1)[1])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        for number, client in enumerate(silent):
            try:
                client.sendall(b"GET / HTTP/1.1\r\nA: "[: number % 20])
            except OSError:
                continue
        assert http.post("/v1/completions", content=BODY).status_code == 200
        assert len(place.server.server_state.connections) <= 100
        for client in silent:
            client.close()
    assert threading.active_count() < 200
