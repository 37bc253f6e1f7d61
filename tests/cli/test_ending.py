"""What stands at the end of a run and of other commands: a verdict, and a command that can be pasted."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from lowvram.cli.app import build_parser
from lowvram.cli.ending import near, show_interruption
from tests.flows.typed import Output, fill_home, typed


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Output]]:
    """The commands behind `train`, in a folder whose name a shell would split."""
    home = tmp_path_factory.mktemp("ends") / "Türkçe Metinler"
    home.mkdir()
    fill_home(home)
    training = ("train", home / "run.toml", "--device", "cpu", "--set", "optimizer.lr=5e-3")
    told = {"train": typed(*training), "again": typed(*training)}
    told["evaluate"] = typed("evaluate", home / "run")
    told["hf"] = typed("export", home / "run", "--to", "hf", "--out", home / "hf")
    told["import"] = typed("import", home / "hf", "--out", home / "imported")
    return home, told


def next_of(text: str) -> list[list[str]]:
    """The words of each command that is named at the end, as a shell takes them."""
    lines = re.findall(r"^(?:Next|or): +(lowvram .*?)(?:  \(.*\))?$", text, re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def test_each_command_names_the_next_one_so_that_a_shell_takes_it(ends: tuple[Path, dict[str, Output]]) -> None:
    home, told = ends
    run = str(home / "run")
    training = ["train", str(home / "run.toml"), "--device", "cpu", "--set", "optimizer.lr=5e-3"]
    for name in ("train", "again"):
        assert next_of(told[name].err) == [
            ["chat", run, "--device", "cpu"],
            ["evaluate", run, "--device", "cpu"],
            ["export", run, "--to", "hf", "--out", f"{run}-hf"],
            [*training, "--set", "train.tokens=3072"],
        ]
        assert told[name].out == ""
    assert next_of(told["evaluate"].out) == [["chat", run]]
    assert next_of(told["hf"].out) == [["chat", str(home / "hf")]]
    assert next_of(told["import"].out) == [["chat", str(home / "imported")]]


def test_a_finished_run_and_evaluate_say_whether_it_beats_bigrams(ends: tuple[Path, dict[str, Output]]) -> None:
    _, told = ends
    # Six steps teach nothing: worse than bigrams, by the same share in both.
    sentences = [re.findall(r"The model .*", text) for text in (told["train"].err, told["evaluate"].out)]
    assert sentences[0] == sentences[1]
    assert re.fullmatch(r"The model .* a table of bigrams \(.*\): it has not learnt yet .*", *sentences[0])
    # Nothing was validated again, so there is nothing to compare.
    assert "bigrams" not in told["again"].err


def test_a_run_that_is_typed_again_after_its_end_says_that_it_has_ended(ends: tuple[Path, dict[str, Output]]) -> None:
    _, told = ends
    says = "This run was finished before: all of its tokens were seen by step 6."
    assert says in told["again"].err
    assert says not in told["train"].err
    assert "Going on from" not in told["again"].err


def test_a_run_that_is_stopped_names_the_command_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowvram.train.events import Stopped

    monkeypatch.chdir(tmp_path)
    fill_home(tmp_path)
    monkeypatch.setattr("lowvram.cli.train.train", lambda *_: Stopped(2, is_finished=False))
    answer = typed("train", "run.toml", "--set", "optimizer={ name = 'muon' }", "--device", "cpu")
    assert next_of(answer.err) == [["train", "run.toml", "--set", "optimizer={ name = 'muon' }", "--device", "cpu"]]


def test_without_held_out_text_the_end_says_what_is_not_known(tmp_path: Path) -> None:
    fill_home(tmp_path)
    run_file = (tmp_path / "run.toml").read_text(encoding="utf-8").replace('valid = "shards/valid"\n', "")
    (tmp_path / "run.toml").write_text(run_file.replace("tokens = 1536", "tokens = 256"), encoding="utf-8")
    answer = typed("train", tmp_path / "run.toml", "--device", "cpu")
    assert "Nothing was held out (data.valid)" in answer.err
    assert [words[0] for words in next_of(answer.err)] == ["chat", "export", "train"]


def test_ctrl_c_while_bigrams_are_counted_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    fill_home(tmp_path)
    monkeypatch.setattr("lowvram.evaluate.bits_per_byte.bigram_score", interrupt)
    answer = typed("train", tmp_path / "run.toml", "--device", "cpu")
    assert answer.code == 0
    assert "(not compared with bigrams)" in answer.err
    assert next_of(answer.err)


def test_a_path_inside_the_working_directory_is_named_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert near(tmp_path / "runs/first") == Path("runs/first")
    assert near(tmp_path.parent / "elsewhere") == tmp_path.parent / "elsewhere"
    assert near(tmp_path) == tmp_path
    assert near("runs/first") == Path("runs/first")


@pytest.mark.parametrize(
    "words, goes_on",
    [
        ("data clean a.txt --out b", True),
        ("data pack a.txt b.txt", True),
        ("demo", True),
        ("demo --text texts", True),
        ("data clean -", False),
        ("data clean a.txt --on-bad-row report", False),
        ("tokenizer train a.txt", False),
        ("evaluate run", False),
        ("doctor", False),
    ],
)
@pytest.mark.parametrize("is_terminated", [False, True])
def test_an_interrupted_command_is_named_again_where_typing_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, words: str, goes_on: bool, is_terminated: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lowvram.cli.console.notice", said.append)
    monkeypatch.setattr("lowvram.cli.console.copyable", said.append)
    show_interruption(build_parser().parse_args(words.split(), argparse.Namespace(typed=words.split())), is_terminated)
    word = "Terminated" if is_terminated else "Interrupted"
    following = [f"Next: lowvram {words}  (goes on where it stopped)"] if goes_on else []
    assert said == [f"{word}; what was finished before is kept.", *following]
