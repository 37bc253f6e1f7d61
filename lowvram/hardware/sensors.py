"""Reads temperature, power, fan, the card's memory, battery and free disk; decides nothing, never imports torch.

What cannot be read is None, with a reason.  A thread reads every few seconds, so that a call that hangs stops nobody:
after a while its last reading counts as unknown.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import psutil

from lowvram.hardware.detect import first_visible_index

READ_EVERY_S = 5.0
# Older readings say nothing any more: six of them are missing.
STALE_S = 30.0
# Readings that are kept for whoever adds up energy, and comes only after a step of some minutes.
_KEPT = 720
# A card is slowed before it slows itself, by so many degrees; where its driver does not tell when that is, near where
# most GeForce cards hold themselves.
_MARGIN_C, _USUAL_LIMIT_C = 10.0, 83.0
_PMSET_S = 2.0


@dataclass(frozen=True)
class Reading:
    """What the sensors say at one moment; None: it cannot be read, or there is no such thing here.

    taken_at_s: on the monotonic clock.  usual_limit_c: from which temperature on a card should be slowed.  power_w,
    energy_j: of the card, now and since its driver was loaded.  card_used_bytes: by all programs.  others_bytes: by
    other programs, and what the driver keeps of ours.  others_busy_percent: of the card's time.  is_throttled: the
    system slows the card or the processor, because it is hot.  host_bytes: this process's memory.
    problems: why, for each value that should be there and cannot be read.
    """

    taken_at_s: float
    temperature_c: float | None = None
    usual_limit_c: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    fan_percent: float | None = None
    card_used_bytes: int | None = None
    card_free_bytes: int | None = None
    others_bytes: int | None = None
    others_busy_percent: float | None = None
    is_throttled: bool | None = None
    on_battery: bool | None = None
    battery_percent: float | None = None
    free_disk_bytes: int | None = None
    host_bytes: int | None = None
    has_card: bool = False
    problems: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Something that can be read."""

    def read(self, reading: Reading) -> Reading:
        """Return a reading with what this source knows added."""


def unknown(now_s: float, why: str) -> Reading:
    """Return a reading in which nothing can be read."""
    names = {each.name for each in fields(Reading)} - {"taken_at_s", "has_card", "problems"}
    return Reading(now_s, problems=dict.fromkeys(sorted(names), why))


class NvmlSource:
    """The NVIDIA card that a run uses, by its driver.

    own_bytes: what this process has allocated on it, read at the same moment as what all programs have.
    """

    def __init__(self, own_bytes: Callable[[], int]) -> None:
        self._own_bytes = own_bytes
        self._nvml: Any = None
        self._card: Any = None
        self._busy_since_us = 0

    def read(self, reading: Reading) -> Reading:
        """Return a reading with the card's values added; a card that is gone has none."""
        reading = replace(reading, has_card=True)
        problem = self._open()
        if problem:
            names = ("temperature_c", "power_w", "fan_percent", "others_bytes")
            return _with_problems(reading, dict.fromkeys(names, problem))
        for add in (self._add_heat, self._add_power, self._add_memory, self._add_others):
            reading = add(reading)
        return reading

    def _open(self) -> str:
        """Open the driver where it is not open; return why that is impossible, else ""."""
        if self._card is not None:
            return ""
        try:
            import pynvml
        except ImportError:
            return "nvidia-ml-py is not installed"
        try:
            pynvml.nvmlInit()
            index = first_visible_index(pynvml)
            if index is None:
                return "the driver shows no card"
            self._nvml, self._card = pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            return f"the driver says: {error}"
        return ""

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Return what one of NVML's functions says of the card, or its error as a text that begins with the name."""
        function = getattr(self._nvml, name, None)
        if function is None:
            return _Refused("this nvidia-ml-py cannot ask for it")
        try:
            return function(self._card, *arguments)
        except self._nvml.NVMLError as error:
            return _Refused(f"the driver says: {error}")

    def _add_heat(self, reading: Reading) -> Reading:
        nvml = self._nvml
        found = self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        slows_at = self._ask("nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        fan = self._ask("nvmlDeviceGetFanSpeed")
        is_known = not isinstance(slows_at, _Refused) and slows_at > 0
        hot = nvml.nvmlClocksThrottleReasonSwThermalSlowdown | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
        problems = {"temperature_c": found, "fan_percent": fan}
        return replace(
            _with_problems(reading, {name: each.why for name, each in problems.items() if isinstance(each, _Refused)}),
            temperature_c=_number(found),
            usual_limit_c=slows_at - _MARGIN_C if is_known else _USUAL_LIMIT_C,
            is_throttled=None if isinstance(reasons, _Refused) else bool(reasons & hot),
            fan_percent=_number(fan),
        )

    def _add_power(self, reading: Reading) -> Reading:
        power, energy = self._ask("nvmlDeviceGetPowerUsage"), self._ask("nvmlDeviceGetTotalEnergyConsumption")
        if isinstance(power, _Refused):
            reading = _with_problems(reading, {"power_w": power.why})
        return replace(reading, power_w=_number(power, 1e3), energy_j=_number(energy, 1e3))

    def _add_memory(self, reading: Reading) -> Reading:
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        if isinstance(memory, _Refused):
            return _with_problems(reading, {"others_bytes": memory.why})
        used = int(memory.used)
        others = max(0, used - self._own_bytes())
        return replace(reading, card_used_bytes=used, card_free_bytes=int(memory.free), others_bytes=others)

    def _add_others(self, reading: Reading) -> Reading:
        """Add how busy other programs keep the card, where the driver tells which of them is this one."""
        processes = self._ask("nvmlDeviceGetComputeRunningProcesses")
        # In a container processes have other numbers, and this one would be taken for another program.
        if isinstance(processes, _Refused) or os.getpid() not in {process.pid for process in processes}:
            return reading
        samples = self._ask("nvmlDeviceGetProcessUtilization", self._busy_since_us)
        if isinstance(samples, _Refused):  # also where nobody used the card since the last time
            return reading
        busy: dict[int, int] = {}
        for sample in samples:
            self._busy_since_us = max(self._busy_since_us, int(sample.timeStamp))
            busy[sample.pid] = max(busy.get(sample.pid, 0), min(100, int(sample.smUtil)))
        others = sum(percent for pid, percent in busy.items() if pid != os.getpid())
        return replace(reading, others_busy_percent=float(others))


@dataclass(frozen=True)
class _Refused:
    """Why a value cannot be read."""

    why: str


def _number(found: Any, divisor: float = 1.0) -> float | None:
    return None if isinstance(found, _Refused) else float(found) / divisor


def _with_problems(reading: Reading, problems: dict[str, str]) -> Reading:
    return replace(reading, problems=reading.problems | problems)


class HostSource:
    """The computer: battery, free disk of a directory, and the memory of this process."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._process = directory, psutil.Process()

    def read(self, reading: Reading) -> Reading:
        """Return a reading with the computer's values added."""
        reading = replace(reading, host_bytes=self._process.memory_info().rss)
        try:
            reading = replace(reading, free_disk_bytes=shutil.disk_usage(self._directory).free)
        except OSError as error:
            reading = _with_problems(reading, {"free_disk_bytes": f"the system says: {error.strerror}"})
        return self._add_battery(reading)

    def _add_battery(self, reading: Reading) -> Reading:
        if not hasattr(psutil, "sensors_battery"):
            return _with_problems(reading, {"on_battery": "psutil cannot read a battery on this system"})
        try:
            battery = psutil.sensors_battery()
        except (OSError, RuntimeError, ValueError) as error:  # half-written files of some drivers in /sys
            return _with_problems(reading, {"on_battery": f"psutil says: {error}"})
        if battery is None or battery.power_plugged is None:
            return replace(reading, on_battery=False)  # there is none
        return replace(reading, on_battery=not battery.power_plugged, battery_percent=float(battery.percent))


class ProcessorSource:
    """A processor's temperature, where the system tells it (Linux)."""

    _CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")

    def read(self, reading: Reading) -> Reading:
        """Return a reading with the temperature of the hottest part of the processor added."""
        if not hasattr(psutil, "sensors_temperatures"):
            return _with_problems(reading, {"temperature_c": "psutil cannot read a temperature on this system"})
        try:
            found = psutil.sensors_temperatures()
        except (OSError, RuntimeError, ValueError) as error:
            return _with_problems(reading, {"temperature_c": f"psutil says: {error}"})
        parts = [part.current for chip in self._CHIPS for part in found.get(chip, ()) if part.current]
        if not parts:
            return _with_problems(reading, {"temperature_c": "the system tells no temperature of the processor"})
        return replace(reading, temperature_c=float(max(parts)))


class PmsetSource:
    """Whether macOS slows the computer because it is hot, as `pmset -g therm` tells without root."""

    def read(self, reading: Reading) -> Reading:
        """Return a reading with that added; macOS tells no temperature without root."""
        reading = _with_problems(reading, {"temperature_c": "macOS tells it to root only"})
        try:
            words = ["pmset", "-g", "therm"]
            found = subprocess.run(words, capture_output=True, text=True, timeout=_PMSET_S, check=True).stdout
        except (OSError, subprocess.SubprocessError) as error:
            return _with_problems(reading, {"is_throttled": f"pmset: {error}"})
        return replace(reading, is_throttled=is_throttled(found))


_SPEED_LIMIT = re.compile(r"CPU_Speed_Limit\s*=\s*(\d+)")
_WARNING = re.compile(r"(?:thermal|performance) warning level\D*(\d+)", re.IGNORECASE)


def is_throttled(therm: str) -> bool:
    """Say whether the output of `pmset -g therm` tells of a limited speed or of a warning."""
    limits = [int(limit) for limit in _SPEED_LIMIT.findall(therm)]
    return any(limit < 100 for limit in limits) or any(int(level) > 0 for level in _WARNING.findall(therm))


def choose_sources(device: str, directory: Path, own_bytes: Callable[[], int]) -> list[Source]:
    """Return what can be read for a device ("cuda", "mps" or "cpu").

    directory: whose disk is watched.  own_bytes: what this process has allocated on the card.
    """
    host: list[Source] = [HostSource(directory)]
    if device == "cuda":
        return [*host, NvmlSource(own_bytes)]
    return [*host, PmsetSource() if sys.platform == "darwin" else ProcessorSource()]


class SensorThread:
    """Reads sources every few seconds, in a thread of its own.  clock: seconds."""

    def __init__(self, sources: Sequence[Source], clock: Callable[[], float] = time.monotonic) -> None:
        self._sources, self._clock = sources, clock
        self._readings: deque[Reading] = deque(maxlen=_KEPT)
        self._began_s = clock()
        self._first, self._ended = threading.Event(), threading.Event()

    def start(self, wait_s: float = 1.0) -> None:
        """Read from now on; return when there is a first reading, or after `wait_s`."""
        threading.Thread(target=self._read_on, daemon=True, name="lowvram-sensors").start()
        self._first.wait(wait_s)

    def close(self) -> None:
        """Read no more; a call that hangs is left alone."""
        self._ended.set()

    def read_once(self) -> None:
        """Read all sources now."""
        reading = Reading(self._clock())
        for source in self._sources:
            reading = source.read(reading)
        self._readings.append(reading)
        self._first.set()

    def latest(self) -> Reading:
        """Return the newest reading, at once; one in which nothing can be read where it is too old."""
        newest_s = self._readings[-1].taken_at_s if self._readings else self._began_s
        age_s = self._clock() - newest_s
        if age_s > STALE_S:
            # A new one every STALE_S: who waits for several readings in a row gets them.
            return unknown(newest_s + age_s // STALE_S * STALE_S, f"the sensors have not answered for {STALE_S:.0f} s")
        return self._readings[-1] if self._readings else unknown(newest_s, "the sensors have not answered yet")

    def since(self, taken_at_s: float) -> list[Reading]:
        """Return the readings that were taken after a moment, the oldest first."""
        return [reading for reading in list(self._readings) if reading.taken_at_s > taken_at_s]

    def _read_on(self) -> None:
        self.read_once()
        while not self._ended.wait(READ_EVERY_S):
            self.read_once()


@contextmanager
def reading_sensors(sources: Sequence[Source]) -> Iterator[SensorThread]:
    """Read sources inside the block."""
    thread = SensorThread(sources)
    thread.start()
    try:
        yield thread
    finally:
        thread.close()
