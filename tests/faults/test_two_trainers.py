"""Two trainers in one directory, a lock that is deleted, a directory that is moved or deleted while a run trains.

What the lock itself does: tests/train/test_lost_ground.py and test_start.py; two real commands:
tests/flows/test_interruptions.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from lowvram.errors import BusyError
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.events import StepDone
from tests.faults.children import WAIT_S, SlowDisk, start, train_on
from tests.faults.rule import break_at, expect_same_end, faulty_run, rows_of, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody delete or rename what is open")


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_second_trainer_touches_nothing_and_the_first_one_ends_the_same(home: Path, whole: Path) -> None:
    what = faulty_run(home, "both")
    child = start(train_on, what, SlowDisk())
    until_s = time.monotonic() + WAIT_S
    while not list(what.run.dir.glob("step-????????")):
        assert child.is_alive()
        assert time.monotonic() < until_s
        time.sleep(0.002)
    # So that what changes is the second one's doing.
    os.kill(child.pid or 0, signal.SIGSTOP)
    before = files_of(what.run.dir)
    with pytest.raises(BusyError, match=f"Its process id is {child.pid}"):
        train(what)
    assert files_of(what.run.dir) == before
    os.kill(child.pid or 0, signal.SIGCONT)
    child.join(WAIT_S)
    assert child.exitcode == 0
    expect_same_end(whole, what.run.dir)


@pytest.mark.nightly
def test_a_run_whose_lock_is_deleted_takes_it_again_and_ends_the_same(home: Path, whole: Path) -> None:
    what = faulty_run(home, "unlocked")
    break_at(what, StepDone, 4, (what.run.dir / "lock").unlink)
    expect_same_end(whole, what.run.dir)


@pytest.mark.parametrize("how", ["renamed", "deleted"])
def test_a_run_whose_directory_goes_keeps_the_step_says_where_and_ends_the_same_from_there(
    home: Path, whole: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Saving is not due before the end: what is kept is what was learnt since the last save.
    what = faulty_run(home, f"gone-{how}", options={"save_every_minutes": 1000.0})
    run, elsewhere = what.run.dir, home / f"elsewhere-{how}"
    log = elsewhere.with_suffix(".log")

    def lose() -> None:
        shutil.copy(run / "log.jsonl", log)
        run.rename(elsewhere) if how == "renamed" else shutil.rmtree(run)

    monkeypatch.setattr("lowvram.train.start._RETRY_AFTER_S", 0.0)
    with pytest.raises(BusyError, match="is gone") as found:
        break_at(what, StepDone, 5, lose)
    place = elsewhere if how == "renamed" else next(home.glob(f"gone-{how}.*.rescued"))
    assert f"what was learnt is saved in {place}. Rename that to {run}" in str(found.value)
    assert not run.exists()
    assert find_checkpoint(place)[0].step == 5, "within a step"
    place.rename(run)
    if how == "deleted":  # the log went with the directory, and only it
        shutil.copy(log, run / "log.jsonl")
    train(what)
    assert rows_of(run, "Started")[-1]["step"] == 5
    expect_same_end(whole, run)
