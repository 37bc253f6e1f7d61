"""Decides whether a run goes on, slows or waits, from what sensors and the clock say; reads neither itself.

Each decision has two thresholds, so that a value between them changes nothing: a guard does not flap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

from lowvram.config.guard import GuardConfig
from lowvram.config.hours import is_open, next_opening
from lowvram.hardware.sensors import Reading
from lowvram.train.events import Cause
from lowvram.units import show_bytes

# A run that slowed in the heat goes on at full speed when the card is so much cooler.
COOLER_C = 5.0
# A pause in the heat takes this share of a step's time; it doubles with each reading that is still too hot, so often.
FIRST_PAUSE, MOST_DOUBLINGS, LONGEST_PAUSE_S = 0.5, 4, 60.0
# What other programs hold of the card's memory more than before: a game or a model takes more, a browser less.
OTHERS_BYTES, OTHERS_GONE_BYTES = 1 << 30, 1 << 29
OTHERS_BUSY_PERCENT, OTHERS_IDLE_PERCENT = 20.0, 10.0
# Beside another program a step is followed by three times its length: a quarter of the card is left to the run.
SHARED_PAUSE = 3.0
# A disk is roomy again with a tenth more than the limit, and the mains are back after two readings in a row.
ROOMY, READINGS_ON_MAINS = 1.1, 2


@dataclass(frozen=True)
class Go:
    """The next step may begin."""


@dataclass(frozen=True)
class Slow:
    """The next step may begin after a pause.  why: a few words for the live line, "84 °C"."""

    pause_s: float
    why: str


@dataclass(frozen=True)
class Wait:
    """No step may begin.  why: a sentence.  brief: a few words for the live line."""

    cause: Cause
    why: str
    brief: str


Verdict = Go | Slow | Wait


@dataclass(frozen=True)
class GuardMemory:
    """What earlier readings have decided.

    read_at_s: when the last reading was taken.  is_hot, doublings: whether the run is slowed by heat, and how much.
    others_bytes: what others held at the last reading, before: the least that they held in two readings in a row.
    is_shared: whether another program needs the card.  on_battery, mains_readings: whether the run waits for the mains,
    and in how many readings in a row they were there.  lacks_disk: whether it waits for room.
    """

    read_at_s: float = -1.0
    is_hot: bool = False
    doublings: int = 0
    others_bytes: int | None = None
    least_others_bytes: int | None = None
    is_shared: bool = False
    on_battery: bool = False
    mains_readings: int = 0
    lacks_disk: bool = False


def decide(
    config: GuardConfig, reading: Reading, wall_time: datetime, memory: GuardMemory, step_s: float
) -> tuple[Verdict, GuardMemory]:
    """Return what a run does before its next step, and what is remembered of the reading.

    wall_time: the time on the wall, without a zone.  step_s: how long a step takes; pauses are multiples of it.
    """
    if reading.taken_at_s != memory.read_at_s:
        memory = _remember(config, reading, memory)
    return _judge(config, reading, wall_time, memory, step_s), memory


def _judge(config: GuardConfig, reading: Reading, wall_time: datetime, memory: GuardMemory, step_s: float) -> Verdict:
    if config.windows and not is_open(config.windows, wall_time):
        opens = next_opening(config.windows, wall_time)
        hours = ", ".join(config.schedule)
        when = f"{opens:%H:%M}" if opens.date() == wall_time.date() else f"{opens:%A %H:%M}"
        return Wait("schedule", f"The hours of run.guard.schedule ({hours}) begin at {when}.", f"until {when}")
    if memory.on_battery:
        left = "" if reading.battery_percent is None else f" at {reading.battery_percent:.0f} %"
        why = f"The computer runs on its battery{left} (run.guard.battery)."
        return Wait("battery", why, f"on battery{left}")
    if memory.lacks_disk and config.least_free_disk is not None and reading.free_disk_bytes is not None:
        free, least = show_bytes(reading.free_disk_bytes), show_bytes(config.least_free_disk)
        why = f"{free} are free on the disk, and run.guard.least_free_disk is {least}."
        return Wait("disk", why, f"{free} of disk free")
    heat_s = min(LONGEST_PAUSE_S, step_s * FIRST_PAUSE * 2**memory.doublings) if memory.is_hot else 0.0
    shared_s = min(LONGEST_PAUSE_S, step_s * SHARED_PAUSE) if memory.is_shared else 0.0
    if not memory.is_hot and not memory.is_shared:
        return Go()
    hot = "heat" if reading.temperature_c is None else f"{reading.temperature_c:.0f} °C"
    whys = [why for why, holds in ((hot, memory.is_hot), ("the card is shared", memory.is_shared)) if holds]
    return Slow(max(heat_s, shared_s), ", ".join(whys))


def limit_of(config: GuardConfig, reading: Reading) -> float | None:
    """Return the temperature from which on a run slows; None where there is no limit."""
    return config.max_temperature if config.max_temperature is not None else reading.usual_limit_c


def _remember(config: GuardConfig, reading: Reading, memory: GuardMemory) -> GuardMemory:
    memory = _remember_heat(limit_of(config, reading), reading, replace(memory, read_at_s=reading.taken_at_s))
    memory = _remember_others(config.share_card, reading, memory)
    on_battery, mains = memory.on_battery, 0 if reading.on_battery else memory.mains_readings + 1
    if config.battery == "pause" and reading.on_battery:
        on_battery = True
    elif mains >= READINGS_ON_MAINS:  # also where the battery cannot be read any more
        on_battery = False
    least, free, lacks_disk = config.least_free_disk, reading.free_disk_bytes, memory.lacks_disk
    if least is None or free is None:
        lacks_disk = False
    elif free < least:
        lacks_disk = True
    elif free >= least * ROOMY:
        lacks_disk = False
    return replace(memory, on_battery=on_battery, mains_readings=mains, lacks_disk=lacks_disk)


def _remember_heat(limit_c: float | None, reading: Reading, memory: GuardMemory) -> GuardMemory:
    found = reading.temperature_c
    is_too_hot = bool(reading.is_throttled) or (found is not None and limit_c is not None and found >= limit_c)
    if is_too_hot:
        doublings = min(MOST_DOUBLINGS, memory.doublings + 1) if memory.is_hot else 0
        return replace(memory, is_hot=True, doublings=doublings)
    if not memory.is_hot or found is None or limit_c is None or found <= limit_c - COOLER_C:
        return replace(memory, is_hot=False, doublings=0)
    # Between the two thresholds the pauses shrink: the temperature settles below the limit.
    return replace(memory, doublings=max(0, memory.doublings - 1))


def _remember_others(is_asked: bool, reading: Reading, memory: GuardMemory) -> GuardMemory:
    """Remember what other programs hold; two readings in a row must agree, since our own memory may just be growing."""
    held, before, least = reading.others_bytes, memory.others_bytes, memory.least_others_bytes
    memory = replace(memory, others_bytes=held)
    if not is_asked:
        return replace(memory, is_shared=False)
    busy = reading.others_busy_percent
    grown = 0
    if held is not None and before is not None:
        least = max(held, before) if least is None else min(least, max(held, before))
        grown = min(held, before) - least
    is_shared = memory.is_shared
    if grown >= OTHERS_BYTES or (busy is not None and busy >= OTHERS_BUSY_PERCENT):
        is_shared = True
    elif grown < OTHERS_GONE_BYTES and (busy is None or busy < OTHERS_IDLE_PERCENT):
        is_shared = False
    return replace(memory, least_others_bytes=least, is_shared=is_shared)


class Sensors(Protocol):
    """What gives readings."""

    def latest(self) -> Reading:
        """Return the newest reading, at once."""


class Guard:
    """The guard of one run: its configuration, its sensors, and what it remembers.  now: the time on the wall."""

    def __init__(self, config: GuardConfig, sensors: Sensors, now: Callable[[], datetime] = datetime.now) -> None:
        self._config, self._sensors, self._now = config, sensors, now
        self._memory = GuardMemory()

    def ask(self, step_s: float) -> Verdict:
        """Return what the run does before its next step.  step_s: how long a step takes."""
        verdict, self._memory = decide(self._config, self._sensors.latest(), self._now(), self._memory, step_s)
        return verdict


def explain_blind(config: GuardConfig, reading: Reading) -> list[str]:
    """Return a sentence for each guard that is off because what it watches cannot be read."""
    watched = [("temperature_c", limit_of(config, reading) is not None or reading.has_card, "max_temperature")]
    watched += [("others_bytes", config.share_card and reading.has_card, "share_card")]
    watched += [("on_battery", config.battery == "pause", "battery")]
    watched += [("free_disk_bytes", config.least_free_disk is not None, "least_free_disk")]
    return [
        f"run.guard.{key} is off: {reading.problems[name]}."
        for name, is_wanted, key in watched
        if is_wanted and name in reading.problems
    ]
