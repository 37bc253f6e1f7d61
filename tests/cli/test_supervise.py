"""`train --supervise` around a small program that dies in chosen ways: restarts, signals, the record."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli import supervise as module
from lowvram.cli.supervise import command_of_child, supervise
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import TrainingError
from lowvram.shell import own_command
from lowvram.train import supervision
from tests.flows.typed import environment, typed, write_home

# Does what the next line of `ways` says, with the run directory as its first argument, and notes its other arguments.
CHILD = """\
import json, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1])
ways = (run / "ways").read_text().splitlines()
(run / "ways").write_text("\\n".join(ways[1:]))
with open(run / "heard", "a") as heard:
    print("started", *sys.argv[2:], file=heard)
save, end = ways[0].split()
if save != "-":
    folder = run / f"step-{int(save):08d}"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"conditions": {"device": "NVIDIA X"}}))
if end.startswith("wait"):
    asked = set()
    def hear(number, frame):
        with open(run / "heard", "a") as heard:
            print(signal.Signals(number).name, file=heard)
        if number in asked and number != signal.SIGUSR1 and end != "wait-deaf":
            os._exit(130)
        asked.add(number)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, hear)
    with open(run / "heard", "a") as heard:
        print("ready", file=heard)
    while not asked or end == "wait-deaf":
        time.sleep(0.01)
    time.sleep(0.3)
    sys.exit(3)
if end.startswith("-"):
    os.kill(os.getpid(), int(end[1:]))
os._exit(int(end))
"""
# The supervisor as a process, so that it can be sent signals.
SUPERVISOR = """\
import sys
from pathlib import Path
from lowvram.cli import supervise
from lowvram.shell import own_command
from lowvram.train import supervision
supervision.PAUSES_S = (float(sys.argv[2]),)
supervise._AT_ONCE_S = 0.4
run = Path(sys.argv[1])
sys.exit(supervise.supervise([sys.executable, "-S", str(run / "child.py"), str(run)], run))
"""
WAIT_S = 30.0

needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def prepare(run: Path, *ways: str) -> list[str]:
    """Write the program and what it does at each start; returns its command."""
    (run / "child.py").write_text(CHILD)
    (run / "ways").write_text("\n".join(ways))
    return [sys.executable, "-S", str(run / "child.py"), str(run)]


def heard(run: Path) -> list[str]:
    return (run / "heard").read_text().splitlines() if (run / "heard").exists() else []


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "supervisor.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "PAUSES_S", (0.01, 0.02))


@needs_signals
def test_a_run_that_crashes_is_started_again_until_it_is_finished_and_each_restart_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = prepare(tmp_path, "3 -9", "- 75", "5 -11", "- 0")
    assert supervise(words, tmp_path) == 0
    assert heard(tmp_path) == ["started"] * 4
    ended = [row for row in rows(tmp_path) if row["event"] == "Ended"]
    assert [(row["code"], row["step_before"], row["step_after"], row["action"]) for row in ended] == [
        (-9, None, 3, "restart"),
        (75, 3, 3, "restart"),
        (-11, 3, 5, "restart"),
        (0, 5, 5, "end"),
    ]
    assert [row["after_s"] for row in ended] == [0.01, 0.02, 0.02, None]
    assert [row["step"] for row in rows(tmp_path) if row["event"] == "Began"] == [None, 3, 3, 5]
    said = capsys.readouterr().err
    assert "ended by SIGKILL (the system does that where memory runs out)" in said
    assert "It goes on from the checkpoint of step 3." in said
    assert "restart 2 of 5 without a checkpoint" in said


def test_five_restarts_in_vain_end_with_the_reason_and_the_next_start_begins_anew(tmp_path: Path) -> None:
    words = prepare(tmp_path, "7 75", *["- 75"] * 5, "- 0")
    with pytest.raises(TrainingError, match=r"started 5 times in a row without saving .* exit code 75") as raised:
        supervise(words, tmp_path)
    assert raised.value.exit_code == 1
    assert rows(tmp_path)[-1]["action"] == "give up"
    assert supervise(words, tmp_path) == 0


def test_a_computer_that_goes_off_each_time_is_not_started_for_ever(tmp_path: Path) -> None:
    words = prepare(tmp_path, "- 0")
    began = json.dumps({"event": "Began", "step": None}) + "\n"
    (tmp_path / "supervisor.jsonl").write_text(began * 6)
    with pytest.raises(TrainingError, match="went off or crashed 6 times in a row"):
        supervise(words, tmp_path)
    assert heard(tmp_path) == []
    assert supervise(words, tmp_path) == 0, "the user has looked, and starts it again"


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_an_exit_code_that_is_no_fault_is_passed_on(tmp_path: Path, code: int) -> None:
    assert supervise(prepare(tmp_path, f"- {code}"), tmp_path) == code
    assert heard(tmp_path) == ["started"]


def test_a_run_goes_on_where_it_was_trained_and_not_on_the_processor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = prepare(tmp_path, "4 75", "- 1", "- 2")
    assert supervise(words, tmp_path, keeps_device=True) == 2
    assert heard(tmp_path) == ["started", *["started --device cuda"] * 2]
    assert "trained on cuda so far, and --supervise keeps to it" in capsys.readouterr().err


def test_a_run_directory_that_is_not_there_is_not_made_for_the_record(tmp_path: Path) -> None:
    words = prepare(tmp_path, "- 1")
    assert supervise(words, tmp_path / "run") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [[], ["--device", "cpu"]], ids=["any device", "a chosen device"])
def test_the_option_starts_the_typed_command_for_the_runs_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tokenizer: Tokenizer, options: list[str]
) -> None:
    write_home(tmp_path)
    shutil.copytree(small_tokenizer.directory, tmp_path / "tok")
    given: list[object] = []

    def note(words: list[str], run: Path, keeps_device: bool, as_typed: list[str]) -> int:
        assert as_typed == ["train", str(tmp_path / "run.toml"), "--supervise", *typed_words]
        given.extend((words[-4:], run, keeps_device))
        return 75

    monkeypatch.setattr(module, "supervise", note)
    typed_words = ["--set", "run.dir=elsewhere", *options]
    assert typed("train", tmp_path / "run.toml", "--supervise", *typed_words).code == 75
    assert given == [
        ["train", str(tmp_path / "run.toml"), *typed_words][-4:],
        tmp_path / "elsewhere",
        not options,
    ]
    typed_words = ["--set", "train.tokenz=1"]
    assert typed("train", tmp_path / "run.toml", "--supervise", *typed_words).code == 1
    assert len(given) == 3, "what is wrong in the run file is told before a process is started"


def test_a_process_that_is_supervised_knows_what_the_user_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_typed, told = ["train", "my run.toml", "--supervise"], tmp_path / "told"
    script = f"import os; open({str(told)!r}, 'w').write(os.environ['LOWVRAM_TYPED'])"
    assert module.supervise([sys.executable, "-S", "-c", script], tmp_path, typed=as_typed) == 0
    assert module.typed_by_user(["train"]) == ["train"]
    monkeypatch.setenv("LOWVRAM_TYPED", told.read_text())
    assert module.typed_by_user(["train", "my run.toml", "--device", "cpu"]) == as_typed


def start(run: Path, pause_s: float = 0.01) -> subprocess.Popen[str]:
    """Start the supervisor in a process group of its own, as a shell does."""
    words = [sys.executable, "-c", SUPERVISOR, str(run), str(pause_s)]
    return subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True, env=environment())


def wait_for(run: Path, word: str, times: int = 1) -> None:
    until_s = time.monotonic() + WAIT_S
    while heard(run).count(word) < times:
        assert time.monotonic() < until_s, heard(run)
        time.sleep(0.005)


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
@pytest.mark.parametrize("reaches", ["both", "the supervisor"])
@pytest.mark.default_cases("both-SIGINT", "both-SIGTERM", "the supervisor-SIGTERM")
def test_one_request_saves_once_whoever_hears_it(tmp_path: Path, number: signal.Signals, reaches: str) -> None:
    prepare(tmp_path, "- wait")
    supervisor = start(tmp_path)
    wait_for(tmp_path, "ready")
    if reaches == "both":
        os.killpg(supervisor.pid, number)
    else:
        supervisor.send_signal(number)
    assert supervisor.wait(WAIT_S) == 3, supervisor.communicate()[1]
    signals = heard(tmp_path)[2:]
    assert sorted(signals) == sorted(["SIGUSR1"] + [number.name] * (reaches == "both"))
    assert rows(tmp_path)[-1]["code"] == 3


@needs_signals
@pytest.mark.parametrize("reaches", ["both", "the supervisor"])
@pytest.mark.parametrize("way", ["wait", "wait-deaf"])
@pytest.mark.default_cases("wait-both", "wait-deaf-the supervisor")
def test_the_second_request_ends_it_at_once(tmp_path: Path, reaches: str, way: str) -> None:
    prepare(tmp_path, f"- {way}")
    supervisor = start(tmp_path)
    wait_for(tmp_path, "ready")
    send = os.killpg if reaches == "both" else os.kill
    send(supervisor.pid, signal.SIGINT)
    wait_for(tmp_path, "SIGUSR1")
    send(supervisor.pid, signal.SIGINT)
    code = supervisor.wait(WAIT_S)
    assert code == (3 if (way, reaches) == ("wait", "the supervisor") else 130), "it may still be saving"


@needs_signals
def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    prepare(tmp_path, "4 -11", "- 0")
    supervisor = start(tmp_path, pause_s=600.0)
    until_s = time.monotonic() + WAIT_S
    while not (tmp_path / "supervisor.jsonl").exists() or rows(tmp_path)[-1]["event"] != "Ended":
        assert time.monotonic() < until_s
        time.sleep(0.01)
    os.killpg(supervisor.pid, signal.SIGINT)
    assert supervisor.wait(WAIT_S) == 130
    assert "in 10 min 00 s" in supervisor.communicate()[1]
    assert heard(tmp_path) == ["started"]


@needs_signals
def test_a_killed_supervisor_leaves_the_process_that_trains_to_go_on(tmp_path: Path) -> None:
    prepare(tmp_path, "- wait")
    supervisor = start(tmp_path)
    wait_for(tmp_path, "ready")
    supervisor.kill()
    supervisor.wait()
    assert heard(tmp_path) == ["started", "ready"]
    os.killpg(supervisor.pid, signal.SIGINT)  # the terminal's Ctrl-C still reaches it
    wait_for(tmp_path, "SIGINT")
    supervisor.communicate()


def test_the_process_is_started_with_what_was_typed_but_for_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    before = own_command(Path.cwd())
    assert before[0] == sys.executable
    assert before[-2:] == ["-m", "lowvram"]
    typed = ["train", "run.toml", "--superv", "--set", "optimizer.lr=1e-3", "--supervise", "--", "--supervise"]
    assert command_of_child(typed) == [*before, "train", "run.toml", "--set", "optimizer.lr=1e-3", "--", "--supervise"]
    monkeypatch.chdir(Path(module.__file__).parents[2])
    assert "-P" not in own_command(Path.cwd()), "in a checkout, lowvram may be found in the working directory only"
    monkeypatch.chdir(Path.home())
    assert "-P" in own_command(Path.cwd())
