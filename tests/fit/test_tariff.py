"""What a run costs by the hour of a tariff: which hours are cheap, when it ends, and how a run file says so."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.config.guard import GuardConfig
from lowvram.config.hours import is_open
from lowvram.config.tariff import MINUTES_OF_WEEK, Price, Tariff, read_tariff
from lowvram.errors import ConfigError
from lowvram.fit.tariff import plan_hours
from tests.flows.typed import typed

# A Monday, at midnight.
MONDAY = datetime(2026, 3, 2)
NIGHT_AND_DAY = Tariff(
    currency="TL",
    price=(
        Price(hours="06:00-22:00", per_kwh=4.0),
        Price(hours="22:00-06:00", per_kwh=2.0),
        Price(hours="sat,sun 00:00-24:00", per_kwh=1.0),
    ),
)


def test_each_price_has_a_plan_with_its_end_and_its_cost() -> None:
    everything, nights, weekends = plan_hours(NIGHT_AND_DAY, days=1.0, kwh=10.0, now=MONDAY)
    assert everything.finishes == MONDAY + timedelta(days=1)
    assert everything.cost == pytest.approx(10 * (16 * 4 + 8 * 2) / 24)
    assert everything.schedule == ()
    # Monday until 6, Monday's, Tuesday's nights, and two hours of Wednesday's.
    assert nights.finishes == MONDAY + timedelta(days=3)
    assert nights.cost == pytest.approx(20.0)
    assert weekends.finishes == MONDAY + timedelta(days=6)
    assert (weekends.cost, weekends.mean_per_kwh) == (pytest.approx(10.0), pytest.approx(1.0))
    assert weekends.schedule == ("sat,sun 00:00-24:00",)
    assert [plan.hours_per_week for plan in (everything, nights, weekends)] == [168, 88, 48]
    assert plan_hours(NIGHT_AND_DAY, 1.0, None, MONDAY)[0].cost is None


def test_a_run_of_many_weeks_ends_in_an_open_minute_and_costs_what_its_hours_cost() -> None:
    [_, nights, weekends] = plan_hours(NIGHT_AND_DAY, days=20.0, kwh=480.0, now=MONDAY)
    assert weekends.finishes == MONDAY + timedelta(weeks=10)
    assert weekends.cost == pytest.approx(480.0)
    weeks, left = divmod(20 * 24, 88)
    # Of the last week Monday until 6, three nights, and the rest after Thursday 22:00.
    assert (weeks, left) == (5, 40)
    assert nights.finishes == MONDAY + timedelta(weeks=5, days=4, hours=24)
    assert nights.mean_per_kwh == pytest.approx((5 * (48 + 2 * 40) + 2 * 40) / 480)


prices = st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=28, max_size=28)


@settings(max_examples=8, deadline=None)
@given(prices, st.integers(0, MINUTES_OF_WEEK - 1))
def test_the_schedule_of_a_plan_opens_the_minutes_that_cost_no_more(each: list[float], minute: int) -> None:
    # Four prices a day, each for six hours.
    names = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
    spans = ("00:00-06:00", "06:00-12:00", "12:00-18:00", "18:00-24:00")
    hours = [f"{day} {span}" for day in names for span in spans]
    tariff = Tariff(price=tuple(Price(hours=h, per_kwh=p) for h, p in zip(hours, each, strict=True)))
    minutes = tariff.minutes()
    assert minutes[::360] == each
    now = MONDAY + timedelta(minutes=minute)
    for plan in plan_hours(tariff, 0.25, 1.0, now):
        windows = GuardConfig(schedule=plan.schedule).windows
        for place in range(0, MINUTES_OF_WEEK, 179):
            may = minutes[place] <= plan.most_per_kwh
            assert may == (not windows or is_open(windows, MONDAY + timedelta(minutes=place)))
        assert plan.cost == pytest.approx(plan.mean_per_kwh)
        last = plan.finishes - timedelta(minutes=1)
        assert not windows or is_open(windows, last), "a run does not end in an hour in which it waits"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("price = 3", 'price is 3; it takes a list, such as ["a", "b"].'),
        ("", "price is missing."),
        (
            '[[price]]\nhours = "06:00-22:00"\nper_kwh = 2',
            "no price names mon 00:00; every hour of the week",
        ),
        ('[[price]]\nhours = "mon 00:00-24:00"\nper_kwh = 2', "no price names tue 00:00; every hour"),
        ('[[price]]\nhours = "night"\nper_kwh = 2', "price 0 hours is 'night'; 'night' names no hours"),
        ('[[price]]\nhours = "00:00-24:00"\nper_kwh = -2', "price 0 per_kwh is -2; it takes 0 or more."),
        ('[[price]]\nhours = "00:00-24:00"\nper_kwh = nan', "price 0 per_kwh is nan"),
        ('[[price]]\nhours = "00:00-24:00"\nper_kw = 2', "there is no key per_kw. Did you mean per_kwh?"),
        ("[[price", "is not TOML:"),
        (None, "There is no tariff file"),
    ],
)
def test_a_wrong_tariff_names_the_file_the_key_and_the_form(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "tariff.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read_tariff(path)
    assert says in str(raised.value)
    assert str(path) in str(raised.value)
    assert str(raised.value).endswith("per_kwh = 1.9.")


def test_fit_prints_the_hours_and_a_line_that_a_run_file_takes(tmp_path: Path) -> None:
    path = tmp_path / "tariff.toml"
    tables = "".join(
        f'[[price]]\nhours = "{price.hours}"\nper_kwh = {price.per_kwh}\n' for price in NIGHT_AND_DAY.price
    )
    path.write_text(f'currency = "TL"\n{tables}', encoding="utf-8")
    # A run of days: one of minutes may begin and end in the cheapest hours, as the hour of the test is.
    card = ("fit", "--gpu", "rtx5070", "--model", "tr-350m", "--tariff", path)
    shown = typed(*card)
    assert shown.code == 0, shown.err
    assert "up to 2 TL/kWh" in shown.out
    assert "finished" in shown.out
    lines = [line for line in shown.out.splitlines() if line.startswith("  schedule = ")]
    assert [len(GuardConfig(schedule=json.loads(line.split(" = ")[1])).windows) for line in lines] == [4, 1]
    told = json.loads(typed(*card, "--json").out)["hours"]
    assert [plan["hours_per_week"] for plan in told] == [168, 88, 48]
    assert told[0]["cost"] > told[1]["cost"] > told[2]["cost"] > 0
    refused = typed("fit", "--gpu", "rtx5070", "--tariff", path)
    assert refused.code == 1
    assert "What a run costs (--tariff) is said of one run only." in refused.err
