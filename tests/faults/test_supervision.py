"""A real run under `train --supervise`: killed twice, asked to stop by a whole session, it ends as an unbroken one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli.supervise import command_of_child, supervise
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train import supervision
from tests.flows.typed import environment, fill_home, typed

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals"),
    pytest.mark.nightly,  # each start of a real process takes seconds; tests/cli/test_supervise.py has small ones
]
STEPS = 30
# Each step is saved, so that a kill falls into a save as often as beside one.
OPTIONS = ("--set", f"tokens={256 * STEPS}", "--set", "save_every_minutes=1e-9", "--set", "prompts=[]")
WAIT_S = 120.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    fill_home(place)
    return place


def command(home: Path, run: Path, *options: str) -> list[str]:
    return ["train", str(home / "run.toml"), "--set", f"run.dir={run}", "--device", "cpu", *OPTIONS, *options]


def rows(path: Path, event: str) -> list[dict[str, Any]]:
    """Return the rows of a log or a record that tell of an event; a row that is being written is none yet."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["event"] == event]


def weights_hash(run: Path) -> str:
    found, passed_over = find_checkpoint(run)
    assert (found.step, passed_over) == (STEPS, [])
    return hashlib.sha256((found.directory / "weights.safetensors").read_bytes()).hexdigest()


def kill_twice(run: Path) -> Iterator[int]:
    """Kill the process that trains with -9 when it has saved a third of the steps, and at two thirds."""
    for target in (STEPS // 3, 2 * STEPS // 3):
        until_s = time.monotonic() + WAIT_S
        while (supervision.newest_step(run) or 0) < target:
            if time.monotonic() > until_s:
                return
            time.sleep(0.002)
        os.kill(int((run / "owner").read_text()), signal.SIGKILL)
        yield target


def test_a_run_that_is_killed_twice_goes_on_by_itself_to_the_same_weights_and_losses(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "PAUSES_S", (0.01,))
    for name, value in environment(OMP_NUM_THREADS="1").items():
        monkeypatch.setenv(name, value)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    killer = threading.Thread(target=lambda: list(kill_twice(broken)))
    killer.start()
    assert supervise(command_of_child(command(home, broken, "--supervise")), broken) == 0
    killer.join()
    ends = [(row["code"], row["action"]) for row in rows(broken / "supervisor.jsonl", "Ended")]
    assert ends == [(-9, "restart"), (-9, "restart"), (0, "end")]
    assert typed(*command(home, whole)).code == 0
    assert weights_hash(broken) == weights_hash(whole)
    losses = {row["step"]: row["loss"] for row in rows(broken / "log.jsonl", "StepDone")}
    assert losses == {row["step"]: row["loss"] for row in rows(whole / "log.jsonl", "StepDone")}
    assert list(losses) == list(range(1, STEPS + 1))


def test_the_end_of_a_session_saves_the_run_though_both_processes_hear_it_twice(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = command(home, run, "--set", "tokens=1e12", "--supervise")
    words = [sys.executable, "-m", "lowvram", *endless]
    supervisor = subprocess.Popen(
        words, start_new_session=True, stderr=subprocess.PIPE, text=True, env=environment(OMP_NUM_THREADS="1")
    )
    try:
        until_s = time.monotonic() + WAIT_S
        while not rows(run / "log.jsonl", "StepDone"):
            assert supervisor.poll() is None, supervisor.communicate()[1]
            assert time.monotonic() < until_s
            time.sleep(0.01)
        for number in (signal.SIGTERM, signal.SIGHUP):
            os.killpg(supervisor.pid, number)
        err = supervisor.communicate(timeout=WAIT_S)[1]
    finally:
        if supervisor.poll() is None:
            os.killpg(supervisor.pid, signal.SIGKILL)
    assert supervisor.returncode == 3, err
    assert "Traceback" not in err
    assert err.count("Stopping: this step is finished and saved first.") == 1
    last = rows(run / "log.jsonl", "StepDone")[-1]["step"]
    assert find_checkpoint(run)[0].step == last
