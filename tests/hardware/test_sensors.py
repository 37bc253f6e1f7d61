"""What sensors say, from a driver, a processor and a `pmset` that the test makes up; and a call that never returns."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from lowvram.hardware import sensors
from lowvram.hardware.sensors import (
    STALE_S,
    HostSource,
    NvmlSource,
    PmsetSource,
    ProcessorSource,
    Reading,
    SensorThread,
    Source,
    choose_sources,
    is_throttled,
)


class NVMLError(Exception):
    """As NVML's own."""


class FakeNvml:
    """A driver with one card; `answers` holds what each function returns, or raises."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 0, 1
    nvmlClocksThrottleReasonSwThermalSlowdown, nvmlClocksThrottleReasonHwThermalSlowdown = 0x20, 0x40

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {
            "GetTemperature": 71,
            "GetTemperatureThreshold": 93,
            "GetCurrentClocksThrottleReasons": 0,
            "GetFanSpeed": 45,
            "GetPowerUsage": 180_500,
            "GetTotalEnergyConsumption": 7_200_000,
            "GetMemoryInfo": SimpleNamespace(used=5 << 30, free=3 << 30, total=8 << 30),
            "GetComputeRunningProcesses": [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=1)],
            "GetProcessUtilization": [
                SimpleNamespace(pid=os.getpid(), smUtil=99, timeStamp=5),
                SimpleNamespace(pid=1, smUtil=7, timeStamp=3),
                SimpleNamespace(pid=1, smUtil=31, timeStamp=4),
            ],
        } | answers
        self.asked: dict[str, tuple[Any, ...]] = {}

    def nvmlInit(self) -> None:
        if "Init" in self.answers:
            raise self.answers["Init"]

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"card {index}"

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        short = name.removeprefix("nvmlDevice")
        if short not in self.answers:
            raise AttributeError(name)

        def answer(card: str, *arguments: Any) -> Any:
            assert card == "card 0"
            self.asked[short] = arguments
            found = self.answers[short]
            if isinstance(found, Exception):
                raise found
            return found

        return answer


def read_card(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, own_bytes: int = 4 << 30) -> Reading:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return NvmlSource(lambda: own_bytes).read(Reading(0.0))


def test_a_card_is_read_in_the_units_of_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_card(monkeypatch, FakeNvml())
    assert (found.temperature_c, found.usual_limit_c, found.fan_percent) == (71.0, 83.0, 45.0)
    assert (found.power_w, found.energy_j) == (180.5, 7200.0)
    assert (found.card_used_bytes, found.card_free_bytes, found.others_bytes) == (5 << 30, 3 << 30, 1 << 30)
    assert (found.others_busy_percent, found.is_throttled, found.has_card) == (31.0, False, True)
    assert found.problems == {}


@pytest.mark.parametrize(("reasons", "is_hot"), [(0x20, True), (0x40, True), (0x04, False), (0x61, True)])
def test_only_heat_counts_among_the_reasons_of_a_slow_card(
    monkeypatch: pytest.MonkeyPatch, reasons: int, is_hot: bool
) -> None:
    assert read_card(monkeypatch, FakeNvml(GetCurrentClocksThrottleReasons=reasons)).is_throttled is is_hot


def test_what_a_card_does_not_tell_is_unknown_with_the_drivers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = NVMLError("Not Supported")
    names = ("GetTemperature", "GetTemperatureThreshold", "GetCurrentClocksThrottleReasons", "GetFanSpeed")
    names += ("GetPowerUsage", "GetTotalEnergyConsumption", "GetMemoryInfo", "GetComputeRunningProcesses")
    found = read_card(monkeypatch, FakeNvml(**dict.fromkeys(names, refused)))
    says = "the driver says: Not Supported"
    assert found.problems == dict.fromkeys(("temperature_c", "fan_percent", "power_w", "others_bytes"), says)
    assert found.usual_limit_c == 83.0, "GeForce cards hold themselves near it"
    unread = (found.temperature_c, found.energy_j, found.is_throttled, found.others_bytes, found.others_busy_percent)
    assert unread == (None, None, None, None, None)


@pytest.mark.parametrize(
    ("nvml", "why"),
    [(FakeNvml(Init=NVMLError("Driver Not Loaded")), "the driver says: Driver Not Loaded"), (None, "is not installed")],
    ids=["no driver", "no package"],
)
def test_without_a_driver_a_card_says_why(monkeypatch: pytest.MonkeyPatch, nvml: Any, why: str) -> None:
    found = read_card(monkeypatch, nvml)
    assert why in found.problems["temperature_c"]
    assert why in found.problems["others_bytes"]
    assert found.has_card


def test_in_a_container_whose_processes_have_other_numbers_this_run_is_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strangers = FakeNvml(GetComputeRunningProcesses=[SimpleNamespace(pid=1)])
    assert read_card(monkeypatch, strangers).others_busy_percent is None


def test_the_use_of_a_card_is_asked_for_from_the_last_sample_on(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    source = NvmlSource(lambda: 0)
    source.read(Reading(0.0))
    source.read(Reading(5.0))
    assert nvml.asked["GetProcessUtilization"] == (5,)


@pytest.mark.parametrize(
    ("battery", "on_battery", "percent"),
    [
        (None, False, None),
        (SimpleNamespace(percent=63.4, power_plugged=False), True, 63.4),
        (SimpleNamespace(percent=100, power_plugged=True), False, 100.0),
        (SimpleNamespace(percent=50, power_plugged=None), False, None),
        (RuntimeError("torn"), None, None),
    ],
    ids=["a desktop", "unplugged", "plugged", "it does not say", "a driver that fails"],
)
def test_a_battery_is_read_and_a_desktop_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, battery: Any, on_battery: bool | None, percent: float | None
) -> None:
    def read() -> Any:
        if isinstance(battery, Exception):
            raise battery
        return battery

    monkeypatch.setattr(psutil, "sensors_battery", read, raising=False)
    found = HostSource(tmp_path).read(Reading(0.0))
    assert (found.on_battery, found.battery_percent) == (on_battery, percent)
    assert ("on_battery" in found.problems) == (on_battery is None)
    assert found.free_disk_bytes == pytest.approx(psutil.disk_usage(str(tmp_path)).free, rel=0.05)
    assert found.host_bytes is not None
    assert found.host_bytes > 10 << 20


def test_a_system_without_a_sensor_or_a_directory_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(psutil, "sensors_battery", raising=False)
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    found = ProcessorSource().read(HostSource(tmp_path / "gone").read(Reading(0.0)))
    assert set(found.problems) == {"free_disk_bytes", "on_battery", "temperature_c"}


def test_a_processor_is_as_hot_as_its_hottest_part(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "nvme": [SimpleNamespace(current=99.0)],
        "coretemp": [SimpleNamespace(current=70.0), SimpleNamespace(current=81.5)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: parts, raising=False)
    assert ProcessorSource().read(Reading(0.0)).temperature_c == 81.5


QUIET = (
    "Note: No thermal warning level has been recorded\nNote: No performance warning level has been recorded\n"
    "Note: No CPU power status has been recorded\n"
)


@pytest.mark.parametrize(
    ("therm", "says"),
    [
        (QUIET, False),
        ("CPU_Scheduler_Limit \t= 100\nCPU_Available_CPUs \t= 8\nCPU_Speed_Limit \t= 70\n", True),
        ("CPU_Scheduler_Limit \t= 100\nCPU_Available_CPUs \t= 8\nCPU_Speed_Limit \t= 100\n", False),
        ("Thermal Warning Level = 2\n", True),
        ("Thermal Warning Level = 0\n", False),
        ("", False),
    ],
    ids=["nothing recorded", "limited", "unlimited", "a warning", "level 0", "empty"],
)
def test_macos_tells_whether_it_throttles(therm: str, says: bool) -> None:
    assert is_throttled(therm) is says


def test_pmset_that_fails_or_is_missing_turns_its_guard_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError(2, "No such file", "pmset")

    monkeypatch.setattr(subprocess, "run", fail)
    found = PmsetSource().read(Reading(0.0))
    assert found.is_throttled is None
    assert set(found.problems) == {"temperature_c", "is_throttled"}


def test_each_device_has_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for device, system, last in (
        ("cuda", "linux", NvmlSource),
        ("cpu", "linux", ProcessorSource),
        ("cpu", "win32", ProcessorSource),
        ("mps", "darwin", PmsetSource),
    ):
        monkeypatch.setattr(sensors.sys, "platform", system)
        [host, other] = choose_sources(device, tmp_path, lambda: 0)
        assert (type(host), type(other)) == (HostSource, last)


class Hanging:
    """A source whose second call never returns."""

    def __init__(self) -> None:
        self.calls, self.hangs, self.end = 0, threading.Event(), threading.Event()

    def read(self, reading: Reading) -> Reading:
        self.calls += 1
        if self.calls > 1:
            self.hangs.set()
            self.end.wait(30)
        return Reading(reading.taken_at_s, temperature_c=70.0)


def test_a_sensor_that_hangs_stops_nobody_and_is_unknown_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "READ_EVERY_S", 0.001)
    now, source = [100.0], Hanging()
    thread = SensorThread([source], lambda: now[0])
    thread.start(10.0)
    assert thread.latest().temperature_c == 70.0
    assert source.hangs.wait(10)
    now[0] += STALE_S
    assert thread.latest().temperature_c == 70.0
    now[0] += 1.0
    lost = thread.latest()
    assert lost.temperature_c is None
    assert lost.problems["temperature_c"] == "the sensors have not answered for 30 s"
    now[0] += STALE_S
    assert 100.0 < lost.taken_at_s < thread.latest().taken_at_s, "a guard counts them as new readings"
    thread.close()
    source.end.set()


def test_readings_are_kept_for_whoever_comes_late() -> None:
    now = [0.0]
    source: Source = ProcessorSource()
    thread = SensorThread([source], lambda: now[0])
    assert thread.latest().problems["power_w"] == "the sensors have not answered yet"
    for now[0] in (5.0, 10.0, 15.0):
        thread.read_once()
    assert [reading.taken_at_s for reading in thread.since(5.0)] == [10.0, 15.0]
    assert thread.latest().taken_at_s == 15.0
