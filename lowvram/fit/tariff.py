"""What a run costs in all hours of a tariff, and in its cheapest ones only; knows no model and asks no clock."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from lowvram.config.hours import MINUTES_OF_DAY, Window, show_window
from lowvram.config.tariff import MINUTES_OF_WEEK, Tariff


class HoursPlan(NamedTuple):
    """The hours in which a run may train, and what follows from them.

    most_per_kwh: the highest price among them.  hours_per_week: how many there are.  finishes: when the run has ended
    that begins now.  mean_per_kwh, cost: of the hours that it takes; cost None where its energy is not known.
    schedule: as `run.guard.schedule` takes them; empty for all hours.
    """

    most_per_kwh: float
    hours_per_week: float
    finishes: datetime
    mean_per_kwh: float
    cost: float | None
    schedule: tuple[str, ...]


def plan_hours(tariff: Tariff, days: float, kwh: float | None, now: datetime) -> list[HoursPlan]:
    """Return a plan for each price of a tariff: to train in all hours that cost no more; the dearest come first.

    days, kwh: how long the run computes, and what that takes.  now: on the clock on the wall, where it begins.
    """
    prices = tariff.minutes()
    first = now.weekday() * MINUTES_OF_DAY + now.hour * 60 + now.minute
    needed = max(1, round(days * MINUTES_OF_DAY))
    plans = []
    for most in sorted(set(prices), reverse=True):
        is_open = [price <= most for price in prices]
        lasts, paid = _walk(prices, is_open, first, needed)
        mean = paid / needed
        plans.append(
            HoursPlan(
                most,
                sum(is_open) / 60,
                now + timedelta(minutes=lasts),
                mean,
                None if kwh is None else kwh * mean,
                tuple(map(show_window, _find_windows(is_open))),
            )
        )
    return plans


def _walk(prices: Sequence[float], is_open: Sequence[bool], first: int, needed: int) -> tuple[int, float]:
    """Return after how many minutes `needed` open ones have passed, and the sum of their prices."""
    weeks, left = divmod(needed - 1, sum(is_open))
    paid = weeks * sum(price for price, may in zip(prices, is_open, strict=True) if may)
    left += 1  # from 1 to all of a week's open minutes: the last minute of a run is never a closed one
    for minute in itertools.count():
        place = (first + minute) % MINUTES_OF_WEEK
        if is_open[place]:
            paid, left = paid + prices[place], left - 1
        if not left:
            return weeks * MINUTES_OF_WEEK + minute + 1, paid
    raise AssertionError("some minute of the week is open")


def _find_windows(is_open: Sequence[bool]) -> list[Window]:
    """Return the windows whose minutes are the open ones; none where all are."""
    if all(is_open):
        return []
    days_of: dict[tuple[int, int], set[int]] = {}
    for start in (place for place in range(MINUTES_OF_WEEK) if is_open[place] and not is_open[place - 1]):
        length = next(n for n in itertools.count() if not is_open[(start + n) % MINUTES_OF_WEEK])
        for begins, lasts in _cut(start, length):
            day, minute = divmod(begins % MINUTES_OF_WEEK, MINUTES_OF_DAY)
            end = minute + lasts
            # An end at midnight is written 24:00; beyond it the window is of the next day.
            days_of.setdefault((minute, end if end <= MINUTES_OF_DAY else end - MINUTES_OF_DAY), set()).add(day)
    return [Window(frozenset(days), *times) for times, days in days_of.items()]


def _cut(start: int, length: int) -> list[tuple[int, int]]:
    """Return a stretch of minutes in pieces that a window can name: less than a day, or whole days."""
    if length < MINUTES_OF_DAY:
        return [(start, length)]
    pieces, place, end = [], start, start + length
    while place < end:
        until = min(end, (place // MINUTES_OF_DAY + 1) * MINUTES_OF_DAY)
        pieces.append((place, until - place))
        place = until
    return pieces
