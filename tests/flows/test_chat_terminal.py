"""A conversation in a pseudo-terminal: lines that are edited, an answer that is stopped, a history that is kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.typed import environment

if os.name == "nt":
    pytest.skip("Windows has no pseudo-terminals of this kind", allow_module_level=True)

import fcntl
import pty
import select
import termios

_PATIENCE_S = 120.0


class Terminal:
    """A command in a terminal of its own, its keyboard and what stands on its screen since the last key."""

    def __init__(self, command: list[str], **variables: str) -> None:
        self.keyboard, terminal = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment(TERM="xterm", COLUMNS="200", PYTHONIOENCODING="utf-8", **variables),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(terminal)
        self.screen = bytearray()

    def read_until(self, pattern: bytes) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not re.search(pattern, self.screen):
            assert time.monotonic() < deadline, self.screen.decode("utf-8", "replace")
            if select.select([self.keyboard], [], [], 1)[0]:
                self.screen.extend(os.read(self.keyboard, 4096))

    def settle(self) -> None:
        """Wait until readline has taken the terminal, whose prompt may stand there before."""
        time.sleep(1.0)

    def press(self, keys: bytes, shows: str) -> None:
        self.settle()
        self.screen.clear()
        os.write(self.keyboard, keys)
        self.read_until(re.escape(shows.encode()))

    def ask(self, line: bytes) -> None:
        self.screen.clear()
        os.write(self.keyboard, line)
        self.read_until(rb"\n[^\n]{9}")  # of an answer that goes on and on

    def end(self) -> int:
        self.settle()
        os.write(self.keyboard, b"\x04")
        with contextlib.suppress(OSError):  # of a terminal that nobody holds any more
            while os.read(self.keyboard, 4096):
                pass
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)


@pytest.fixture
def terminal(run: Path, tmp_path: Path) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "lowvram", "chat", str(run), "--device", "cpu", "--tokens", "100000"]
    command += ["--temperature", "0", "--repetition-penalty", "1", "--context", "100000"]  # which never ends
    terminal = Terminal(command, XDG_STATE_HOME=str(tmp_path))
    yield terminal
    terminal.close()


@pytest.mark.nightly
def test_a_person_edits_lines_stops_an_answer_and_goes_on(terminal: Terminal, tmp_path: Path) -> None:
    terminal.read_until("› ".encode())
    terminal.settle()
    assert b"Quality is untested beyond 32 tokens" in terminal.screen
    terminal.ask("Kışş\x7f geldi\n".encode())
    terminal.press(b"\x03", "(stopped)")
    terminal.press(b"\x03", "Press Ctrl-C again")
    terminal.settle()
    terminal.ask(b"\x1b[A\n")  # the line before, found again
    terminal.press(b"\x03", "(stopped)")
    terminal.press(f"/save {tmp_path / 'talk.json'}\n".encode(), "Saved to ")
    assert terminal.end() == 0
    said = [message["content"] for message in json.loads((tmp_path / "talk.json").read_text("utf-8"))]
    assert said[::2] == ["Kış geldi", "Kış geldi"]
    assert all(said[1::2])
    assert "Kış geldi" in (tmp_path / "lowvram" / "chat-history").read_text("utf-8")
