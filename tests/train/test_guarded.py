"""A run that slows, waits and is stopped between its steps computes the same as one that nobody touches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train import guarded, late_read
from lowvram.train.events import Event, Metered, Paused, Resumed, Saved, Slowed, StepDone, Stopped
from lowvram.train.guard import Go, Slow, Verdict, Wait
from lowvram.train.late_read import Pace
from lowvram.train.trainer import Trainer
from tests.tiny import prepare_home, tensors_of, tiny_run, trainer_of, unequal

NIGHT = Wait("schedule", "The hours begin at 23:00.", "until 23:00")
BATTERY = Wait("battery", "The computer runs on its battery.", "on battery")
HEAT = Slow(0.75, "84 °C")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


class Script:
    """A guard that says what stands in a list, one verdict each time that it is asked, and then Go."""

    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts, self.steps_s = list(verdicts), list[float]()

    def ask(self, step_s: float) -> Verdict:
        self.steps_s.append(step_s)
        return self.verdicts.pop(0) if self.verdicts else Go()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of a run, which are not slept: the clock of the run's holds is moved on instead."""
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: sum(slept))
    monkeypatch.setattr(guarded, "time", clock)
    monkeypatch.setattr(guarded, "sleep", slept.append)
    return slept


def run_with(home: Path, name: str, guard: Any, control: Any = None, kind: str = "gqa-rope", **train: Any) -> Trainer:
    what = tiny_run(home, kind, run=name, **train)
    trainer = trainer_of(what)
    trainer.guard, trainer.control = guard, control
    return trainer


def what_was_learnt(events: list[Event]) -> list[Event]:
    """Return the steps and validations but for their times."""
    kept = [event for event in events if not isinstance(event, Saved | Paused | Resumed | Slowed | Stopped)]
    return [
        (event.step, event.loss, event.gradient_norm, event.tokens) if isinstance(event, StepDone) else event
        for event in kept
        if type(event).__name__ != "Started"
    ]


@pytest.mark.parametrize("kind", ["gqa-rope", "mla-moe"])
def test_many_pauses_and_slow_steps_change_no_bit_and_no_loss(home: Path, sleeps: list[float], kind: str) -> None:
    guard = Script(NIGHT, NIGHT, Go(), HEAT, BATTERY, Go(), HEAT, HEAT, NIGHT, BATTERY, HEAT, HEAT, NIGHT)
    held = run_with(home, f"held-{kind}", guard, kind=kind)
    plain = run_with(home, f"plain-{kind}", None, kind=kind)
    events, undisturbed = list(held.run()), list(plain.run())
    assert len([event for event in events if isinstance(event, Paused)]) == 5
    assert len(sleeps) >= 10
    assert what_was_learnt(events) == what_was_learnt(undisturbed)
    assert unequal(tensors_of(held), tensors_of(plain)) == []


def test_what_was_learnt_is_saved_before_a_pause_and_only_once(home: Path, sleeps: list[float]) -> None:
    # Asked before each step, and every half second of a pause: before the first step, before the third, in its pause.
    guard = Script(NIGHT, Go(), Go(), Go(), NIGHT, NIGHT, BATTERY, Go(), Go(), NIGHT)
    trainer = run_with(home, "saves", guard)
    seen = list[tuple[str, int]]()
    for event in trainer.run():
        if isinstance(event, Saved | Paused | Resumed):
            seen.append((type(event).__name__, event.step))
        if isinstance(event, Paused) and event.step:
            assert find_checkpoint(trainer.store.run)[0].step == event.step
            assert trainer.doing == "paused"
            assert trainer.held_by == {"schedule": "until 23:00", "battery": "on battery"}[event.cause]
    assert seen == [
        ("Paused", 0),
        ("Resumed", 0),
        ("Saved", 2),
        ("Paused", 2),
        ("Paused", 2),
        ("Resumed", 2),
        ("Saved", 3),
        ("Paused", 3),
        ("Resumed", 3),
        ("Saved", 6),
    ]
    assert trainer.held_by == ""


def test_a_slowed_run_says_so_once_and_pauses_after_each_step(home: Path, sleeps: list[float]) -> None:
    trainer = run_with(home, "slow", Script(Go(), HEAT, HEAT, HEAT, Go()))
    events = list(trainer.run())
    assert [event for event in events if isinstance(event, Slowed)] == [Slowed(1, "84 °C"), Slowed(4, "")]
    assert sleeps == [0.5, 0.25] * 3, "in pieces, so that it can be stopped"


def test_the_guard_is_told_how_long_a_step_takes_pauses_left_out(
    home: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Script(*[Slow(100.0, "84 °C")] * 6)
    trainer = run_with(home, "timed", guard)
    advance = trainer._advance

    def advance_slowly() -> Iterator[Event]:
        sleeps.append(2.0)
        yield from advance()

    monkeypatch.setattr(trainer, "_advance", advance_slowly)
    assert list(trainer.run())
    assert guard.steps_s == [0.0, *[pytest.approx(2.0)] * 5]


@pytest.mark.parametrize("verdict", [NIGHT, Slow(3600.0, "84 °C")], ids=["waiting", "slowed"])
def test_a_run_that_is_stopped_while_it_is_held_ends_at_once_and_is_saved(
    home: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch, verdict: Verdict
) -> None:
    trainer = run_with(home, f"stopped-{type(verdict).__name__}", Script(Go(), Go(), *[verdict] * 9))

    def stop_soon(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            trainer.stop()

    monkeypatch.setattr(guarded, "sleep", stop_soon)
    events = list(trainer.run())
    assert events[-1] == Stopped(2, False)
    assert find_checkpoint(trainer.store.run)[0].step == 2
    assert len(sleeps) == 3
    assert not any(isinstance(event, Resumed) for event in events)


def test_a_pause_that_was_asked_for_ends_when_the_run_is_resumed(
    home: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    control = SimpleNamespace(is_pause_asked=False, is_stop_asked=False)
    trainer = run_with(home, "asked", Script(), control)

    def resume_later(seconds: float) -> None:
        sleeps.append(seconds)
        control.is_pause_asked = sum(sleeps) < 20

    monkeypatch.setattr(guarded, "sleep", resume_later)
    events = list[Event]()
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            control.is_pause_asked = True
    [pause] = [event for event in events if isinstance(event, Paused)]
    assert (pause.step, pause.cause) == (2, "asked")
    [resumed] = [event for event in events if isinstance(event, Resumed)]
    assert resumed.waited_s == pytest.approx(20, abs=2)


def test_a_run_that_is_stopped_in_its_pause_does_not_say_that_it_goes_on_or_waits_anew(
    home: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    control = SimpleNamespace(is_pause_asked=False, is_stop_asked=False)
    trainer = run_with(home, "stopped in a pause", Script(NIGHT), control)

    def stop_later(seconds: float) -> None:
        sleeps.append(seconds)
        control.is_stop_asked, control.is_pause_asked = True, False
        trainer.stop()

    monkeypatch.setattr(guarded, "sleep", stop_later)
    kinds = [type(event).__name__ for event in trainer.run()]
    assert kinds.count("Paused") == 1
    assert "Resumed" not in kinds
    assert kinds[-1] == "Stopped"


def test_a_pause_is_heard_in_the_middle_of_a_slow_step(
    home: Path, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    control = SimpleNamespace(is_pause_asked=False, is_stop_asked=False)
    trainer = run_with(home, "heard", Script(Slow(3600.0, "84 °C")), control)

    def ask_then_resume(seconds: float) -> None:
        sleeps.append(seconds)
        control.is_pause_asked = len(sleeps) == 2

    monkeypatch.setattr(guarded, "sleep", ask_then_resume)
    assert isinstance(list(trainer.run())[-1], Stopped)
    assert sum(sleeps) < 5


def pace_of(times_s: list[float], monkeypatch: pytest.MonkeyPatch, day: Callable[[], float]) -> list[float]:
    """Return the speeds after steps of 100 tokens that take these times."""
    now = [0.0]
    monkeypatch.setattr(late_read, "time", SimpleNamespace(monotonic=lambda: now[0], time=day))
    pace, speeds = Pace(), list[float]()
    pace.begin(0)
    for number, lasts_s in enumerate(times_s, 1):
        now[0] += lasts_s
        speeds.append(pace.measure(100 * number))
    return speeds


def never() -> float:
    raise AssertionError("the clock on the wall may jump; it is not asked")


@pytest.mark.parametrize(
    ("times_s", "last"),
    [
        ([1.0] * 10 + [61.0] + [1.0] * 3, 100.0),
        ([1.0] * 10 + [8 * 3600.0] + [1.0], 100.0),
        ([1.0] * 10 + [61.0], 100.0),
        ([30.0] * 5 + [8 * 3600.0], 100 / 30),
        ([1.0] * 10 + [5.0] * 11, 2_000 / (9 + 55)),
        ([0.01] * 10 + [2.0], 11 / 2.1 * 100),
        ([60.0, 1.0, 1.0, 1.0], 100.0),
        ([1.0] * 30, 100.0),
    ],
    ids=[
        "stopped for a minute",
        "asleep for a night",
        "right after it",
        "long steps",
        "slower from now on",
        "a short hitch counts",
        "the first step, which compiles, does not count",
        "nothing happens",
    ],
)
def test_time_asleep_is_not_counted_and_steps_that_became_slower_are(
    monkeypatch: pytest.MonkeyPatch, times_s: list[float], last: float
) -> None:
    assert pace_of(times_s, monkeypatch, never)[-1] == pytest.approx(last)


def test_a_clock_that_jumps_a_day_changes_no_time_of_a_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + 86_400.0 * (next(jumps) % 2))
    trainer = run_with(home, "jumps", None)
    events = list(trainer.run())
    steps = [event for event in events if isinstance(event, StepDone)]
    assert all(event.left_s < 600 and event.tokens_per_second > 1 for event in steps)
    assert [event.step for event in events if isinstance(event, Saved)] == [6], "no save is due in the first minutes"
    assert not any(isinstance(event, Metered) for event in events)
