"""Numbers on the command line: each flag has limits, and what is beyond them is one line of usage."""

from __future__ import annotations

import sys

import pytest

from lowvram.cli.app import build_parser
from lowvram.cli.options import MOST_CONTEXT, MOST_PROCESSES, MOST_SLOTS
from lowvram.data import worker_pool
from lowvram.data.text_files import KINDS
from tests.flows.typed import typed

FLAGS = {
    ("data", "pack", "text.txt", "--processes"): MOST_PROCESSES,
    ("chat", "run", "--context"): MOST_CONTEXT,
    ("serve", "run", "--context"): MOST_CONTEXT,
    ("serve", "run", "--slots"): MOST_SLOTS,
}


@pytest.mark.parametrize("words, most", FLAGS.items(), ids=map(" ".join, FLAGS))
def test_a_number_is_taken_up_to_its_limit_and_refused_beyond(words: tuple[str, ...], most: int) -> None:
    name = words[-1].removeprefix("--")
    for number in (1, most):
        assert vars(build_parser().parse_args([*words, str(number)]))[name] == number
    for number in (most + 1, 100 * most, 10**30):
        answer = typed(*words, number)
        assert (answer.code, answer.out) == (2, "")
        assert f"{number} is more than {most}" in answer.err
    for text, why in (
        ("0", "0 is less than 1"),
        ("-1", "-1 is less than 1"),
        ("x", "'x' is not a count; write it like"),
    ):
        assert why in typed(*words, text).err


@pytest.mark.parametrize("flag", ["--temperature", "--repetition-penalty"])
@pytest.mark.parametrize("number", ["inf", "1e400", "nan", "-1"])
def test_a_sampler_needs_finite_numbers(flag: str, number: str) -> None:
    answer = typed("chat", "no such run", "--prompt", "a", f"{flag}={number}")
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith(f"Error: {flag} is ")


def test_windows_is_given_no_more_encoders_than_it_can_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "ProcessPoolExecutor", lambda processes, *_: processes)
    for platform, most in (("linux", MOST_PROCESSES), ("darwin", MOST_PROCESSES), ("win32", 61)):
        monkeypatch.setattr(sys, "platform", platform)
        for processes in (2, 61, 62, MOST_PROCESSES):
            started, hang_up = worker_pool._start_pool(processes)
            hang_up.close()
            assert started == min(processes, most)


def test_the_help_names_every_kind_of_text_that_is_read_and_what_an_option_takes() -> None:
    for command in (("data", "pack"), ("tokenizer", "train")):
        told = " ".join(typed(*command, "--help").out.split())
        for word in (*KINDS, ".gz", ".zst", "folders", "patterns", "- for standard input"):
            assert word in told, word
    assert "--verify FOLDER" in typed("export", "--help").out
