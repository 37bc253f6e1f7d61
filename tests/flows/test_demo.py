"""The demo walks its whole road, stops when it is told to, and never touches what it did not make."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowvram.cli import demo
from lowvram.cli.next_step import quote_command
from lowvram.train.events import Stopped
from tests.conftest import TURKISH
from tests.flows.typed import Output, environment, typed


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """A demo of seconds: little text, few steps; everything else as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SAMPLE_CHARACTERS", 40_000)
        patch.setattr(demo, "HELD_OUT_CHARACTERS", 4_000)
        patch.setattr(demo, "VOCABULARY", 512)
        patch.setattr(demo, "_RUN_FILE", demo._RUN_FILE.replace("983_040", "8_192").replace("dim = 192", "dim = 32"))
        yield


@pytest.fixture(scope="module")
def walked(small: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Output]:
    """A finished demo in a folder whose name a shell would split, and what it said; no test changes it."""
    home = tmp_path_factory.mktemp("walked") / "my demo"
    return home, typed("demo", "--dir", home, "--device", "cpu")


def write_user_text(folder: Path, documents: int = 120) -> Path:
    folder.mkdir(parents=True)
    texts = [f"{TURKISH[i % 16]} {TURKISH[(i * 5 + 1) % 16]} {TURKISH[(i * 3) % 16]} {i}" for i in range(documents)]
    (folder / "mine.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def contents_of(folder: Path) -> dict[str, bytes]:
    """The bytes of each file below a folder, by its name from there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_demo_walks_from_text_to_answers_and_names_the_command_of_each_step(
    walked: tuple[Path, Output],
) -> None:
    _, answer = walked
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


@pytest.mark.nightly
def test_the_demo_learns_from_the_users_files_and_loses_nothing_the_second_time(tmp_path: Path) -> None:
    mine = write_user_text(tmp_path / "mine")
    command = ("demo", "--text", mine, "--dir", tmp_path / "d", "--device", "cpu")
    first = typed(*command)
    assert first.code == 0, first.err
    assert "templates" not in first.out, "the user's text is not generated"
    made = contents_of(tmp_path / "d")
    again = typed(*command)
    assert again.code == 0, again.err
    assert "An earlier demo in" in again.out
    assert "step 4 of 4 was reached before" in again.out
    changed = {name for name, data in contents_of(tmp_path / "d").items() if made.get(name) != data}
    assert changed == {"run/log.jsonl", "run/status.json"}
    learnt = (tmp_path / "d/text/train.txt").read_text(encoding="utf-8")
    held_out = (tmp_path / "d/text/valid.txt").read_text(encoding="utf-8")
    documents = [text for text in (learnt + held_out).split("\n\n") if text]
    assert sorted(documents) == sorted((mine / "mine.txt").read_text(encoding="utf-8").split("\n\n"))
    assert held_out.strip()


def test_only_replace_deletes_and_only_what_an_earlier_demo_made(tmp_path: Path) -> None:
    home = tmp_path / "d"
    demo._claim(home, None, replace=False)
    (home / "run").mkdir()
    (home / "run" / "step").touch()
    (home / "my notes.txt").write_text("kept", encoding="utf-8")
    demo._claim(home, None, replace=False)
    assert (home / "run" / "step").exists()
    demo._claim(home, None, replace=True)
    assert sorted(path.name for path in home.iterdir()) == [".lowvram-demo", "my notes.txt", "text"]


def test_replace_does_not_delete_a_run_in_which_another_process_trains(tmp_path: Path) -> None:
    home = demo._claim(tmp_path / "d", None, replace=False)
    script = "import sys; from filelock import FileLock\n"
    script += "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    (home / "run").mkdir()
    command = [sys.executable, "-c", script, str(home / "run" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        answer = typed("demo", "--dir", home, "--replace")
        assert answer.code == 1
        assert "Another process is training" in answer.err
        assert (home / "run" / "lock").exists()
        other.kill()


def test_a_demo_that_was_interrupted_anywhere_goes_on_and_comes_to_the_same(
    tmp_path: Path, walked: tuple[Path, Output]
) -> None:
    home, alone = tmp_path / "d", walked[0]
    shutil.copytree(alone, home)
    # As if the power had gone: half a tokenizer, half of the run, and a value that the user changed since.
    (home / "tok" / "tokenizer_config.json").unlink()
    shutil.rmtree(home / "run" / "step-00000004")
    run_file = (home / "run.toml").read_text(encoding="utf-8").replace("validate_every = 120", "validate_every = 3")
    (home / "run.toml").write_text(run_file, encoding="utf-8")
    answer = typed("demo", "--dir", home, "--device", "cpu")
    assert answer.code == 0, answer.err
    assert "step 2 of 4 was reached before" in answer.out
    assert (home / "run.toml").read_text(encoding="utf-8") == run_file
    weights = "run/step-00000004/weights.safetensors"
    assert contents_of(home)[weights] == contents_of(alone)[weights]


def test_another_text_in_the_same_place_is_refused_and_replace_is_named(
    tmp_path: Path, walked: tuple[Path, Output]
) -> None:
    home, _ = walked
    made = contents_of(home)
    answer = typed("demo", "--text", write_user_text(tmp_path / "mine"), "--dir", home, "--device", "cpu")
    assert answer.code == 1
    assert "learnt another text" in answer.err
    assert "--replace" in answer.err
    assert contents_of(home) == made


def test_the_end_shows_the_curve_and_says_how_to_talk_before_how_to_delete(walked: tuple[Path, Output]) -> None:
    home, answer = walked
    lines = answer.out.splitlines()
    talk, fit, delete = lines[-3:]
    assert talk.strip() == f"Talk to it: lowvram chat {quote_command(home / 'run')}"
    assert fit.strip().endswith("lowvram fit")
    assert "delete that folder when you like" in delete
    first = next(number for number, line in enumerate(lines) if "training loss" in line) + 1
    for line in lines[first : first + 4]:  # in plain letters, because a pipe may know no others
        assert re.fullmatch(r"    [ .0-9]{9}[#.:][ #.:]*", line)
    assert "generated from templates" in answer.out
    assert demo.REAL_TEXT in answer.out


def test_a_folder_with_other_files_in_it_is_not_to_be_deleted_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    demo._show_end(tmp_path, tmp_path)
    assert "text, tok, shards, run, run.toml" in capsys.readouterr().out


def test_what_the_demo_says_of_real_text_is_what_was_measured() -> None:
    page = (Path(__file__).parents[2] / "docs/measured.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `tr-25m`'s layers, 22.0 M | 1.55 M tokens"))
    for word in ("1.158", "1.248"):
        assert word in row
        assert word in demo.REAL_TEXT


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
    assert f"You stopped it. Resume with: lowvram demo --dir {tmp_path / 'd'} --device cpu\n" in answer.out
    assert "7/8" not in answer.out


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
    assert "2/8" not in answer.out


def test_a_wrong_folder_costs_no_earlier_demo(tmp_path: Path) -> None:
    home = demo._claim(tmp_path / "d", None, replace=False)
    (home / "run").mkdir()
    assert typed("demo", "--text", tmp_path / "nowhere", "--dir", home).code == 1
    assert (home / "run").exists()


def test_brackets_in_a_path_are_printed_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.cli.train.train", lambda *_, **__: Stopped(1, is_finished=False))
    answer = typed("demo", "--dir", tmp_path / "x[bold]y", "--device", "cpu")
    assert answer.code == 3, answer.err
    assert "x[bold]y" in answer.out
