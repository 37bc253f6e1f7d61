"""Signals and clocks: a request saves and ends with 3, two end with 130; a stopped process or clock changes nothing.

The same by a real `python -m lowvram`, with nohup and with two signals in a row: tests/flows/test_interruptions.py.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from lowvram.storage.checkpoint import find_checkpoint, open_checkpoint
from lowvram.train.late_read import Pace
from tests.faults.children import WAIT_S, start
from tests.faults.rule import STEPS, expect_newest_used, expect_same_end, faulty_run, rows_of, train
from tests.flows.typed import RUN_FILE

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def type_command(words: list[str], is_held: bool = False) -> None:
    """Type `lowvram` in this child process.  is_held: SIGHUP is ignored, as nohup leaves it."""
    import torch

    from lowvram.cli.app import main

    torch.set_num_threads(1)
    if is_held:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(main(words))


def command(home: Path, run: str, steps: int = 40) -> list[str]:
    """Return the command that trains in the directory `run`, with no save before its end."""
    (home / "run.toml").write_text(RUN_FILE, encoding="utf-8")
    sets = (f"run.dir={home / run}", f"tokens={steps * 256}", "dropout=0.1", "prompts=[]")
    words = ["train", str(home / "run.toml"), "--device", "cpu", "--micro-batch", "4"]
    return words + [word for each in sets for word in ("--set", each)]


@pytest.fixture(scope="module")
def unbroken(home: Path) -> Path:
    """The directory of a run that was typed once and ended."""
    child = start(type_command, command(home, "typed"))
    child.join(WAIT_S)
    assert child.exitcode == 0
    return home / "typed"


def wait_for_step(child: BaseProcess, run: Path, count: int) -> None:
    """Return when the run's log holds `count` steps."""
    until_s = time.monotonic() + WAIT_S
    while not (run / "log.jsonl").exists() or len(rows_of(run, "StepDone")) < count:
        assert child.is_alive(), "it ended too early"
        assert time.monotonic() < until_s
        time.sleep(0.002)


def ended(child: BaseProcess) -> int | None:
    child.join(WAIT_S)
    return child.exitcode


SIGNALS = {
    "SIGTERM": ("SIGTERM",),
    "SIGHUP": ("SIGHUP",),
    "SIGINT": ("SIGINT",),
    "the end of a session": ("SIGHUP", "SIGTERM", "SIGHUP"),
}


@on_posix
@pytest.mark.nightly
@pytest.mark.parametrize("names", SIGNALS.values(), ids=SIGNALS)
def test_a_request_to_end_saves_the_step_and_the_same_command_ends_the_same(
    home: Path, unbroken: Path, names: tuple[str, ...]
) -> None:
    name = "-".join(names)
    child = start(type_command, command(home, name))
    wait_for_step(child, home / name, 3)
    for each in names:
        os.kill(child.pid or 0, getattr(signal, each))
    assert ended(child) == 3
    saved = find_checkpoint(home / name)[0].step
    assert saved == rows_of(home / name, "StepDone")[-1]["step"], "the step in progress is finished and saved"
    again = start(type_command, command(home, name))
    assert ended(again) == 0
    assert rows_of(home / name, "Started")[-1]["step"] == saved
    expect_same_end(unbroken, home / name)


@on_posix
@pytest.mark.nightly
def test_two_interrupts_end_with_130_and_leave_the_old_checkpoint(home: Path, unbroken: Path) -> None:
    words = command(home, "twice")
    child = start(type_command, words)
    wait_for_step(child, home / "twice", 3)
    os.kill(child.pid or 0, signal.SIGTERM)
    assert ended(child) == 3
    old = find_checkpoint(home / "twice")[0].step
    child = start(type_command, words)
    wait_for_step(child, home / "twice", old + 2)
    os.kill(child.pid or 0, signal.SIGSTOP)  # so that no step ends between the two
    with suppress(ProcessLookupError):  # the second one ends it at once, before it is told to go on
        for _ in range(2):
            os.kill(child.pid or 0, signal.SIGINT)
            time.sleep(0.05)
            os.kill(child.pid or 0, signal.SIGCONT)
    code = ended(child)
    assert code in (130, 3), "3: the step ended before the second signal was sent"
    assert open_checkpoint(find_checkpoint(home / "twice")[0].directory).step >= old
    assert ended(start(type_command, words)) == 0
    expect_same_end(unbroken, home / "twice")


@on_posix
@pytest.mark.nightly
def test_an_inherited_nohup_stays(home: Path, unbroken: Path) -> None:
    child = start(type_command, command(home, "held"), True)
    wait_for_step(child, home / "held", 2)
    os.kill(child.pid or 0, signal.SIGHUP)
    assert ended(child) == 0
    expect_same_end(unbroken, home / "held")


@on_posix
@pytest.mark.nightly
def test_a_process_that_is_stopped_for_a_while_ends_the_same(home: Path, unbroken: Path) -> None:
    child = start(type_command, command(home, "stopped"))
    wait_for_step(child, home / "stopped", 3)
    os.kill(child.pid or 0, signal.SIGSTOP)
    time.sleep(1.0)
    count = len(rows_of(home / "stopped", "StepDone"))
    os.kill(child.pid or 0, signal.SIGCONT)
    assert count < 40, "it was stopped before its end"
    assert ended(child) == 0
    expect_same_end(unbroken, home / "stopped")


@pytest.mark.parametrize("stopped_at", [5, 10, 25], ids=str)
def test_a_minute_in_which_the_process_was_stopped_is_no_part_of_its_speed(
    stopped_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr("lowvram.train.late_read.time.monotonic", lambda: now)
    pace = Pace()
    pace.begin(0)
    for step in range(1, 31):
        now += 2.0 + (60.0 if step == stopped_at else 0.0)
        speed = pace.measure(100 * step)
        assert speed == pytest.approx(50.0, rel=1e-9), f"after step {step}"


def test_a_speed_that_really_falls_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("lowvram.train.late_read.time.monotonic", lambda: now)
    pace = Pace()
    pace.begin(0)
    for step in range(1, 41):
        now += 1.0 if step <= 20 else 20.0
        speed = pace.measure(step)
    assert speed == pytest.approx(1 / 20.0, rel=1e-9)


@pytest.mark.default_cases("a day back")
@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0], ids=["a day on", "a day back"])
def test_a_clock_that_jumps_changes_neither_saves_nor_speed_nor_the_end(
    home: Path, whole: Path, jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return real() + (jump_s if calls > 9 else 0.0)

    what = faulty_run(home, f"clock{jump_s:+.0f}")
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", jumping)
        train(what)
    assert calls > 9
    expect_same_end(whole, what.run.dir)
    assert [row["step"] for row in rows_of(what.run.dir, "Saved")] == list(range(1, STEPS + 1))
    times = [row["time_s"] for row in map(json.loads, (what.run.dir / "log.jsonl").read_text().splitlines())]
    assert max(abs(later - earlier) for earlier, later in itertools.pairwise(times)) > 80_000
    speeds = [row["tokens_per_second"] for row in rows_of(what.run.dir, "StepDone")]
    assert min(speeds) > 0
    expect_newest_used(train(what), STEPS)
