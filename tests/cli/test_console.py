"""What is printed: wrapped between words in a terminal, whole in a pipe, and never able to command the terminal."""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import lowvram
from lowvram.cli import console as show

TEXT = "Kış geldiğinde köyün bütün yolları karla kapanır ve kimse evinden çıkmaz"


class Terminal(io.StringIO):
    """A window of some columns that keeps what was written."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[True, False], ids=["in a terminal", "in a pipe"])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = Terminal() if request.param else io.StringIO()
    for name in ("out", "err"):
        console = Console(file=file, width=30, highlight=False, soft_wrap=True, color_system=None)
        monkeypatch.setattr(show, name, console)
    return file


def stream(text: str) -> None:
    answer = show.AnswerStream()
    for letter in text:
        answer.write(letter)
    answer.end()


@pytest.mark.parametrize("tell", [show.notice, show.result, show.show_error, stream])
def test_only_a_terminal_gets_line_breaks_and_only_between_words(
    screen: io.StringIO, tell: Callable[[str], None]
) -> None:
    tell(TEXT)
    lines = screen.getvalue().rstrip("\n").split("\n")
    words = " ".join(lines).removeprefix("Error: ")
    assert words == TEXT
    if screen.isatty():
        assert len(lines) > 2
        assert max(map(len, lines)) <= 30
    else:
        assert len(lines) == 1


@pytest.mark.parametrize("tell", [show.literal, show.copyable])
def test_what_is_copied_or_parsed_is_one_line_everywhere(screen: io.StringIO, tell: Callable[[str], None]) -> None:
    data = json.dumps({"text": TEXT}, ensure_ascii=False)
    tell(data)
    assert screen.getvalue() == data + "\n"


@pytest.mark.parametrize("tell", [show.notice, show.result, show.show_error, show.literal, show.copyable, stream])
def test_nothing_that_is_printed_commands_the_terminal(screen: io.StringIO, tell: Callable[[str], None]) -> None:
    tell("a\x1b[2J\x07b\u202ec\U000e0041d [red]e[/]")
    assert screen.getvalue().removeprefix("Error: ") == "a[2Jbcd [red]e[/]\n"


def test_an_answer_that_was_stopped_still_shows_its_last_word(screen: io.StringIO) -> None:
    answer = show.AnswerStream()
    answer.write("Kış geldi")
    answer.end()
    assert screen.getvalue() == "Kış geldi\n"


@pytest.mark.parametrize("tell", [show.notice, show.result, show.show_error])
def test_two_blanks_in_the_name_of_a_file_stay(tell: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    for name in ("out", "err"):
        monkeypatch.setattr(show, name, Console(file=file, width=30, highlight=False, soft_wrap=True))
    tell("Bölüm 1.  Giriş.txt is missing. Name another.")
    assert file.getvalue().removeprefix("Error: ") == "Bölüm 1.  Giriş.txt is missing. Name another.\n"


def test_sentences_that_are_shown_have_one_blank_between_them() -> None:
    found = []
    for file in sorted(Path(lowvram.__file__).parent.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        stated = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in stated]
        is_wide = re.compile(r"(^|[a-z0-9)`\"%])[.!?]  [A-ZÇĞİÖŞÜ`]").search
        found += [f"{file.name}:{node.lineno}" for node in texts if isinstance(node.value, str) and is_wide(node.value)]
    # argparse closes up its help.
    assert found == []
