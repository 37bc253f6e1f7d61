"""Output that cannot be written any more ends nothing; a signal handler writes only where there is somebody to read."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lowvram.cli.lasting import LastingStream, lasting_stderr, write_at_once
from lowvram.cli.train import _stop_on_signal, exit_code
from lowvram.train.events import Stopped

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def test_what_can_be_written_is_written_and_all_else_is_the_streams_own() -> None:
    below = io.StringIO()
    stream = LastingStream(below)
    assert stream.write("bir") == 3
    stream.flush()
    assert below.getvalue() == "bir"
    assert stream.isatty() is False
    with pytest.raises(AttributeError):
        stream.nothing  # noqa: B018


def broken_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w", encoding="utf-8", buffering=1)


def full_device() -> io.TextIOWrapper:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    return open("/dev/full", "w", encoding="utf-8", buffering=1)


@pytest.mark.parametrize("lost", [broken_pipe, full_device])
def test_a_stream_that_fails_once_is_silent_from_then_on(lost) -> None:
    below = lost()
    with pytest.raises(OSError, match=r"Broken pipe|No space"):
        print("ilk", file=below)
    below = lost()
    stream = LastingStream(below)
    # rich would end the process where a pipe is closed.
    console = Console(file=stream)
    for _ in range(3):
        console.print("adım")
        stream.flush()
    below.close()  # which flushes what is left, as the interpreter does at its end


def test_a_command_gives_stderr_back_and_takes_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stderr
    with lasting_stderr():
        assert isinstance(sys.stderr, LastingStream)
    assert sys.stderr is before
    monkeypatch.setattr(sys, "stderr", None)
    with lasting_stderr():
        assert sys.stderr is None


def test_a_handler_writes_nowhere_where_stderr_was_closed_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda _, text: written.append(text))
    write_at_once(b"a")
    monkeypatch.setattr(sys, "__stderr__", None)
    write_at_once(b"b")
    assert written == [b"a"]


def test_a_handler_survives_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", fail)
    write_at_once(b"a")


@needs_signals
def test_the_first_of_any_signal_stops_and_only_the_same_one_again_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("lowvram.cli.train.write_at_once", lambda _: None)
    stops: list[str] = []
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    for sent, expected in (
        ((signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGINT), []),
        ((signal.SIGINT, signal.SIGTERM), []),
        ((signal.SIGINT, signal.SIGINT), [130]),
        ((signal.SIGTERM, signal.SIGHUP, signal.SIGTERM), [130]),
    ):
        stops.clear()
        ended.clear()
        trainer = SimpleNamespace(saved_step=7 if expected else None)
        with _stop_on_signal(SimpleNamespace(stop=lambda: stops.append("stop"), trainer=trainer)):
            for number in sent:
                signal.raise_signal(number)
        assert (bool(stops), ended) == (True, expected), sent
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@needs_signals
def test_a_hang_up_that_was_ignored_stays_ignored() -> None:
    stops: list[str] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _stop_on_signal(SimpleNamespace(stop=lambda: stops.append("stop"))):
            signal.raise_signal(signal.SIGHUP)
            assert stops == []
            signal.raise_signal(signal.SIGTERM)
        assert stops == ["stop"]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("is_finished, code", [(True, 0), (False, 3)])
def test_the_exit_code_tells_a_finished_run_from_a_stopped_one(is_finished: bool, code: int) -> None:
    assert exit_code(Stopped(4, is_finished)) == code
