"""Adds up the energy of a run from what sensors say, over all of its starts; reads no sensor and knows no loop."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, ValidationError

from lowvram.config.base import FrozenConfig
from lowvram.hardware.sensors import Reading
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import JsonError, read_object

ENERGY = "energy.json"
# Between two readings that lie further apart the computer may have slept, and nobody knows what it took.
MOST_GAP_S = 60.0
JOULES_PER_KWH = 3.6e6
_MOST_BYTES = 1 << 16

Source = Literal["counter", "power", "power_watts"]


class EnergyCount(FrozenConfig):
    """The energy of a run so far.  seconds: the time in which it was counted.  source: where the last part is from."""

    joules: NonNegativeFloat = 0.0
    seconds: NonNegativeFloat = 0.0
    source: Source | None = None

    @property
    def kwh(self) -> float:
        """The energy in kilowatt-hours."""
        return self.joules / JOULES_PER_KWH


def add_energy(count: EnergyCount, readings: Sequence[Reading], power_watts: float | None) -> EnergyCount:
    """Return a count with the time from the first reading to the last added.

    The card's energy counter is believed before its power, and both before power_watts, what the user says that the
    computer takes.  Where none of them is known, nothing is counted.
    """
    for before, after in itertools.pairwise(readings):
        lasted_s = after.taken_at_s - before.taken_at_s
        found = _energy_between(before, after, lasted_s, power_watts)
        if found is not None:
            joules, source = found
            count = EnergyCount(joules=count.joules + joules, seconds=count.seconds + lasted_s, source=source)
    return count


def _energy_between(
    before: Reading, after: Reading, lasted_s: float, power_watts: float | None
) -> tuple[float, Source] | None:
    if before.energy_j is not None and after.energy_j is not None and after.energy_j >= before.energy_j:
        return after.energy_j - before.energy_j, "counter"
    if lasted_s > MOST_GAP_S:
        return None
    if before.power_w is not None and after.power_w is not None:
        return lasted_s * (before.power_w + after.power_w) / 2, "power"
    return None if power_watts is None else (lasted_s * power_watts, "power_watts")


def read_energy(run: Path) -> EnergyCount:
    """Return what earlier starts of a run took; nothing where they wrote nothing that can be read."""
    try:
        return EnergyCount.model_validate(read_object(run / ENERGY, _MOST_BYTES))
    except (OSError, JsonError, ValidationError):
        return EnergyCount()


def write_energy(run: Path, count: EnergyCount, disk: Disk = DISK) -> None:
    """Write what a run took; raises DiskFullError where there is no room for some bytes."""
    disk.write(run / ENERGY, count.model_dump_json().encode())
