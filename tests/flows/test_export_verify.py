"""`lowvram export --to gguf --verify`: programs that read the file as we do, otherwise, or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowvram.cli.load import load_model
from lowvram.convert.gguf.verify import LINES, PROMPT, write_lines
from tests.flows.typed import Output, typed

pytest.importorskip("gguf")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its programs are shell scripts")
CONTEXT = 32  # of the run


@pytest.fixture(scope="module")
def said(run: Path) -> tuple[list[int], bytes]:
    """Return what a right llama.cpp prints: the ids of the lines, and the greedy text."""
    tokenizer = load_model(run, "cpu", "fp32").tokenizer
    count = CONTEXT - len(tokenizer.encode(PROMPT)) - 2
    options = ("--temperature", 0, "--repetition-penalty", 1, "--tokens", count, "--precision", "fp32", "--json")
    answer = typed("chat", run, "--prompt", PROMPT, "--device", "cpu", *options)
    return tokenizer.encode(write_lines()), json.loads(answer.out)["text"].encode()


def export(run: Path, folder: Path, ids: bytes, text: bytes, end: str = "exit 0", name: str = "completion") -> Output:
    """Export with programs that print the ids and the text."""
    folder.mkdir(exist_ok=True)
    for program, shown in (("tokenize", ids), (name, text)):
        (folder / f"{program}.out").write_bytes(shown)
        script = folder / f"llama-{program}"
        lines = f'echo "$@" > "{folder}/{program}.args"\ncat "{folder}/{program}.out"\necho "bad model" >&2\n{end}\n'
        script.write_text(f"#!/bin/sh\n{lines}", "utf-8")
        script.chmod(0o755)
    out = folder / "model.gguf"
    out.unlink(missing_ok=True)
    return typed("export", run, "--to", "gguf", "--out", out, "--dtype", "fp32", "--verify", folder)


@pytest.mark.parametrize("name", ["completion", "cli"])
def test_equal_ids_and_tokens_are_said(name: str, run: Path, said: tuple[list[int], bytes], tmp_path: Path) -> None:
    ids, text = said
    answer = export(run, tmp_path / "bin", json.dumps(ids).encode() + b"\n", text + b" [end of text]\n\n", name=name)
    assert (answer.code, answer.err) == (0, "")
    assert f"Verified: {len(ids):,} ids are equal, and " in answer.out
    assert " of " in answer.out
    assert "apart" not in answer.out
    assert "It needs llama.cpp b11034 or llama-cpp-python 0.3.36, or newer" in answer.out
    assert "llama-completion -m" in answer.out
    assert "--no-parse-special" in (tmp_path / "bin" / "tokenize.args").read_text("utf-8")
    assert f"-p {PROMPT} -n " in (tmp_path / "bin" / f"{name}.args").read_text("utf-8")
    assert write_lines().count("\n") + 1 == LINES


@pytest.mark.parametrize(
    "change, text, end, words",
    [
        (lambda ids: json.dumps([*ids[:40], 7, *ids[41:]]), None, "exit 0", "llama.cpp makes other tokens of the text"),
        (lambda ids: json.dumps(ids[:-1]), None, "exit 0", "llama.cpp makes other tokens of the text"),
        (lambda ids: "Log start", None, "exit 0", "answered with something else than ids. It printed b'Log start'"),
        (lambda ids: "[" * 99_999, None, "exit 0", "answered with something else than ids."),
        (json.dumps, b"~~~ bambaska", "exit 0", "llama.cpp writes another text after 0 of "),
        (json.dumps, None, "exit 1", "ended with 1. It said: bad model"),
    ],
    ids=["an id", "an id less", "no ids", "deep", "text", "refused"],
)
def test_what_differs_is_an_error_and_the_file_stays(
    change: object, text: bytes | None, end: str, words: str, run: Path, said: tuple[list[int], bytes], tmp_path: Path
) -> None:
    assert callable(change)
    answer = export(run, tmp_path / "bin", change(said[0]).encode(), said[1] if text is None else text, end)
    assert answer.code == 1
    assert words in answer.err
    assert (tmp_path / "bin" / "model.gguf").is_file()


def test_programs_that_are_not_there_are_said_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    words = ("export", run, "--out", tmp_path / "model.gguf", "--verify", tmp_path / "bin", "--to")
    answer = typed(*words, "gguf")
    assert (answer.code, list(tmp_path.iterdir())) == (1, [])
    assert "there are no llama-tokenize and llama-completion" in answer.err
    refused = typed(*words, "hf")
    assert (refused.code, list(tmp_path.iterdir())) == (1, [])
    assert "--verify is given without --to gguf." in refused.err
