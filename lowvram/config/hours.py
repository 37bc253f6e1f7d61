"""Hours of the week as people write them, "23:00-07:00" or "sat,sun 09:00-18:00": read and compared; asks no clock.

All times are those of the wall clock.  Where it is set back or forward for summer, a window begins and ends when the
clock on the wall says so, and is an hour longer or shorter that night.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, time, timedelta
from typing import NamedTuple

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_LONG_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MINUTES_OF_DAY = 1440
_FORM = '"23:00-07:00", "mon-fri 22:00-06:00" or "sat,sun 00:00-24:00"'
_WINDOW = re.compile(r"(?:(?P<days>[a-z][a-z, -]*?)\s+)?(?P<start>\d{1,2}:\d\d)\s*[-–]\s*(?P<end>\d{1,2}:\d\d)")


class Window(NamedTuple):
    """Hours that are open on some days.

    days: 0 is Monday; a window over midnight belongs to the day on which it begins.  start, end: minutes after
    midnight; where end is not after start, the window ends on the next day.
    """

    days: frozenset[int]
    start: int
    end: int

    @property
    def crosses_midnight(self) -> bool:
        """Say whether it ends on the day after the one on which it begins."""
        return self.end <= self.start

    def is_open(self, when: datetime) -> bool:
        """Say whether a moment is in it."""
        day, minute = when.weekday(), when.hour * 60 + when.minute
        if not self.crosses_midnight:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


def parse_window(text: str) -> Window:
    """Return the window that a text describes; raises ValueError that says how to write one."""
    match = _WINDOW.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} names no hours; write them like {_FORM}")
    start, end = _read_minute(match["start"], text), _read_minute(match["end"], text)
    if start in (MINUTES_OF_DAY, end):
        raise ValueError(f"{text!r} begins where it ends; the whole day is 00:00-24:00")
    return Window(_read_days(match["days"], text), start, end)


def _read_minute(text: str, whole: str) -> int:
    hour, minute = map(int, text.split(":"))
    if minute > 59 or hour * 60 + minute > MINUTES_OF_DAY:
        raise ValueError(f"{whole!r} holds {text}, which is no time of the day; write hours like {_FORM}")
    return hour * 60 + minute


def _read_days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    days: set[int] = set()
    for part in text.split(","):
        first, *rest = (_read_day(word, whole) for word in part.split("-", 1))
        last = rest[0] if rest else first
        days |= {day % 7 for day in range(first, first + (last - first) % 7 + 1)}
    return frozenset(days)


def _read_day(word: str, whole: str) -> int:
    word = word.strip()
    for names in (DAYS, _LONG_DAYS):
        if word in names:
            return names.index(word)
    raise ValueError(f"{whole!r} names the day {word!r}; days are {', '.join(DAYS)}")


def show_window(window: Window) -> str:
    """Return a window as `parse_window` reads it."""
    hours = f"{_show_minute(window.start)}-{_show_minute(window.end)}"
    return hours if len(window.days) == 7 else f"{_show_days(window.days)} {hours}"


def _show_minute(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


def _show_days(days: Iterable[int]) -> str:
    """Return days as `mon-fri` or `mon,wed`."""
    left, parts = sorted(days), []
    while left:
        run = [left.pop(0)]
        while left and left[0] == run[-1] + 1:
            run.append(left.pop(0))
        parts += [DAYS[day] for day in run] if len(run) < 3 else [f"{DAYS[run[0]]}-{DAYS[run[-1]]}"]
    return ",".join(parts)


def is_open(windows: Sequence[Window], when: datetime) -> bool:
    """Say whether a moment is in one of the windows."""
    return any(window.is_open(when) for window in windows)


def next_opening(windows: Sequence[Window], when: datetime) -> datetime:
    """Return when the next of the windows begins after a moment that is in none of them."""
    starts = [
        datetime.combine(date, time(window.start // 60, window.start % 60))
        for date in (when.date() + timedelta(days=days) for days in range(8))
        for window in windows
        if date.weekday() in window.days
    ]
    return min(start for start in starts if start > when)
