"""Shows what a run costs in the hours of a tariff, and the line for the run file; decides nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lowvram.cli.console import lay_out, literal, result, tabulate

if TYPE_CHECKING:
    from lowvram.api.fit_result import FitResult


def show_tariff(found: FitResult) -> None:
    """Print a row for each price of the tariff, and the schedule of the cheapest hours."""
    tariff, plans, report = found.tariff, found.hours, found.models[0]
    if tariff is None:
        return
    result()
    if not plans or report.days is None:
        result("Which hours are the cheapest is not said: how long the run takes is not known.")
        return
    money = f" {tariff.currency}".rstrip()
    energy = "unknown energy" if plans[0].cost is None else f"{plans[0].cost / plans[0].mean_per_kwh:,.1f} kWh"
    result(f"Tariff, for {report.days * 24:,.0f} hours of training from now on, and {energy}:")
    everything = plans[0].hours_per_week
    rows = [
        (
            "all hours" if plan.hours_per_week == everything else f"up to {plan.most_per_kwh:g}{money}/kWh",
            f"{plan.hours_per_week:g}",
            f"{plan.finishes:%Y-%m-%d %H:%M}",
            f"{plan.mean_per_kwh:.3g}{money}",
            "–" if plan.cost is None else f"{plan.cost:,.2f}{money}",
        )
        for plan in plans
    ]
    lay_out(tabulate(("hours", "a week", "finished", "a kWh", "cost"), rows))
    if len(plans) == 1:
        result("All hours cost the same.")
        return
    for plan in plans[1:]:
        result(f"To train only up to {plan.most_per_kwh:g}{money}/kWh, write below [run.guard]:")
        literal(f"  schedule = {json.dumps(list(plan.schedule))}")
