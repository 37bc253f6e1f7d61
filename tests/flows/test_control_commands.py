"""`lowvram pause`, `resume` and `stop` beside a run that trains: in this process, and in one that is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lowvram.api import train
from lowvram.api.training import read_run_file
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.storage.control_file import read_status
from lowvram.train import guarded
from lowvram.train.events import Paused, Resumed, Stopped
from tests.flows.typed import environment, fill_home, typed

ENDLESS = ["tokens=1e12", "run.validate_every=1000000", "run.wake_lock=false"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    fill_home(place)
    return place


def step_of(answer: str) -> int:
    return int(answer.rstrip(".\n").replace(", and saved", "").rpartition(" ")[2])


def test_a_run_is_paused_resumed_and_stopped_by_commands(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "ASKED_EVERY_S", 0.02)
    what = read_run_file(home / "run.toml", ENDLESS)
    events: list[object] = []

    def follow() -> None:
        with train(what, device="cpu") as run:
            events.extend(event for event in run if type(event).__name__ != "StepDone")

    trainer = threading.Thread(target=follow, daemon=True)
    trainer.start()
    until_s = time.monotonic() + 60
    while (status := read_status(what.run.dir)) is None or status.state != "training":
        assert time.monotonic() < until_s
        time.sleep(0.01)
    paused = typed("pause", what.run.dir)
    assert paused.out.startswith("Paused at step ")
    assert find_checkpoint(what.run.dir)[0].step == step_of(paused.out)
    time.sleep(0.1)
    assert typed("resume", what.run.dir).out == f"It goes on after step {step_of(paused.out)}.\n"
    stopped = typed("stop", what.run.dir)
    trainer.join(60)
    assert stopped.out.startswith("Stopped and saved at step ")
    assert find_checkpoint(what.run.dir)[0].step == step_of(stopped.out) > step_of(paused.out)
    [pause] = [event for event in events if isinstance(event, Paused)]
    assert (pause.step, pause.cause) == (step_of(paused.out), "asked")
    assert any(isinstance(event, Resumed) for event in events)
    assert events[-1] == Stopped(step_of(stopped.out), False)
    assert not (what.run.dir / "control.json").exists()


def start(home: Path, run: Path) -> subprocess.Popen[bytes]:
    sets = [word for each in (*ENDLESS, f"run.dir={run}") for word in ("--set", each)]
    words = [sys.executable, "-m", "lowvram", "train", str(home / "run.toml"), "--device", "cpu", *sets]
    child = subprocess.Popen(words, stderr=subprocess.DEVNULL, env=environment(OMP_NUM_THREADS="1"))
    until_s = time.monotonic() + 120
    while (status := read_status(run)) is None or status.pid != child.pid or status.state != "training":
        assert child.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.02)
    return child


@pytest.mark.nightly
def test_a_paused_run_that_is_killed_trains_as_usual_when_it_starts_again(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(home, run)
    step = step_of(typed("pause", run).out)
    child.kill()
    child.wait()
    nobody = typed("resume", run)
    assert (nobody.code, nobody.out) == (1, "")
    assert "No run is training in" in nobody.err
    again = start(home, run)
    until_s = time.monotonic() + 60
    while f'"step": {step + 3},' not in (run / "log.jsonl").read_text(encoding="utf-8"):
        assert time.monotonic() < until_s
        time.sleep(0.02)
    assert typed("stop", run).out.startswith("Stopped and saved")
    assert again.wait(30) == 3
    kinds = [json.loads(line)["event"] for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kinds.count("Paused") == 1
