"""Notices what changes too slowly to be seen: a pace that falls, memory that grows, a card that spills; reads nothing.

Pace is compared between the beginning and the end of some hours, by medians, which a hitch does not move; memory must
grow all the time, as what nobody gives back does, and not once, as what is needed once does.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lowvram.units import show_bytes, show_count, show_duration

# Samples are a minute apart.  Judged is what lies between the first and the last of so many: at least three hours.
SAMPLE_EVERY_S, MOST_SAMPLES, LEAST_SPAN_S = 60.0, 720, 3 * 3600.0
# A pace is told where it has fallen by so much in all, and memory where it has grown by so many bytes.
SLOWER, GROWN_BYTES = 0.85, 256 << 20
# Both must have changed in each of so many parts of the time, by a third of an even share at least.
PACE_PARTS, MEMORY_PARTS = 4, 6
# The card is full where less than this share is free; it spills where steps then take twice their time.
FULL_SHARE, SPILLED = 0.03, 2.0
# So many samples say how fast the run is now, and so many before them how fast it was.
NOW_SAMPLES, BEFORE_SAMPLES = 3, 10


class Sample(NamedTuple):
    """How a run was at one moment.

    host_bytes: this process's memory.  card_bytes: what it has allocated on the card.  free_share: of the card's
    memory.  None: not known.
    """

    time_s: float
    tokens_per_second: float
    host_bytes: int | None = None
    card_bytes: int | None = None
    free_share: float | None = None


def find_creep(samples: Sequence[Sample]) -> dict[str, str]:
    """Return a sentence for each thing that has been changing slowly, with its figures; none in less than 3 hours."""
    if len(samples) < 3 * MEMORY_PARTS or samples[-1].time_s - samples[0].time_s < LEAST_SPAN_S:
        return {}
    lasted = show_duration(samples[-1].time_s - samples[0].time_s)
    found = {}
    paces = _medians([sample.tokens_per_second for sample in samples], PACE_PARTS)
    if paces[-1] < SLOWER * paces[0] and _is_steady([-pace for pace in paces]):
        fell = f"The pace has fallen from {show_count(paces[0])} to {show_count(paces[-1])} tokens/s in {lasted}."
        found["pace"] = f"{fell} Heat, another program or a disk that fills are the usual reasons."
    for whose, values in (
        ("This process's memory", [sample.host_bytes for sample in samples]),
        ("What this run holds of the card's memory", [sample.card_bytes for sample in samples]),
    ):
        known = [value for value in values if value is not None]
        parts = _medians(known, MEMORY_PARTS) if len(known) == len(values) else [0.0]
        if parts[-1] - parts[0] >= GROWN_BYTES and _is_steady(parts):
            grew = f"{whose} has grown from {show_bytes(known[0])} to {show_bytes(known[-1])} in {lasted}"
            found[whose] = f"{grew}, and still grows. lowvram stop and the same command begin anew from the last step."
    return found


def _medians(values: Sequence[float], parts: int) -> list[float]:
    size = len(values) // parts
    return [statistics.median(values[part * size : (part + 1) * size]) for part in range(parts)]


def _is_steady(parts: Sequence[float]) -> bool:
    """Say whether each part adds a third of its share or more: what grew once, or has stopped to grow, does not."""
    steps = [later - earlier for earlier, later in itertools.pairwise(parts)]
    return all(step >= sum(steps) / (3 * len(steps)) for step in steps)


def find_spill(samples: Sequence[Sample]) -> str | None:
    """Return a sentence where the card is full and steps take twice as long as before; None where that is not so.

    On Windows the driver then moves memory of the card into the computer's, without an error.
    """
    now, before = samples[-NOW_SAMPLES:], samples[-NOW_SAMPLES - BEFORE_SAMPLES : -NOW_SAMPLES]
    if len(before) < BEFORE_SAMPLES or any(sample.free_share is None for sample in now):
        return None
    if max(sample.free_share or 0.0 for sample in now) > FULL_SHARE:
        return None
    fast, slow = (statistics.median(sample.tokens_per_second for sample in part) for part in (before, now))
    if max(sample.tokens_per_second for sample in now) * SPILLED > fast:
        return None
    return (
        f"The card's memory is full, and the pace has fallen from {show_count(fast)} to {show_count(slow)} tokens/s: "
        "the driver has probably moved a part into the computer's memory. Close what else uses the card, or stop the "
        "run and go on with a smaller `micro_batch`; the NVIDIA control panel can forbid it (CUDA - Sysmem Fallback "
        "Policy)."
    )


@dataclass
class CreepWatch:
    """Takes the samples of a run, and tells each finding once."""

    watches_spill: bool = False
    _samples: list[Sample] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)

    def is_due(self, time_s: float) -> bool:
        """Say whether a minute has passed since the last sample."""
        return not self._samples or time_s - self._samples[-1].time_s >= SAMPLE_EVERY_S

    def add(self, sample: Sample) -> list[str]:
        """Take a sample, and return what has not been told before."""
        self._samples = [*self._samples[1 - MOST_SAMPLES :], sample]
        found = find_creep(self._samples)
        spill = find_spill(self._samples) if self.watches_spill else None
        found |= {} if spill is None else {"spill": spill}
        new = {kind: sentence for kind, sentence in found.items() if kind not in self._told}
        self._told |= new.keys()
        return list(new.values())

    def forget(self) -> None:
        """Begin anew: what was before a pause or a change of the plan says nothing about what comes."""
        self._samples = []
