"""A conversation at the keyboard, and text that would like to command the terminal."""

from __future__ import annotations

import builtins
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli.load import load_model
from lowvram.cli.show import clean
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from tests.flows.typed import Answer, fill_home, typed

HOSTILE = {
    "colour": ("\x1b[31mkırmızı\x1b[0m", "[31mkırmızı[0m"),
    "clipboard (OSC 52)": ("a\x1b]52;c;cm0gLXJm\x07b", "a]52;c;cm0gLXJmb"),
    "title (OSC 0 with ST)": ("\x1b]0;x\x1b\\", "]0;x\\"),
    "CSI as one C1 character": ("a\x9b2Jb", "a2Jb"),
    "OSC as one C1 character": ("\x9d52;c;eA==\x9c", "52;c;eA=="),
    "cursor moves": ("a\rb\bc\x0bd\x0ce", "abcde"),
    "bell, null and delete": ("a\x07b\x00c\x7fd", "abcd"),
    "bidirectional overrides": ("a\u202eb\u202dc\u202ad\u202be\u202cf", "abcdef"),
    "bidirectional isolates": ("a\u2066b\u2067c\u2068d\u2069e", "abcde"),
    "bidirectional marks": ("a\u200eb\u200fc\u061cd", "abcd"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    fill_home(home)
    assert typed("train", home / "run.toml", "--device", "cpu").code == 0
    return home / "run"


def converse(monkeypatch: pytest.MonkeyPatch, run: Path, *turns: str | type[BaseException]) -> Answer:
    """Type each turn, or raise it, and then Ctrl-D."""
    pending = iter(turns)

    def answer_input(prompt: str = "") -> str:
        turn = next(pending, EOFError)
        if isinstance(turn, str):
            return turn
        raise turn

    monkeypatch.setattr(builtins, "input", answer_input)
    return typed("chat", run, "--temperature", 0, "--tokens", 7, "--device", "cpu")


def test_each_turn_joins_the_text_so_far(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    loaded = load_model(run, "cpu")
    engine = Engine(Decoder(loaded.model, 32), loaded.tokenizer)
    sampler = Sampler(temperature=0.0)
    texts = ("Kış", "\nEvet", "\nçay")
    expected, ids = "", [loaded.tokenizer.bos_id]
    for text in texts:
        pieces = engine.generate([*ids, *loaded.tokenizer.encode(text)], sampler, 7)
        expected, ids = expected + clean("".join(pieces)) + "\n", engine.ids
    answer = converse(monkeypatch, run, "Kış", "  Evet ", "çay")
    assert (answer.code, answer.out) == (0, expected)
    assert "context of 32 tokens.  Ctrl-D ends." in answer.err


def test_a_conversation_longer_than_the_context_goes_on(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    answer = converse(monkeypatch, run, *["Kış geldi"] * 9)
    assert answer.code == 0
    assert "Error" not in answer.err


@pytest.mark.parametrize("last", ["", "   ", KeyboardInterrupt, EOFError], ids=["empty", "blank", "Ctrl-C", "Ctrl-D"])
def test_an_empty_line_ctrl_c_or_ctrl_d_ends_the_conversation(
    monkeypatch: pytest.MonkeyPatch, run: Path, last: str | type[BaseException]
) -> None:
    one = converse(monkeypatch, run, "Kış")
    answer = converse(monkeypatch, run, "Kış", last, "never read")
    assert (answer.code, answer.out) == (0, one.out)


def test_ctrl_c_in_an_answer_ends_that_answer_only(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def interrupted(*_: Any) -> Iterator[str]:
        yield "bir"
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", interrupted)
    assert converse(monkeypatch, run, "Kış", "Evet") == Answer(0, "bir\nbir\n", converse(monkeypatch, run).err)


def test_a_turn_longer_than_the_context_is_an_error_with_numbers_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    answer = converse(monkeypatch, run, "Kış", "uzun " * 50, "Evet")
    assert answer.code == 0
    assert "Error: The text has " in answer.err
    assert "The context holds 32" in answer.err
    assert answer.out == converse(monkeypatch, run, "Kış", "Evet").out


def test_input_that_is_not_utf8_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"g\xfcn\n"), encoding="utf-8"))
    answer = typed("chat", run, "--device", "cpu")
    assert answer.code == 1
    assert "Error: The text holds half a character: \\udcfc at position 1." in answer.err


@pytest.mark.parametrize("text, shown", HOSTILE.values(), ids=HOSTILE)
def test_what_could_command_a_terminal_is_taken_out(text: str, shown: str) -> None:
    assert clean(text) == shown
    assert clean(shown) == shown


def test_ordinary_text_is_shown_as_it_is() -> None:
    text = "Iğdır'ın “çayı” – %20 €\n\tâ î û 🫖 e\u0301 \u00a0|\u00ad|\u200d"
    assert clean(text) == text


@pytest.mark.parametrize("text, shown", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_answer_reaches_the_terminal_without_its_commands(
    monkeypatch: pytest.MonkeyPatch, run: Path, text: str, shown: str
) -> None:
    # One character a piece: nothing may depend on a whole sequence being seen at once.
    monkeypatch.setattr(Engine, "generate", lambda *_: iter(text))
    assert typed("chat", run, "--prompt", f"Kış{text}", "--device", "cpu").out == f"Kış{shown}{shown}\n"


def test_a_hostile_name_is_shown_without_its_commands() -> None:
    answer = typed("evaluate", "no\x1b]52;c;eA==\x07where")
    assert answer.err.startswith("Error: There is no directory no]52;c;eA==where.")
