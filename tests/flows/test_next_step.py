"""A command that is suggested can be pasted: the shell gives the program the words that were meant."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from lowvram.cli.ending import show_next_steps
from lowvram.cli.next_step import next_step, with_assignment, with_value
from lowvram.shell import quote_command
from lowvram.train.events import Stopped

HARD = [
    "Türkçe Metinler/a.txt",
    "a'b.txt",
    "$HOME",
    "~/x",
    "*.txt",
    "a;b|c&d",
    'say "x"',
    "",
    "a\\",
    "50%",
    "(1)",
    "a#b",
]


def test_a_plain_command_stays_as_people_type_it() -> None:
    line = next_step("data", "pack", Path("Metinler/şiir.txt"), "--holdout", "0.5%", "--out", Path("shards"))
    assert line == "Next: lowvram data pack Metinler/şiir.txt --holdout 0.5% --out shards"
    assert next_step("chat", Path("runs/first"), why="talk to it") == "Next: lowvram chat runs/first  (talk to it)"


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_posix_shell_gives_back_every_word() -> None:
    line = quote_command(sys.executable, "-c", "import sys; print(sys.argv[1:])", *HARD, is_windows=False)
    found = subprocess.run(line, shell=True, capture_output=True, check=True, text=True, encoding="utf-8")
    assert found.stdout.strip() == repr(HARD)


def read_as_windows(line: str) -> list[str]:
    """The words of a line by the rules of the C runtime (Microsoft, "Parsing C command-line arguments")."""
    words, word, slashes, is_quoted, is_open = [], "", 0, False, False
    for letter in line + " ":
        if letter == "\\":
            slashes += 1
            continue
        if letter == '"':
            word += "\\" * (slashes // 2)
            if slashes % 2:
                word += '"'
            else:
                is_quoted = not is_quoted
            is_open, slashes = True, 0
            continue
        word, slashes = word + "\\" * slashes, 0
        if letter == " " and not is_quoted:
            words += [word] * bool(word or is_open)
            word, is_open = "", False
        else:
            word += letter
    return words


def test_windows_gives_back_every_word() -> None:
    words = ["C:\\Yeni Klasör\\", "C:\\a\\b.txt", *HARD]
    line = quote_command(*words, is_windows=True)
    assert read_as_windows(line) == words
    assert line.startswith('"C:\\Yeni Klasör\\\\" C:\\a\\b.txt "Türkçe Metinler/a.txt"')


def test_a_stopped_run_goes_on_with_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lowvram.cli.console.copyable", said.append)
    typed = ["train", "my run.toml", "--set", "lr=1e-3", "--graphs=off", "--device", "cpu"]
    show_next_steps(argparse.Namespace(typed=typed), None, Stopped(5, is_finished=False))  # type: ignore[arg-type]
    assert said == [next_step(*typed, why="resumes the run")]


@pytest.mark.parametrize(
    "typed, proposed",
    [
        ("--on-bad-row report --field report", "--on-bad-row skip --field report"),
        ("--on-bad=report in --out shards", "--on-bad=skip in --out shards"),
        ("in --on-bad-row skip --on-bad-row report", "in --on-bad-row skip --on-bad-row skip"),
        ("in -- --on-bad-row", "in -- --on-bad-row"),
    ],
)
def test_one_value_of_a_typed_command_is_replaced_and_nothing_else(typed: str, proposed: str) -> None:
    assert with_value(typed.split(), "--on-bad-row", "skip") == proposed.split()


@pytest.mark.parametrize("before", ["--set train.tokens=8", "--set=tokens=8", "--set tokens=8 --set train.tokens=9"])
def test_an_assignment_takes_the_place_of_what_was_typed_for_its_key(before: str) -> None:
    typed = ["train", "a.toml", *before.split(), "--set", "lr=1e-3", "--device", "cpu"]
    proposed = ["train", "a.toml", "--set", "lr=1e-3", "--device", "cpu", "--set", "train.tokens=16"]
    assert with_assignment(typed, "train.tokens", "16") == proposed


def test_a_path_that_looks_like_an_option_is_not_read_as_one() -> None:
    assert quote_command("data", Path("-x.txt"), Path("-"), "--out") == "data ./-x.txt - --out"
