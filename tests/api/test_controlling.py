"""`pause`, `resume` and `stop` from outside: what is answered, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowvram.api import controlling
from lowvram.api.controlling import control
from lowvram.errors import BusyError, ConfigError
from lowvram.storage.control_file import Status, write_status
from lowvram.train import control as control_module
from lowvram.train.control import Control
from tests.flows.typed import typed


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    """A run that hears at once, and does nothing by itself."""
    monkeypatch.setattr(control_module, "POLL_S", 0.005)
    monkeypatch.setattr(controlling, "_LOOK_EVERY_S", 0.005)
    made = Control(tmp_path)
    made.start()
    made.tell("training", 3)
    yield made
    made.close()


def test_a_run_in_a_long_step_has_heard_and_says_what_will_happen(listener: Control, tmp_path: Path) -> None:
    answer = control(tmp_path, "pause", done_within_s=0.05)
    assert (answer.says, answer.is_done) == ("It will pause after the step in progress.", False)
    assert listener.is_pause_asked
    listener.tell("paused", 4, "It was asked to.", is_asked=True)
    assert control(tmp_path, "pause").says in ("It was paused before, at step 4.", "Paused at step 4, and saved.")


def test_what_was_done_is_said_with_its_step(listener: Control, tmp_path: Path) -> None:
    listener.tell("paused", 4, "It was asked to.", is_asked=True)
    assert control(tmp_path, "pause", done_within_s=5).says.endswith(("at step 4.", "at step 4, and saved."))
    resumed = threading.Timer(0.05, listener.tell, ("training", 5))
    resumed.start()
    assert control(tmp_path, "resume").says == "It goes on after step 4."
    assert control(tmp_path, "resume").says == "It trains; it was not paused."
    listener.attach(lambda: listener.tell("ended", 5))
    assert control(tmp_path, "stop").says == "Stopped and saved at step 5."
    with pytest.raises(ConfigError, match=r"No run is training in .* It ended at step 5\."):
        control(tmp_path, "pause")


def test_a_run_that_waits_for_its_hours_is_not_resumed(listener: Control, tmp_path: Path) -> None:
    listener.tell("paused", 4, "The hours begin at 23:00.")
    listener.poll()
    answer = control(tmp_path, "resume")
    assert answer.says == "Nobody paused it; it waits at step 4 all the same. The hours begin at 23:00."
    assert not answer.is_done
    assert not (tmp_path / "control.json").exists()


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize(
    "status",
    [None, Status(start="x", pid=os.getpid(), host=socket.gethostname(), state="ended", step=5)],
    ids=["never started", "ended"],
)
def test_where_nobody_trains_nothing_is_left_for_the_next_start(tmp_path: Path, status: Status | None) -> None:
    if status is not None:
        write_status(tmp_path, status)
    says = "is no run directory" if status is None else r"No run is training in .* It ended at step 5\."
    with pytest.raises(ConfigError, match=says):
        control(tmp_path, "pause")
    assert not (tmp_path / "control.json").exists()


def test_while_a_supervisor_waits_it_is_told_when_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_status(tmp_path, Status(start="x", pid=dead_pid(), host=socket.gethostname(), state="training"))
    rows = [{"event": "Began", "time_s": 900.0}, {"event": "Ended", "time_s": 1_000.0, "after_s": 30.0}]
    for action, now_s, says in (
        ("restart", 1_010.0, "Its supervisor starts one again in about 20 s"),
        ("restart", 1_032.0, "Its supervisor starts one again in about 1 s"),
        ("restart", 1_040.0, "No run is training"),  # the supervisor has gone, too
        ("give up", 1_010.0, "No run is training"),
    ):
        record = "".join(json.dumps(row | {"action": action}) + "\n" for row in rows)
        (tmp_path / "supervisor.jsonl").write_text(record, encoding="utf-8")
        monkeypatch.setattr(controlling.time, "time", lambda now_s=now_s: now_s)
        with pytest.raises(ConfigError, match=says):
            control(tmp_path, "pause")
    (tmp_path / "supervisor.jsonl").write_text("torn", encoding="utf-8")
    with pytest.raises(ConfigError, match="No run is training"):
        control(tmp_path, "stop")


def test_a_run_that_was_killed_is_known_by_its_process(tmp_path: Path) -> None:
    write_status(tmp_path, Status(start="x", pid=dead_pid(), host=socket.gethostname(), state="training"))
    with pytest.raises(ConfigError, match="No run is training in"):
        control(tmp_path, "stop")
    assert not (tmp_path / "control.json").exists()


def test_a_process_that_does_not_answer_gets_its_request_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_status(tmp_path, Status(start="x", pid=1, host="another computer", state="training"))
    monkeypatch.setattr(controlling, "HEARD_WITHIN_S", 0.01)
    with pytest.raises(BusyError, match=r"does not answer\..* process 1 on another computer .* withdrawn"):
        control(tmp_path, "pause")
    assert not (tmp_path / "control.json").exists()


def test_the_commands_say_what_came_and_what_is_typed_next(listener: Control, tmp_path: Path) -> None:
    listener.tell("paused", 4, "It was asked to.", is_asked=True)
    listener.poll()
    paused = typed("pause", tmp_path)
    assert (paused.code, paused.out) == (0, "It was paused before, at step 4.\n")
    assert f"lowvram resume {tmp_path}" in paused.err
    missing = typed("stop", tmp_path / "nowhere")
    assert missing.code == 1
    assert "There is no run directory" in missing.err
    (tmp_path / "run.toml").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is a run file\..* lowvram train .* starts or resumes it"):
        control(tmp_path / "run.toml", "pause")
