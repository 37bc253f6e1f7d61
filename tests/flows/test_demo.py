"""The demo walks its whole road, stops when it is told to, and never touches what it did not make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowvram.cli import demo
from lowvram.train.events import Stopped
from tests.conftest import TURKISH
from tests.flows.typed import typed


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of seconds: little text, few steps; everything else as it is."""
    monkeypatch.setattr(demo, "SAMPLE_CHARACTERS", 40_000)
    monkeypatch.setattr(demo, "HELD_OUT_CHARACTERS", 4_000)
    monkeypatch.setattr(demo, "VOCABULARY", 512)
    monkeypatch.setattr(demo, "_RUN_FILE", demo._RUN_FILE.replace("983_040", "8_192").replace("dim = 192", "dim = 32"))


def write_user_text(folder: Path, documents: int = 120) -> Path:
    folder.mkdir(parents=True)
    texts = [f"{TURKISH[i % 16]} {TURKISH[(i * 5 + 1) % 16]} {TURKISH[(i * 3) % 16]} {i}" for i in range(documents)]
    (folder / "mine.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def test_the_demo_walks_from_text_to_answers_and_names_the_command_of_each_step(tmp_path: Path) -> None:
    answer = typed("demo", "--dir", tmp_path / "d", "--device", "cpu")
    assert answer.code == 0, answer.err
    titles = [line for line in answer.out.splitlines() if line[1:3] == "/8"]
    assert [title[0] for title in titles] == list("12345678")
    commands = [line.split() for line in answer.out.splitlines() if line.strip().startswith("$ ")]
    assert [words[2] for words in commands] == [
        *["demo", "tokenizer", "data", "fit", "train", "train", "evaluate", "chat"]
    ]
    assert "Going on from" in answer.err
    assert "step 2/4" in answer.err
    assert "step 4/4" in answer.err
    assert "bits per byte" in answer.out
    for prompt in demo.PROMPTS:
        assert f"    {prompt}" in answer.out


def test_the_demo_learns_from_the_users_files_and_works_twice(tmp_path: Path) -> None:
    mine = write_user_text(tmp_path / "mine")
    for _ in range(2):
        answer = typed("demo", "--text", mine, "--dir", tmp_path / "d", "--device", "cpu")
        assert answer.code == 0, answer.err
    learnt = (tmp_path / "d/text/train.txt").read_text(encoding="utf-8")
    held_out = (tmp_path / "d/text/valid.txt").read_text(encoding="utf-8")
    documents = [text for text in (learnt + held_out).split("\n\n") if text]
    assert sorted(documents) == sorted((mine / "mine.txt").read_text(encoding="utf-8").split("\n\n"))
    assert held_out.strip()


def test_a_second_demo_deletes_only_what_the_first_one_made(tmp_path: Path) -> None:
    home = tmp_path / "d"
    demo._claim(home, None)
    (home / "run").mkdir()
    (home / "run" / "step").touch()
    (home / "my notes.txt").write_text("kept", encoding="utf-8")
    demo._claim(home, None)
    assert sorted(path.name for path in home.iterdir()) == [".lowvram-demo", "my notes.txt", "text"]


def test_the_working_directory_itself_may_be_the_demos_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowvram.cli.train.train", lambda *_, **__: Stopped(1, is_finished=False))
    for _ in range(2):
        assert typed("demo", "--dir", ".", "--device", "cpu").code == 3
    assert Path(os.curdir, "run.toml").exists()


@pytest.mark.parametrize("ends", [[1], [2, 3]], ids=["in the first half", "in the second half"])
def test_ctrl_c_ends_the_demo_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[int]
) -> None:
    left = list(ends)
    monkeypatch.setattr("lowvram.cli.train.train", lambda *_, **__: Stopped(left.pop(0), is_finished=False))
    answer = typed("demo", "--dir", tmp_path / "d", "--device", "cpu")
    assert answer.code == 3
    assert left == []
    assert "You stopped it.  Go on with: lowvram train" in answer.out
    assert "6/7" not in answer.out


@pytest.mark.parametrize("place", ["in", "around"])
def test_text_and_demo_must_not_lie_in_one_another(tmp_path: Path, place: str) -> None:
    mine = write_user_text(tmp_path / "d" / "mine" if place == "in" else tmp_path / "mine")
    home = tmp_path / "d" if place == "in" else mine / "d"
    answer = typed("demo", "--text", mine, "--dir", home)
    assert answer.code == 1
    assert "lie in one another" in answer.err
    assert (mine / "mine.txt").exists()


def test_too_little_text_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    mine = write_user_text(tmp_path / "mine", documents=3)
    answer = typed("demo", "--text", mine, "--dir", tmp_path / "d")
    assert answer.code == 1
    assert "3 documents of" in answer.err
    assert "20,000 characters in two documents at least" in answer.err
    assert "2/7" not in answer.out


def test_a_wrong_folder_costs_no_earlier_demo(tmp_path: Path) -> None:
    home = demo._claim(tmp_path / "d", None)
    (home / "run").mkdir()
    assert typed("demo", "--text", tmp_path / "nowhere", "--dir", home).code == 1
    assert (home / "run").exists()


def test_brackets_in_a_path_are_printed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.cli.train.train", lambda *_, **__: Stopped(1, is_finished=False))
    answer = typed("demo", "--dir", tmp_path / "x[bold]y", "--device", "cpu")
    assert answer.code == 3, answer.err
    assert "x[bold]y" in answer.out
