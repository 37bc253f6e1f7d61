"""A conversation at the keyboard, and text that would like to command the terminal."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli.console import clean, quote
from lowvram.generate.conversation import Conversation
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from tests.flows.typed import Output, typed
from tests.loaded import load_model

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
    "words in tags": ("a\U000e0001\U000e0073\U000e007fb", "ab"),
}


def converse(
    monkeypatch: pytest.MonkeyPatch, run: Path, *turns: str | type[BaseException], options: tuple[str, ...] = ()
) -> Output:
    """Type each turn, or raise it, and then Ctrl-D."""
    pending = iter(turns)

    def answer_input(prompt: str = "") -> str:
        turn = next(pending, EOFError)
        if isinstance(turn, str):
            return turn
        raise turn

    monkeypatch.setattr(builtins, "input", answer_input)
    return typed("chat", run, "--temperature", 0, "--tokens", 7, "--device", "cpu", *options)


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
    assert "Context of 32 tokens, the length that it was trained on." in answer.err
    assert f"Weights in {loaded.precision}: " in answer.err
    assert "The model continues a text." in answer.err
    assert "/help lists what can be typed; Ctrl-D ends." in answer.err


def test_a_conversation_longer_than_the_context_goes_on(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    answer = converse(monkeypatch, run, *["Kış geldi"] * 9)
    assert answer.code == 0
    assert "Error" not in answer.err


@pytest.mark.parametrize(
    "last",
    [[EOFError], [KeyboardInterrupt, KeyboardInterrupt], ["/quit"], ["/exit"], ["/q"], ["/EXIT "]],
    ids=["Ctrl-D", "Ctrl-C twice", "/quit", "/exit", "/q", "/EXIT"],
)
def test_ctrl_d_ctrl_c_twice_or_quit_end_the_conversation(
    monkeypatch: pytest.MonkeyPatch, run: Path, last: list[str | type[BaseException]]
) -> None:
    one = converse(monkeypatch, run, "Kış")
    answer = converse(monkeypatch, run, "Kış", *last, "never read")
    assert (answer.code, answer.out) == (0, one.out)


def test_empty_lines_and_one_ctrl_c_at_the_prompt_change_nothing(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    one = converse(monkeypatch, run, "Kış", "Yaz")
    answer = converse(monkeypatch, run, "", KeyboardInterrupt, "Kış", "   ", KeyboardInterrupt, "Yaz")
    assert (answer.code, answer.out) == (0, one.out)
    assert "Press Ctrl-C again, or Ctrl-D, to end." in answer.err


def test_ctrl_c_in_an_answer_ends_that_answer_only(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def interrupted(*_: Any) -> Iterator[str]:
        yield "bir"
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", interrupted)
    answer = converse(monkeypatch, run, "Kış", "Evet")
    assert (answer.code, answer.out) == (0, "bir\nbir\n")
    assert answer.err.count("(stopped)") == 2


def test_a_turn_longer_than_the_context_is_an_error_with_numbers_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    answer = converse(monkeypatch, run, "Kış", "uzun " * 50, "Evet")
    assert answer.code == 1, "one text had no answer"
    assert "tokens, " in answer.err
    assert " too many. The context holds 32" in answer.err
    assert answer.out == converse(monkeypatch, run, "Kış", "Evet").out


def test_lines_that_go_on_are_one_text(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    one = converse(monkeypatch, run, "Kış\nYaz")
    assert converse(monkeypatch, run, "Kış\\", "Yaz").out == one.out
    assert converse(monkeypatch, run, '"""Kış', 'Yaz"""').out == one.out
    assert converse(monkeypatch, run, '"""', "Kış", "Yaz", '"""').out == one.out
    # The end of a file ends a text as well.
    assert converse(monkeypatch, run, '"""', "Kış", "Yaz").out == one.out
    assert converse(monkeypatch, run, "Kış\\", "Yaz\\").out == one.out


def test_only_a_line_that_begins_with_a_slash_is_a_command(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    for lines in ([" /quit"], ['"""/quit"""'], ["Kış\\", "/quit"]):
        assert converse(monkeypatch, run, *lines).out
    assert not converse(monkeypatch, run, "/quit").out


def test_ctrl_c_while_a_text_is_taken_in_ends_that_alone(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    one = converse(monkeypatch, run, "Kış")
    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "retry", interrupted)
        answer = converse(patch, run, "Kış", "/retry")
    assert (answer.code, answer.out) == (0, one.out)
    assert "(stopped)" in answer.err


def test_memory_that_runs_out_ends_the_answer_alone(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "retry", fail)
        answer = converse(patch, run, "/retry", "Kış")
    assert answer.code == 0
    assert "Error: Memory ran out." in answer.err
    assert answer.out == converse(monkeypatch, run, "Kış").out


def test_with_newest_a_turn_that_is_too_long_is_read_in_its_newest_part(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    answer = converse(monkeypatch, run, "uzun " * 50, options=("--newest",))
    assert "Error" not in answer.err
    assert answer.out != "\n"


def test_retry_answers_again_with_the_next_seed(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    answer = converse(monkeypatch, run, "/set temperature 1", "Kış", "/retry", "/set seed", "/set", "/retry")
    lines = answer.out.split("\n")
    assert len({lines[0], lines[1]}) == 2
    assert "seed 1" in answer.err
    again = converse(monkeypatch, run, "/set temperature 1", "/set seed 1", "Kış")
    assert again.out == lines[1] + "\n"


def test_reset_forgets_all(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    one = converse(monkeypatch, run, "Kış")
    assert converse(monkeypatch, run, "Yaz geldi", "/reset", "Kış").out.endswith(one.out)


@pytest.mark.parametrize(
    "typed_line, said",
    [
        ("/rety", "Error: There is no command /rety. The commands are /help, /reset, "),
        ("/rety", "Did you mean /retry?"),
        ("/exti now", "Did you mean /quit?"),
        ("/xyzzy", "There is no command /xyzzy. The commands are /help, "),
        ("/xyzzy", "/help explains each."),
        ("/?", "/save FILE          write the conversation"),
        ("/HELP", "/save FILE          write the conversation"),
        ("/set heat 1", "Error: There is no setting heat. The settings are temperature, top_k"),
        ("/set temperature -1", "Error: temperature is -1; it takes 0 or more"),
        ("/set temperature warm", "Error: temperature is warm; it takes a number"),
        ("/set tokens 0", "Error: tokens is 0. It must be a number of at least 1."),
        ("/system Kısa.", "Error: This model continues a text, which has no turns."),
        ("/retry", "Error: There is nothing to answer again."),
        ("/save talk.txt", "Error: /save needs a file that ends in .md or .json, not talk.txt."),
        ("/save", "not nothing"),
        ("/save /no/such/folder/talk.md", "cannot be written."),
        ("/save ~nobody/talk.md", "cannot be written."),
        ("/save a\0b.md", "cannot be written."),
        ("/help", "/save FILE          write the conversation"),
        ("/stats", "0 tokens read, 0 reused, 0 written"),
    ],
)
def test_each_command_says_what_it_did_or_what_is_wrong_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, run: Path, typed_line: str, said: str
) -> None:
    answer = converse(monkeypatch, run, typed_line, "Kış")
    assert answer.code == 0
    assert said in answer.err
    assert answer.out == converse(monkeypatch, run, "Kış").out


def test_set_and_stats_show_what_holds_now(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    answer = converse(monkeypatch, run, "/set tokens 3", "/set top_k 7", "/set", "Kış", "/stats")
    assert "temperature 0.0\ntop_k 7\ntop_p 0.95\n" in answer.err
    assert "tokens 3" in answer.err
    assert "3 written, " in answer.err
    assert "of 32 tokens of context in use" in answer.err
    assert "weights " in answer.err
    assert "(cut at 3 tokens; /set tokens allows more)" in answer.err


def test_a_conversation_is_saved_and_nothing_is_overwritten_unasked(
    monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "konuşma.json"
    answer = converse(monkeypatch, run, "Kış", f"/save {path}", f"/save {path}")
    messages = json.loads(path.read_text("utf-8"))
    assert [message["role"] for message in messages] == ["text", "continuation"]
    assert messages[0]["content"] == "Kış"
    assert clean(messages[1]["content"]) + "\n" == answer.out
    assert answer.err.count("Saved to ") == 1
    assert "Not saved." in answer.err
    converse(monkeypatch, run, "Kış", f"/save {tmp_path / 'talk.md'}")
    assert (tmp_path / "talk.md").read_text("utf-8").startswith("**text**\n\nKış\n\n**continuation**\n\n")
    converse(monkeypatch, run, "Kış", f"/save {tmp_path / 'turns.json'}", options=("--as", "dialogue"))
    messages = json.loads((tmp_path / "turns.json").read_text("utf-8"))
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_a_prompt_from_standard_input_is_answered_like_one_that_is_typed(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    options = ("--temperature", 0, "--tokens", 5, "--device", "cpu")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Kış geldi\n"))
    read = typed("chat", run, "--prompt", "-", *options)
    assert read == typed("chat", run, "--prompt", "Kış geldi", *options)
    assert read.out.startswith("Kış geldi")


def test_a_cache_in_8_bits_is_refused_where_there_are_no_latents(run: Path) -> None:
    answer = typed("chat", run, "--prompt", "Kış", "--cache", "fp8", "--device", "cpu")
    assert answer.code == 1
    assert "Error: --cache fp8 is given, and this model's attention is GQA." in answer.err


def test_a_program_gets_the_answer_as_an_object(run: Path) -> None:
    options = ("--temperature", 0, "--tokens", 5, "--device", "cpu")
    plain = typed("chat", run, "--prompt", "Kış", *options)
    found = json.loads(typed("chat", run, "--prompt", "Kış", "--json", *options).out)
    assert clean("Kış" + found["text"]) + "\n" == plain.out
    assert found["ended"] == "tokens"
    assert (found["tokens_read"], found["tokens_written"]) == (1 + 3, 5) or found["tokens_written"] == 5
    assert "Error: --json is given without --prompt." in typed("chat", run, "--json").err


def test_a_prompt_that_is_too_long_is_refused_or_read_in_its_newest_part(run: Path) -> None:
    options = ("--temperature", 0, "--tokens", 5, "--device", "cpu")
    refused = typed("chat", run, "--prompt", "uzun " * 60 + "Kış", *options)
    assert refused.code == 1
    assert "Shorten it, or let its newest part alone be read: --newest." in refused.err
    read = typed("chat", run, "--prompt", "uzun " * 60 + "Kış", "--newest", *options)
    assert read.code == 0


def test_a_model_can_be_taken_for_one_that_speaks(run: Path) -> None:
    options = ("--temperature", 0, "--tokens", 5, "--device", "cpu", "--as", "dialogue")
    answer = typed("chat", run, "--prompt", "Merhaba", "--system", "Kısa.", *options)
    assert answer.code == 0
    assert not answer.out.startswith("Merhaba")
    refused = typed("chat", run, "--prompt", "Merhaba", "--system", "Kısa.", "--device", "cpu")
    assert "Error: --system is given, and this model continues a text." in refused.err


def test_the_first_lines_say_where_a_model_is_asked_otherwise_than_it_was_trained(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    answer = converse(monkeypatch, run, options=("--as", "dialogue"))
    assert (
        "The model was trained on plain text and is prompted in turns (--as dialogue), which it has not" in answer.err
    )
    assert "The model answers in turns" not in answer.err


def test_input_that_is_not_utf8_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"g\xfcn\n"), encoding="utf-8"))
    answer = typed("chat", run, "--device", "cpu")
    assert answer.code == 1, "a script has only the exit code"
    assert "Error: The text is not UTF-8: byte 0xFC at position 1. It is probably windows-1254" in answer.err
    assert "in which it reads “gün”. Set your terminal or editor to UTF-8" in answer.err


@pytest.mark.parametrize("text, shown", HOSTILE.values(), ids=HOSTILE)
def test_what_could_command_a_terminal_is_taken_out(text: str, shown: str) -> None:
    assert clean(text) == shown
    assert clean(shown) == shown


@pytest.mark.parametrize("text", [text for text, _ in HOSTILE.values()], ids=HOSTILE)
def test_a_saved_conversation_can_be_shown_and_its_json_is_exact(
    monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, text: str
) -> None:
    monkeypatch.setattr(Engine, "generate", lambda *_: iter(text))
    converse(monkeypatch, run, "Kış", f"/save {tmp_path / 'talk.md'}", f"/save {tmp_path / 'talk.json'}")
    for path in tmp_path.iterdir():
        shown = path.read_bytes().decode("utf-8")
        assert shown == clean(shown)
    assert json.loads((tmp_path / "talk.json").read_text("utf-8"))[1]["content"] == text
    assert json.loads(quote(text + "ış")) == text + "ış"
    assert "ış" in quote(text + "ış")


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
