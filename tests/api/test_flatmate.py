"""What goes on around a run: its energy in the log, the wake lock in its pauses, and requests from other terminals."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lowvram.api.flatmate import EnergyMeter, Flatmate
from lowvram.api.tasks import Notice
from lowvram.cli import progress as screen
from lowvram.cli.progress import TrainingScreen, describe_energy
from lowvram.config.guard import GuardConfig
from lowvram.hardware.sensors import Reading, SensorThread
from lowvram.train.control import Control
from lowvram.train.creep import SAMPLE_EVERY_S, CreepWatch
from lowvram.train.energy import read_energy
from lowvram.train.events import Cause, Evaluated, Event, Metered, Paused, Resumed, Slowed, Started, StepDone, Stopped
from tests.cli.test_progress import STEP, trainer_on


class Bench:
    """A run without a trainer: its clock, its sensors, its wake lock."""

    def __init__(self, run: Path, watts: float | None = 200.0, **guard: Any) -> None:
        self.run, self.now, self.watts, self.calls = run, 0.0, watts, list[str]()
        self.sensors = SensorThread([self], lambda: self.now)
        self.meter = EnergyMeter(run, GuardConfig(**guard), self.sensors, lambda: self.now)
        lock: Any = SimpleNamespace(
            take=lambda: self.calls.append("take") or "", release=lambda: self.calls.append("release")
        )
        self.control = Control(run)
        self.flatmate = Flatmate(self.sensors, self.control, lock, self.meter, CreepWatch())

    def read(self, reading: Reading) -> Reading:
        return Reading(reading.taken_at_s, power_w=self.watts, temperature_c=61.0)

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds / 5)):
            self.now += 5.0
            self.sensors.read_once()

    def train(self, *events: Event | float) -> list[Event | Notice]:
        """Follow events; a number among them is time that passes."""

        def happen() -> Iterator[Event]:
            for event in events:
                if isinstance(event, float):
                    self.pass_time(event)
                else:
                    yield event

        return list(self.flatmate.follow(happen()))


def metered(events: list[Event | Notice]) -> list[Metered]:
    return [event for event in events if isinstance(event, Metered)]


def test_energy_is_told_after_validations_and_before_the_end_at_most_once_a_minute(tmp_path: Path) -> None:
    bench, valid = Bench(tmp_path), Evaluated(10, 3.0, 2.0)
    found = bench.train(905.0, valid, 15.0, valid, 15.0, valid, 45.0, valid, 20.0, Stopped(10, True))
    assert [type(event).__name__ for event in found] == [
        *("Evaluated", "Metered", "Evaluated", "Evaluated", "Evaluated", "Metered", "Metered", "Stopped")
    ]
    last = metered(found)[-1]
    assert last.kwh == pytest.approx(200 * 995 / 3.6e6), "from the first reading on"
    assert (last.source, last.power_w, last.temperature_c, last.cost) == ("power", 200.0, 61.0, None)
    assert read_energy(tmp_path).kwh == last.kwh


def test_energy_goes_on_after_a_restart_and_pauses_are_left_out(tmp_path: Path) -> None:
    first = Bench(tmp_path, price_per_kwh=4.0, currency="TL")
    found = first.train(
        3605.0, STEP, Paused(5, "The hours begin at 23:00.", "schedule"), 36_000.0, Resumed(5, 36_000.0), 3605.0
    )
    assert metered(found) == []
    [end] = metered(first.train(Stopped(6, False)))
    assert end.kwh == pytest.approx(0.4, rel=0.01)
    assert end.cost == pytest.approx(1.6, rel=0.01)
    second = Bench(tmp_path)
    [end] = metered(second.train(1805.0, Stopped(9, True)))
    assert end.kwh == pytest.approx(0.5, rel=0.01)
    assert end.seconds == pytest.approx(2.5 * 3600, rel=0.01)


def test_where_no_energy_is_known_nothing_is_told_and_no_file_written(tmp_path: Path) -> None:
    bench = Bench(tmp_path, watts=None)
    assert metered(bench.train(600.0, Stopped(9, True))) == []
    assert not (tmp_path / "energy.json").exists()
    [end] = metered(Bench(tmp_path, watts=None, power_watts=300).train(605.0, Stopped(9, True)))
    assert (end.source, end.kwh) == ("power_watts", pytest.approx(300 * 605 / 3.6e6))


def test_a_run_of_seconds_counts_between_two_readings(tmp_path: Path) -> None:
    for start, seconds in enumerate([2.0, 4.0], 1):
        bench = Bench(tmp_path, watts=None, power_watts=300)
        bench.now += seconds
        [end] = metered(bench.train(Stopped(start, False)))
        assert end.seconds == pytest.approx([2.0, 6.0][start - 1])
        assert end.kwh == pytest.approx(300 * end.seconds / 3.6e6)


@pytest.mark.parametrize(
    ("cause", "calls"),
    [
        ("asked", ["release", "take"]),
        ("battery", ["release", "take"]),
        ("schedule", ["take"]),
        ("room", ["take"]),
        ("disk", ["take"]),
    ],
)
def test_the_computer_may_sleep_in_a_pause_that_does_not_end_by_itself(
    tmp_path: Path, cause: Cause, calls: list[str]
) -> None:
    bench = Bench(tmp_path)
    bench.train(Paused(5, "why", cause), Resumed(5, 1.0))
    assert bench.calls == calls, "taking a lock that is held does nothing"


def test_what_a_run_does_is_told_to_other_terminals(tmp_path: Path) -> None:
    bench, told = Bench(tmp_path), list[tuple[Any, ...]]()

    def note(state: str, step: int, why: str = "", is_asked: bool = False) -> None:
        told.append((state, step, why, is_asked))

    bench.control.tell = note  # type: ignore[assignment, method-assign]
    bench.train(
        Started(3, 9, None, ()),
        Paused(3, "It was asked to.", "asked"),
        Resumed(3, 1.0),
        Paused(4, "Full.", "room"),
        Stopped(4, False),
    )
    assert told == [
        ("training", 3, "", False),
        ("paused", 3, "It was asked to.", True),
        ("training", 3, "", False),
        ("paused", 4, "Full.", False),
        ("ended", 4, "", False),
    ]


def test_a_pace_that_falls_over_hours_is_told_once_and_a_slowed_run_is_not_watched(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    falling = [replace(STEP, tokens_per_second=1000.0 - 2 * minute) for minute in range(300)]
    events = [each for step in falling for each in (SAMPLE_EVERY_S, step)]
    [told] = [event for event in bench.train(*events) if isinstance(event, Notice)]
    assert told.level == "warning"
    assert told.text.startswith("The pace has fallen from 9")
    slowed = Bench(tmp_path)
    assert not any(isinstance(event, Notice) for event in slowed.train(Slowed(1, "84 °C"), *events))


def test_a_stop_from_another_terminal_is_said_once(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.control.is_stop_asked = True
    found = bench.train(STEP, STEP, Stopped(4, False))
    assert [type(event).__name__ for event in found] == ["Notice", "StepDone", "StepDone", "Stopped"]


@pytest.mark.parametrize(
    ("event", "says"),
    [
        (Metered(5, 0.4, 7200, "counter"), "The card took 400 Wh in 2 h 00 min of this run."),
        (
            Metered(5, 31.2, 2 * 86400, "power_watts", 140.4, "TL"),
            "By run.guard.power_watts the computer took 31.20 kWh in 2 d 00 h of this run, which costs 140.40 TL.",
        ),
        (Metered(5, 1.5, 600, "power", 3.0), "The card took 1.50 kWh in 10 min 00 s of this run, which costs 3.00."),
    ],
    ids=["no price", "watts and a price", "no currency"],
)
def test_energy_is_a_sentence(event: Metered, says: str) -> None:
    assert describe_energy(event) == says


def test_the_live_line_says_why_a_run_waits_or_is_slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, soft_wrap=True)
    monkeypatch.setattr(screen, "err", console)
    trainer = trainer_on()
    trainer.held_by = ""
    shown = TrainingScreen(trainer)
    shown.show(STEP)
    assert "slowed" not in shown._live_line()
    trainer.held_by = "84 °C"
    shown.show(Slowed(1234, "84 °C"))
    assert shown._live_line().endswith("slowed: 84 °C")
    shown.show(Slowed(1240, ""))
    assert "slowed" not in shown._live_line()
    trainer.doing, trainer.held_by = "paused", "until 23:00"
    shown.show(Paused(1240, "The hours begin at 23:00.", "schedule"))
    later_s = screen.time.monotonic() + 600
    monkeypatch.setattr(screen.time, "monotonic", lambda: later_s)
    assert shown._live_line().endswith("paused: until 23:00, 10 min 00 s")


def test_each_pause_says_how_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    ends: dict[Cause, str] = {
        "asked": "It goes on after lowvram resume; Ctrl-C ends it.",
        "room": "Training goes on by itself when there is room; Ctrl-C ends it.",
        "battery": "Training goes on by itself on the mains; Ctrl-C ends it.",
        "schedule": "Training goes on by itself then; Ctrl-C ends it.",
    }
    for cause, end in ends.items():
        TrainingScreen(trainer_on()).show(Paused(7, "Something happened.", cause))
        assert f"step      7  paused: Something happened. {end}" in " ".join(capsys.readouterr().err.split("\n"))
    assert isinstance(STEP, StepDone)
