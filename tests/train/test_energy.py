"""The energy of a run, from counters, powers and watts that the test makes up."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.hardware.sensors import Reading
from lowvram.train.energy import MOST_GAP_S, EnergyCount, Source, add_energy, read_energy, write_energy

HOUR_S = 3600.0


def every_five_s(count: int, **values: float) -> list[Reading]:
    return [Reading(5.0 * number, **values) for number in range(count)]


@pytest.mark.parametrize(
    ("readings", "watts", "joules", "seconds", "source"),
    [
        (every_five_s(721, power_w=200.0), None, 200 * HOUR_S, HOUR_S, "power"),
        ([Reading(0, power_w=100), Reading(10, power_w=200), Reading(20, power_w=0)], None, 2500, 20, "power"),
        ([Reading(0, energy_j=1000), Reading(5, energy_j=1600, power_w=1)], 999.0, 600, 5, "counter"),
        ([Reading(0, energy_j=9e6, power_w=100), Reading(5, energy_j=10, power_w=100)], None, 500, 5, "power"),
        (every_five_s(3), 150.0, 1500, 10, "power_watts"),
        ([Reading(0, power_w=100), Reading(5), Reading(10, power_w=100)], 50.0, 500, 10, "power_watts"),
        ([Reading(0, power_w=100), Reading(MOST_GAP_S + 1, power_w=100)], 50.0, 0, 0, None),
        ([Reading(0, energy_j=0), Reading(HOUR_S, energy_j=5e5)], None, 5e5, HOUR_S, "counter"),
        (every_five_s(9), None, 0, 0, None),
        (every_five_s(1, power_w=100.0), None, 0, 0, None),
        ([], 100.0, 0, 0, None),
    ],
    ids=[
        "an hour at 200 W",
        "the mean of two readings",
        "a counter before a power",
        "a counter that began anew",
        "watts of the run file",
        "a power that comes and goes",
        "asleep, without a counter",
        "asleep, with a counter",
        "nothing is known",
        "one reading",
        "none",
    ],
)
def test_energy_is_added_up(
    readings: list[Reading], watts: float | None, joules: float, seconds: float, source: Source | None
) -> None:
    found = add_energy(EnergyCount(), readings, watts)
    assert found.joules == pytest.approx(joules)
    assert found.seconds == pytest.approx(seconds)
    assert found.source == source
    again = add_energy(found, readings, watts)
    assert again.kwh == pytest.approx(2 * joules / 3.6e6), "what was counted before is kept"


def test_it_is_kept_beside_the_checkpoints_and_a_broken_file_begins_anew(tmp_path: Path) -> None:
    assert read_energy(tmp_path) == EnergyCount()
    count = EnergyCount(joules=5.5, seconds=2.5, source="power")
    write_energy(tmp_path, count)
    assert read_energy(tmp_path) == count
    for text in ("", "{", '{"joules": -1}', '{"joules": 1, "seconds": 1, "source": "guess"}'):
        (tmp_path / "energy.json").write_text(text, encoding="utf-8")
        assert read_energy(tmp_path) == EnergyCount()
