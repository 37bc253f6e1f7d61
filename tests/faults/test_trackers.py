"""A tracker that hangs or fails holds up no step, and a torn log or an address space that is too small costs nothing.

Rows that a full drive does not take: tests/faults/test_full_disk.py; a torn last row: tests/train/test_log.py.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from lowvram.config.run import RunConfig
from lowvram.train.events import Event, StepDone
from lowvram.train.log import TrackerThread, open_logs
from tests.faults.children import end_of
from tests.faults.rule import break_at, expect_same_end, faulty_run, rows_of, told_by, train
from tests.faulty_disk import PowerCut
from tests.train.test_log import EVENTS


class Hanging:
    """A tracker that never answers after its first events."""

    def __init__(self, answers: int) -> None:
        self.taken: list[Event] = []
        self.is_closed, self.may_go_on = False, threading.Event()
        self._answers = answers

    def write(self, event: Event) -> None:
        if len(self.taken) == self._answers:
            self.may_go_on.wait()
        self.taken.append(event)

    def close(self) -> None:
        self.is_closed = True


def test_a_tracker_that_hangs_holds_up_neither_events_nor_the_end(tmp_path: Path) -> None:
    slow = Hanging(answers=1)
    log = TrackerThread(slow, last_wait_s=0.05, most_events=5)
    for _ in range(100):
        log.write(EVENTS[1])
    log.close()
    assert len(slow.taken) <= 1, "it hangs still"
    assert log.lost >= 93, "what it would not take is dropped, and no memory grows"
    slow.may_go_on.set()


def test_a_tracker_gets_every_event_in_order_and_is_closed_at_the_end() -> None:
    quick = Hanging(answers=10**6)
    log = TrackerThread(quick)
    for event in EVENTS * 3:
        log.write(event)
    log.close()
    assert quick.taken == list(EVENTS * 3)
    assert quick.is_closed
    assert log.lost == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tracker_that_fails_is_closed_and_training_is_not_told() -> None:
    class Failing(Hanging):
        def write(self, event: Event) -> None:
            raise ConnectionError("the service is gone")

    failing = Failing(answers=0)
    log = TrackerThread(failing, last_wait_s=5.0)
    log.write(EVENTS[0])
    log._thread.join(5.0)
    for event in EVENTS:
        log.write(event)
    log.close()
    assert failing.is_closed
    assert log.lost == len(EVENTS)


def test_trackers_are_written_in_threads_and_the_runs_own_log_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.train.log.TensorBoardLog", lambda run: Hanging(answers=0))
    own, tracker = open_logs(tmp_path, ("tensorboard",))
    assert isinstance(tracker, TrackerThread)
    for log in (own, tracker):
        log.write(EVENTS[1])
    assert rows_of(tmp_path, "StepDone")[0]["step"] == 3
    own.close()


def cut() -> None:
    raise PowerCut


@pytest.mark.nightly
def test_a_torn_last_row_costs_no_row_of_the_resumed_run(home: Path, whole: Path) -> None:
    what = faulty_run(home, "torn-log")
    with pytest.raises(PowerCut):
        break_at(what, StepDone, 5, cut)
    log = what.run.dir / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert (("StepDone", 5) in told_by(what.run.dir)) is False, "the row is torn"
    train(what)
    expect_same_end(whole, what.run.dir)


def train_in_little_memory(what: RunConfig, spare_bytes: int) -> None:
    """Train in this child process with an address space of so many bytes more than it has now."""
    import resource

    import psutil

    train(what.model_copy(update={"run": what.run.model_copy(update={"dir": what.run.dir.with_name("warm-up")})}))
    limit = psutil.Process().memory_info().vms + spare_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    train(what, micro_batch=what.train.batch_samples)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS and Windows do not enforce the limit")
@pytest.mark.nightly
def test_an_address_space_that_is_too_small_halves_the_micro_batch_and_training_ends_the_same(home: Path) -> None:
    recipe = {"seq_len": 256, "batch_tokens": 256 * 256, "tokens": 2 * 256 * 256, "dropout": 0.0}
    options = {"validate_every": 1000, "prompts": (), "save_every_minutes": 1000.0}
    found = faulty_run(home, "little", kind="gqa-rope", options=options, **recipe)
    assert end_of(train_in_little_memory, found, 150 << 20) == 0
    halved = rows_of(found.run.dir, "Halved")
    assert halved, "the limit was not felt"
    smaller = halved[-1]["micro_batch"]
    assert smaller < found.train.batch_samples
    truth = faulty_run(home, "much", kind="gqa-rope", options=options, **recipe)
    train(truth, micro_batch=smaller)
    assert [row["step"] for row in rows_of(found.run.dir, "Saved")] == [2]
    told, own = told_by(truth.run.dir), told_by(found.run.dir)
    assert own[("StepDone", 2)]["loss"] == pytest.approx(told[("StepDone", 2)]["loss"], rel=1e-4)
    if halved[0]["step"] == 0:
        expect_same_end(truth.run.dir, found.run.dir)
