"""What a guard decides, from readings and a clock that the test makes up: slow, wait, go on, and never flap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from lowvram.config.guard import GuardConfig
from lowvram.hardware.sensors import Reading
from lowvram.train.guard import (
    LONGEST_PAUSE_S,
    Go,
    Guard,
    GuardMemory,
    Slow,
    Verdict,
    Wait,
    decide,
    explain_blind,
)

NOON = datetime(2026, 3, 2, 12)
GIB = 1 << 30


def decide_all(
    config: GuardConfig, readings: Sequence[Reading], wall_time: datetime = NOON, step_s: float = 1.0
) -> list[Verdict]:
    """Return the verdict after each reading; the readings come five seconds apart."""
    memory, verdicts = GuardMemory(), list[Verdict]()
    for number, reading in enumerate(readings):
        verdict, memory = decide(config, replace(reading, taken_at_s=5.0 * number), wall_time, memory, step_s)
        verdicts.append(verdict)
    return verdicts


def readings_of(name: str, values: Sequence[Any], **others: Any) -> list[Reading]:
    return [Reading(0.0, **{name: value}, **others) for value in values]


def kinds(verdicts: Sequence[Verdict]) -> str:
    """Return a letter for each verdict: g, s or w."""
    return "".join(type(verdict).__name__[0].lower() for verdict in verdicts)


@pytest.mark.parametrize(
    ("temperatures", "says"),
    [
        ([70, 79.9, 80, 79, 78, 76, 75.1, 75, 79], "ggsssssgg"),
        ([81, 79, 81, 79, 81, 79], "ssssss"),
        ([79, 78, 79, 78], "gggg"),
        ([81, None, 79], "sgg"),
    ],
    ids=["two thresholds", "no flapping when hot", "none when cool", "a sensor that fails"],
)
def test_heat_slows_from_the_limit_on_until_it_is_five_degrees_cooler(
    temperatures: list[float | None], says: str
) -> None:
    config = GuardConfig(max_temperature=80)
    assert kinds(decide_all(config, readings_of("temperature_c", temperatures))) == says


def test_pauses_double_while_it_stays_too_hot_shrink_between_the_thresholds_and_have_a_limit() -> None:
    config = GuardConfig(max_temperature=80)
    found = decide_all(config, readings_of("temperature_c", [84, 84, 84, 84, 84, 84, 79, 79, 74]), step_s=2.0)
    pauses = [verdict.pause_s for verdict in found if isinstance(verdict, Slow)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 8.0, 4.0]
    assert found[0] == Slow(1.0, "84 °C")
    [*_, longest] = decide_all(config, readings_of("temperature_c", [84] * 6), step_s=600.0)
    assert isinstance(longest, Slow)
    assert longest.pause_s == LONGEST_PAUSE_S


def test_one_reading_counts_once_however_many_steps_ask() -> None:
    config, reading = GuardConfig(max_temperature=80), Reading(1.0, temperature_c=90)
    memory = GuardMemory()
    for _ in range(5):
        verdict, memory = decide(config, reading, NOON, memory, 1.0)
    assert verdict == Slow(0.5, "90 °C")


def test_without_a_limit_in_the_run_file_a_card_has_its_own_and_a_processor_none() -> None:
    hot = readings_of("temperature_c", [90, 90])
    assert kinds(decide_all(GuardConfig(), hot)) == "gg"
    assert kinds(decide_all(GuardConfig(), readings_of("temperature_c", [84, 90], usual_limit_c=85.0))) == "gs"
    assert kinds(decide_all(GuardConfig(max_temperature=91), [replace(each, usual_limit_c=85.0) for each in hot])) == (
        "gg"
    )


def test_a_system_that_throttles_the_chip_is_believed_without_a_temperature() -> None:
    found = decide_all(GuardConfig(), readings_of("is_throttled", [False, True, True, False]))
    assert kinds(found) == "gssg"
    assert found[1] == Slow(0.5, "heat")


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([0.6, 0.6, 3.0, 3.0, 3.0, 0.6, 0.6], "gggssgg"),
        ([0.6, 0.6, 3.0, 0.6, 0.6], "ggggg"),
        ([0.6, 0.6, 1.5, 1.5, 1.5], "ggggg"),
        ([0.6, 0.6, 2.0, 2.0, 1.3, 1.3, 1.0, 1.0], "gggsssgg"),
        ([3.0, 3.0, 3.0], "ggg"),
        ([3.0, 3.0, 0.5, 0.5, 3.0, 3.0], "gggggs"),
        ([0.6, 0.6, None, 3.0, 3.0], "ggggs"),
        ([2.0, 0.2, 2.0, 2.0], "gggg"),
    ],
    ids=[
        "a game begins and ends",
        "one reading while our own memory grows",
        "a browser",
        "two thresholds",
        "it was there before us",
        "it comes back",
        "unknown in between",
        "one reading is no baseline",
    ],
)
def test_a_card_is_shared_while_others_hold_a_gib_more_than_before(others: list[float | None], says: str) -> None:
    held = [None if gib is None else int(gib * GIB) for gib in others]
    found = decide_all(GuardConfig(), readings_of("others_bytes", held))
    assert kinds(found) == says
    assert all(verdict == Slow(3.0, "the card is shared") for verdict in found if isinstance(verdict, Slow))
    assert kinds(decide_all(GuardConfig(share_card=False), readings_of("others_bytes", held))) == "g" * len(held)


def test_a_card_is_shared_while_another_program_keeps_it_busy() -> None:
    assert kinds(decide_all(GuardConfig(), readings_of("others_busy_percent", [3, 19, 20, 12, 9, 19]))) == "ggssgg"


@pytest.mark.parametrize(
    ("plugged", "says"),
    [([False, True, True, False, False, False], "gwwwgg"), ([True, False, True, False, False], "wwwwg")],
    ids=["a walk", "a loose plug"],
)
def test_on_battery_a_run_waits_until_the_mains_are_back_twice_in_a_row(plugged: list[bool], says: str) -> None:
    found = decide_all(GuardConfig(), readings_of("on_battery", plugged, battery_percent=63.0))
    assert kinds(found) == says
    waits = [verdict for verdict in found if isinstance(verdict, Wait)]
    assert (waits[0].cause, waits[0].brief) == ("battery", "on battery at 63 %")
    ignored = decide_all(GuardConfig(battery="ignore"), readings_of("on_battery", plugged))
    assert kinds(ignored) == "g" * len(plugged)


def test_a_battery_that_cannot_be_read_any_more_holds_nobody() -> None:
    assert kinds(decide_all(GuardConfig(), readings_of("on_battery", [True, None, None, None]))) == "wwgg"


def test_little_disk_is_waited_for_until_there_is_a_tenth_more() -> None:
    free = [30 * 10**9, 20 * 10**9, 19 * 10**9, 21 * 10**9, 22 * 10**9, 21 * 10**9, None]
    found = decide_all(GuardConfig(least_free_disk="20GB"), readings_of("free_disk_bytes", free))
    assert kinds(found) == "ggwwggg"
    assert isinstance(found[2], Wait)
    assert found[2].why == "17.7 GiB are free on the disk, and run.guard.least_free_disk is 18.6 GiB."
    assert kinds(decide_all(GuardConfig(), readings_of("free_disk_bytes", free))) == "g" * 7


def test_outside_its_hours_a_run_waits_and_says_until_when() -> None:
    config = GuardConfig(schedule=("mon-fri 23:00-07:00", "sun 10:00-12:00"))
    night, noon, saturday = datetime(2026, 3, 3, 2), NOON, datetime(2026, 3, 7, 8)
    assert decide_all(config, [Reading(0.0)], night) == [Go()]
    [wait] = decide_all(config, [Reading(0.0)], noon)
    hours = "mon-fri 23:00-07:00, sun 10:00-12:00"
    assert wait == Wait("schedule", f"The hours of run.guard.schedule ({hours}) begin at 23:00.", "until 23:00")
    [wait] = decide_all(config, [Reading(0.0)], saturday)
    assert isinstance(wait, Wait)
    assert wait.brief == "until Sunday 10:00"


def test_waiting_comes_before_slowing_and_both_reasons_to_slow_are_named() -> None:
    config = GuardConfig(max_temperature=80)
    both = Reading(0.0, temperature_c=85, others_busy_percent=50)
    assert decide_all(config, [both]) == [Slow(3.0, "85 °C, the card is shared")]
    assert kinds(decide_all(config, [replace(both, on_battery=True)])) == "w"


class FakeSensors:
    def __init__(self) -> None:
        self.reading = Reading(0.0)

    def latest(self) -> Reading:
        return self.reading


def test_a_guard_asks_its_sensors_and_its_clock_each_time() -> None:
    sensors, now = FakeSensors(), [datetime(2026, 3, 2, 22)]
    guard = Guard(GuardConfig(schedule="23:00-07:00", max_temperature=80), sensors, lambda: now[0])
    assert isinstance(guard.ask(1.0), Wait)
    now[0] = datetime(2026, 3, 2, 23)
    assert guard.ask(1.0) == Go()
    sensors.reading = Reading(5.0, temperature_c=88)
    assert guard.ask(4.0) == Slow(2.0, "88 °C")
    sensors.reading = Reading(10.0, temperature_c=70)
    assert guard.ask(4.0) == Go()


def test_guards_that_see_nothing_are_named_once_and_those_that_nobody_asked_for_are_not() -> None:
    why = "the driver says: Not Supported"
    blind = Reading(0.0, has_card=True, problems=dict.fromkeys(("temperature_c", "others_bytes", "fan_percent"), why))
    assert explain_blind(GuardConfig(), blind) == [
        f"run.guard.max_temperature is off: {why}.",
        f"run.guard.share_card is off: {why}.",
    ]
    processor = replace(blind, has_card=False)
    assert explain_blind(GuardConfig(), processor) == []
    assert explain_blind(GuardConfig(max_temperature=90), processor) == [f"run.guard.max_temperature is off: {why}."]
