"""The log read back: which row of a step counts, and with which plan it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowvram.config.plan import Plan
from lowvram.train.logged_steps import LoggedStep, plan_of_step, read_logged_steps


def row(event: str, step: int, **values: Any) -> dict[str, Any]:
    return {"event": event, "step": step, **values}


def write(path: Path, *rows: object) -> Path:
    text = "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_rows_between_two_checkpoints_are_read_as_they_were_at_the_later_save(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.jsonl",
        *(row("StepDone", step, loss=step / 10, tokens_per_second=50.0) for step in (1, 2, 3, 4, 5)),
        row("Saved", 2),
        '{"event": "StepDone", "step": 4, "lo',
        row("StepDone", 4, loss=0.44, skipped=1),
        row("StepDone", 6, loss=0.6),
        row("Saved", 5),  # of a save in the background, after the next step
        row("StepDone", 4, loss=9.0),
    )
    steps = read_logged_steps(log, 2, 5)
    assert {step: each.values for step, each in steps.items()} == {
        3: {"loss": 0.3},
        4: {"loss": 0.44, "skipped": 1},
        5: {"loss": 0.5},
    }
    assert [each.tokens_per_second for each in steps.values()] == [50.0, 0.0, 50.0]
    assert read_logged_steps(log, 2, 6)[4].values == {"loss": 9.0}, "what was not saved counts as it is last"
    assert read_logged_steps(tmp_path / "no log", 0, 5) == {}


def test_a_halving_counts_from_its_step_on_even_if_the_save_before_it_is_told_later(tmp_path: Path) -> None:
    log = write(
        tmp_path / "log.jsonl",
        row("Halved", 1, micro_batch=16),  # the earlier checkpoint holds this one
        row("StepDone", 2),
        row("StepDone", 3),
        row("Halved", 3, micro_batch=4),
        row("Saved", 2),
        row("StepDone", 4),
        row("Halved", 4, micro_batch="2"),
        row("StepDone", 5),
    )
    steps = read_logged_steps(log, 2, 5)
    assert {step: each.halved_to for step, each in steps.items()} == {3: None, 4: 4, 5: 4}


def test_a_step_has_the_plan_of_the_checkpoint_before_until_a_halving(tmp_path: Path) -> None:
    before = Plan(micro_batch=8, accumulate=2, loss_chunk=64, keep_casts=True)
    after = Plan(micro_batch=2, accumulate=8)

    def plan(halved_to: int | None, was_halved: bool = True) -> Plan:
        return plan_of_step(LoggedStep({}, 0.0, halved_to), before, after, was_halved)

    assert plan(None) == before
    assert plan(4) == Plan(micro_batch=4, accumulate=4), "what only makes it faster goes with the first halving"
    assert plan(2) == after
    assert plan(None, was_halved=False) == after, "a resume at the checkpoint before may have changed it"
    assert plan_of_step(None, before, after, True) == before
