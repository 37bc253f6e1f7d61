"""Reads back from a run's log the steps that led to one of its checkpoints; knows no tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowvram.config.plan import Plan
from lowvram.storage.json_files import JsonError, parse_object
from lowvram.train.events import StepDone
from lowvram.train.oom import halve

# The values of a step that do not depend on time, causes before their effects.
COMPARED = ("learning_rate", "loss", "gradient_norm", "skipped")


@dataclass(frozen=True)
class LoggedStep:
    """A step's row in the log.  values: those of COMPARED that its version wrote, None where a number was not finite.

    tokens_per_second: the run's speed then, 0 where the row has none.  halved_to: the micro-batch to which the run had
    halved its own after the checkpoint before; None where it had not.
    """

    values: dict[str, Any]
    tokens_per_second: float
    halved_to: int | None


@dataclass(frozen=True)
class StepDifference:
    """The first step whose log differs from what was computed again, and the value that does."""

    step: int
    name: str
    logged: float | None
    repeated: float | None

    def describe(self) -> str:
        """Return a sentence about it."""
        name = self.name.replace("_", " ")
        differs = f"Step {self.step} differs: its {name} was {self.logged!r}, and is {self.repeated!r} now."
        if self.name == "learning_rate":
            return f"{differs} The schedule follows from train.tokens, which may have been another number then."
        return differs


def read_logged_steps(log: Path, first: int, last: int) -> dict[int, LoggedStep]:
    """Return the steps after step `first` and up to step `last`, as they were when `last` was saved.

    A step that was repeated after a resume counts as it was the last time.  Empty where there is no log.
    """
    if not log.is_file():
        return {}
    steps: dict[int, LoggedStep] = {}
    halved_to: int | None = None
    saved: dict[int, LoggedStep] | None = None
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            event, row = _read_row(line)
            step, micro_batch = row.get("step"), row.get("micro_batch")
            if event == "StepDone" and isinstance(step, int) and first < step <= last:
                speed = row.get("tokens_per_second")
                values = {name: row[name] for name in COMPARED if name in row}
                steps[step] = LoggedStep(values, float(speed) if isinstance(speed, int | float) else 0.0, halved_to)
            elif event == "Halved" and isinstance(step, int) and step >= first and isinstance(micro_batch, int):
                halved_to = micro_batch
            elif event == "Saved" and step == last:
                saved = dict(steps)
    return steps if saved is None else saved


def _read_row(line: str) -> tuple[str, dict[str, Any]]:
    if not any(f'"{event}"' in line for event in ("StepDone", "Halved", "Saved")):
        return "", {}
    try:
        row = parse_object(line)
    except JsonError:
        return "", {}  # a power cut tore this row; the trainer continued below it
    return str(row.get("event")), row


def plan_of_step(logged: LoggedStep | None, plan_before: Plan, plan_after: Plan, was_halved: bool) -> Plan:
    """Return the plan with which a step was made.

    plan_before, plan_after: those of the checkpoints around it.  was_halved: the run halved its micro-batch between the
    two; else a resume at the first one may have changed the plan, which then holds for all steps.
    """
    if not was_halved:
        return plan_after
    if logged is None or logged.halved_to is None:
        return plan_before
    plan: Plan | None = plan_before
    while plan is not None and plan.micro_batch > logged.halved_to:
        plan = halve(plan)
    return plan_after if plan is None or logged.halved_to == plan_after.micro_batch else plan


def compare_step(step: StepDone, logged: LoggedStep) -> StepDifference | None:
    """Return the first value in which a repeated step differs from its row; None where all are equal."""
    for name in logged.values:
        value = getattr(step, name)
        repeated = None if isinstance(value, float) and not math.isfinite(value) else value
        if repeated != logged.values[name]:
            return StepDifference(step.step, name, logged.values[name], repeated)
    return None
