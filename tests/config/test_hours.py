"""Hours of the week: how they are written, which moments are in them, and when they begin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.config.guard import GuardConfig
from lowvram.config.hours import Window, is_open, next_opening, parse_window, show_window
from tests.flows.typed import environment

# 2 March 2026 is a Monday.
MONDAY = datetime(2026, 3, 2)


def at(day: int, hour: int, minute: int = 0) -> datetime:
    return MONDAY + timedelta(days=day, hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("23:00-07:00", [at(0, 23), at(1, 6, 59), at(6, 23, 30), at(0, 0)], [at(0, 7), at(0, 22, 59), at(3, 12)]),
        ("fri 23:00-07:00", [at(4, 23), at(5, 6, 59)], [at(4, 6), at(5, 7), at(5, 23), at(4, 22, 59)]),
        ("sun 22:00-02:00", [at(6, 23), at(0, 1)], [at(0, 2), at(6, 1)]),
        ("mon-fri 09:00-17:30", [at(0, 9), at(4, 17, 29)], [at(4, 17, 30), at(5, 10), at(0, 8, 59)]),
        ("sat, SUN 00:00-24:00", [at(5, 0), at(6, 23, 59)], [at(0, 0), at(4, 23, 59)]),
        ("sat-mon 9:00-10:00", [at(5, 9), at(6, 9), at(0, 9)], [at(1, 9), at(4, 9)]),
        ("monday-tuesday,fri 12:00 – 13:00", [at(0, 12), at(1, 12), at(4, 12)], [at(2, 12), at(5, 12)]),
    ],
)
def test_a_window_is_open_at_these_moments_and_closed_at_those(
    text: str, inside: list[datetime], outside: list[datetime]
) -> None:
    window = parse_window(text)
    assert [moment for moment in inside if not window.is_open(moment)] == []
    assert [moment for moment in outside if window.is_open(moment)] == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no hours"),
        ("23-7", "names no hours"),
        ("at night", "names no hours"),
        ("23:00-07:60", "holds 07:60, which is no time of the day"),
        ("23:00-25:00", "holds 25:00, which is no time of the day"),
        ("08:00-08:00", "begins where it ends; the whole day is 00:00-24:00"),
        ("24:00-08:00", "begins where it ends"),
        ("pzt 08:00-09:00", "names the day 'pzt'; days are mon, tue, wed, thu, fri, sat, sun"),
    ],
)
def test_what_is_no_window_is_refused_in_words(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_window(text)


windows = st.builds(
    Window,
    st.frozensets(st.integers(0, 6), min_size=1),
    st.integers(0, 1439),
    st.integers(0, 1440),
).filter(lambda window: window.start != window.end)


@given(windows)
def test_a_window_is_read_as_it_is_shown(window: Window) -> None:
    assert parse_window(show_window(window)) == window


@given(st.lists(windows, min_size=1, max_size=3), st.integers(0, 7 * 1440 - 1))
def test_the_next_opening_is_the_first_minute_that_is_open(several: list[Window], minute: int) -> None:
    now = MONDAY + timedelta(minutes=minute)
    if is_open(several, now):
        return
    opens = next_opening(several, now)
    assert is_open(several, opens)
    minutes = round((opens - now).total_seconds() / 60)
    assert 0 < minutes <= 7 * 1440
    assert not any(is_open(several, now + timedelta(minutes=each)) for each in range(0, minutes, 7))


@pytest.mark.skipif(sys.platform == "win32", reason="the zone is set by an environment variable of POSIX")
def test_where_clocks_are_set_for_summer_the_clock_on_the_wall_decides() -> None:
    # Berlin, 29 March 2026: after 01:59 comes 03:00.  25 October: after 02:59 comes 02:00 once more.
    script = (
        "from datetime import datetime; from lowvram.config.hours import parse_window\n"
        "window = parse_window('02:30-03:30')\n"
        "for start in (1774742400, 1792882800):\n"
        "    half_hours = [datetime.fromtimestamp(start + 1800 * n) for n in range(9)]\n"
        "    print(' '.join(f'{when:%H:%M}' for when in half_hours if window.is_open(when)))\n"
    )
    words = [sys.executable, "-c", script]
    found = subprocess.run(words, env=environment(TZ="Europe/Berlin"), capture_output=True, text=True, check=True)
    if os.path.exists("/usr/share/zoneinfo/Europe/Berlin"):
        assert found.stdout.splitlines() == ["03:00", "02:30 02:30 03:00"]


def test_the_tables_of_the_page_are_read_as_they_stand_there() -> None:
    page = (Path(__file__).parents[2] / "docs/flatmate.md").read_text(encoding="utf-8")
    texts = re.findall(r"```toml\n(\[run\.guard\]\n.*?)```", page, re.S)
    tables = [tomllib.loads(text)["run"]["guard"] for text in texts]
    assert [list(table) for table in tables] == [["schedule"], ["price_per_kwh", "currency", "power_watts"]]
    [weekend] = [window for window in GuardConfig(**tables[0]).windows if window.days == {5, 6}]
    assert weekend.is_open(at(5, 12))
    assert GuardConfig(**tables[1]).power_watts == 420
