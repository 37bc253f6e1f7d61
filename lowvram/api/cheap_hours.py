"""What one run costs by the hours in which it trains; prints nothing."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig
    from lowvram.config.tariff import Tariff
    from lowvram.fit.report import FitReport
    from lowvram.fit.tariff import HoursPlan


def plan_hours_of(report: FitReport, run: RunConfig | None, tariff: Tariff | None) -> tuple[HoursPlan, ...]:
    """Return a plan for each price of a tariff; none without one, or where it is not known how long the run takes.

    run: its file, whose power_watts are believed before those of the card; None for a preset.
    """
    from lowvram.fit.tariff import plan_hours

    if tariff is None or report.days is None:
        return ()
    watts = run.run.guard.power_watts if run is not None else None
    kwh = report.kwh if watts is None else watts * report.days * 24 / 1000
    return tuple(plan_hours(tariff, report.days, kwh, datetime.now()))
