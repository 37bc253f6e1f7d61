"""Commands whose standard streams were closed from the start, and text that is not UTF-8."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from lowvram.api.typed_text import read_typed
from lowvram.errors import PromptError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors as a POSIX shell does")


def run_closed(closing: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run lowvram by a shell that closes streams; the empty line is what would be typed."""
    command = f'"$0" -m lowvram "$@" {closing}'
    arguments = ["sh", "-c", command, sys.executable, *map(str, words)]
    root = Path(__file__).parents[2]
    places = {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"}
    return subprocess.run(arguments, input="", capture_output=True, text=True, env=os.environ | places, timeout=300)


@pytest.mark.nightly
def test_chat_works_or_ends_where_streams_are_closed(run: Path) -> None:
    options = ("--device", "cpu", "--tokens", 3, "--temperature", 0)
    silent = run_closed(">&-", "chat", run, "--prompt", "Kış", *options)
    assert (silent.returncode, silent.stdout) == (0, "")
    assert silent.stderr.startswith("Standard output is closed, so results are not shown.")
    assert "Traceback" not in silent.stderr
    ended = run_closed("<&-", "chat", run, *options)
    assert ended.returncode == 0
    assert "/help lists what can be typed" in ended.stderr
    assert "Error" not in ended.stderr


@pytest.mark.parametrize("words", [("fit", "--memory", "12GB"), ("--version",)])
def test_no_command_needs_open_streams(words: tuple[str, ...]) -> None:
    usual = run_closed("", *words)
    assert run_closed("<&- >&- 2>&-", *words).returncode == usual.returncode
    assert "Traceback" not in run_closed("<&- >&-", *words).stderr


@pytest.mark.parametrize(
    "raw, said",
    [
        ("gün".encode("cp1254"), "byte 0xFC at position 1. It is probably windows-1254 (ISO-8859-9, Latin-5)"),
        ("İğşç".encode("iso8859-9"), "it reads “İğşç”"),
        (b"x" * 99 + b"\xfd", "byte 0xFD at position 99"),
        ("gün ".encode() + b"\xfc", "That byte is damaged, or of another encoding."),
        (b"\x81", "That byte is damaged, or of another encoding."),
    ],
)
def test_bytes_that_are_not_utf8_are_named_with_the_encoding_that_they_may_be_in(raw: bytes, said: str) -> None:
    with pytest.raises(PromptError) as caught:
        read_typed(raw.decode("utf-8", "surrogateescape"))
    assert said in str(caught.value)


def test_what_is_typed_is_read_in_nfc() -> None:
    assert read_typed(unicodedata.normalize("NFD", "Iğdır çayı")) == "Iğdır çayı"
    marks = "a" + "\u0301\u0323" * 80_000  # which Python alone sorts for minutes
    assert len(read_typed(marks)) == 160_000
