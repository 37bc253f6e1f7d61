"""What changes slowly is told, with its figures, and noise is not: on series that the test makes up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from lowvram.train.creep import MOST_SAMPLES, CreepWatch, Sample, find_creep, find_spill

GIB = 1 << 30


def series(
    hours: float,
    pace: Callable[[float], float] = lambda hour: 1000.0,
    host: Callable[[float], float] = lambda hour: 2.0,
    card: Callable[[float], float] = lambda hour: 6.0,
    noise: float = 0.05,
    seed: int = 0,
) -> list[Sample]:
    """Return a sample a minute.  pace, host, card: tokens/s and GiB after so many hours."""
    chance = random.Random(seed)
    found = []
    for minute in range(round(hours * 60)):
        hour = minute / 60
        shaken = pace(hour) * chance.gauss(1.0, noise)
        memory = int(host(hour) * GIB * chance.gauss(1.0, noise / 20))
        found.append(Sample(60.0 * minute, shaken, memory, int(card(hour) * GIB), 0.2))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_noise_a_day_and_night_and_a_hitch_are_no_creep(seed: int) -> None:
    calm = series(12, noise=0.1, seed=seed)
    assert find_creep(calm) == {}
    daily = series(12, pace=lambda hour: 1000 + 80 * math.sin(hour), host=lambda h: 2 + 0.1 * math.sin(h), seed=seed)
    assert find_creep(daily) == {}
    hitch = [sample._replace(tokens_per_second=10.0) if 100 <= n < 130 else sample for n, sample in enumerate(calm)]
    assert find_creep(hitch) == {}


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (series(6, pace=lambda hour: 1000 - 50 * hour), "The pace has fallen from"),
        (series(6, host=lambda hour: 2 + 0.2 * hour), "This process's memory has grown from 2.0 GiB to 3."),
        (
            series(6, card=lambda hour: 6 + 0.2 * hour),
            "What this run holds of the card's memory has grown from 6",
        ),
    ],
    ids=["pace", "host", "card"],
)
def test_what_creeps_for_hours_is_told_with_its_figures(samples: list[Sample], says: str) -> None:
    [told] = find_creep(samples).values()
    assert told.startswith(says)
    assert "in 5 h 59 min" in told
    assert find_creep(samples[:150]) == {}, "two and a half hours are too short to tell"


@pytest.mark.parametrize(
    "samples",
    [
        series(6, pace=lambda hour: 1000 if hour < 1 else 700),
        series(6, host=lambda hour: 2 if hour < 1 else 4),
        series(6, host=lambda hour: min(4.0, 2 + hour)),
        series(6, card=lambda hour: 6 + 0.02 * hour),
        series(6, pace=lambda hour: 1000 - 10 * hour),
        series(6, pace=lambda hour: 700 + 50 * hour, host=lambda hour: 6 - 0.2 * hour),
    ],
    ids=["another pace", "needed once", "it has stopped", "a little", "a few percent", "it gets better"],
)
def test_what_has_stopped_or_is_small_is_no_creep(samples: list[Sample]) -> None:
    assert find_creep(samples) == {}


def test_unknown_memory_is_not_judged() -> None:
    samples = [sample._replace(host_bytes=None, card_bytes=None) for sample in series(6, host=lambda h: 2 + h)]
    assert find_creep(samples) == {}
    assert find_spill([sample._replace(free_share=None) for sample in samples]) is None


def with_end(pace: float, free_share: float) -> list[Sample]:
    before = series(0.5, noise=0.02)
    return before + [Sample(1800.0 + 60 * n, pace, 2 * GIB, 8 * GIB, free_share) for n in range(3)]


@pytest.mark.parametrize(
    ("pace", "free_share", "is_told"),
    [(110.0, 0.01, True), (480.0, 0.03, True), (600.0, 0.01, False), (110.0, 0.2, False)],
    ids=["nine times slower", "twice slower", "a little slower", "slow with room"],
)
def test_a_full_card_that_is_twice_as_slow_spills(pace: float, free_share: float, is_told: bool) -> None:
    told = find_spill(with_end(pace, free_share))
    assert (told is not None) == is_told
    if told is not None:
        assert "from 1.0k to" in told or "from 99" in told
        assert "`micro_batch`" in told
    assert find_spill(with_end(pace, free_share)[-5:]) is None, "there is nothing to compare with"


def test_each_finding_is_told_once_and_forgotten_samples_say_nothing() -> None:
    watch, told = CreepWatch(), list[str]()
    samples = series(8, pace=lambda hour: 1000 - 50 * hour, host=lambda hour: 2 + 0.2 * hour)
    for sample in samples:
        assert watch.is_due(sample.time_s)
        told += watch.add(sample)
        assert not watch.is_due(sample.time_s + 59)
    assert len(told) == 2
    again = CreepWatch()
    for number, sample in enumerate(samples):
        if number % 150 == 0:
            again.forget()
        assert again.add(sample) == []


def test_a_run_of_weeks_keeps_half_a_day_of_samples() -> None:
    watch = CreepWatch(watches_spill=True)
    for sample in series(MOST_SAMPLES / 60 + 1, noise=0.0):
        assert watch.add(sample) == []
    assert len(watch._samples) == MOST_SAMPLES
