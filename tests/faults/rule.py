"""What every fault is held against: after it and one restart a run ends as one that nothing ever broke."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.config.plan import choose_plan
from lowvram.config.run import RunConfig
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.storage.disk import DISK, Disk
from lowvram.train.events import Event
from lowvram.train.log import JsonlLog
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.start import keep_plan, lock_run
from lowvram.train.trainer import Trainer
from tests.tiny import tiny_run, unequal

EVERY_STEP = 1e-9  # minutes between saves
STEPS = 8
# What a run directory may hold when its run has ended; drafts, reserved space and the owner's note are gone.
_LASTING = re.compile(r"step-[0-9]{8}|lock|log\.jsonl|plan\.json|receipt\.json|status\.json|energy\.json")
# What a row of the log says of the run itself, and not of the hour or of the machine.
_OF_THE_RUN = {
    "StepDone": ("loss", "gradient_norm", "learning_rate", "tokens", "skipped", "is_spike"),
    "Evaluated": ("loss", "bits_per_byte"),
    "Sampled": ("prompt", "text"),
}


def faulty_run(
    home: Path, run: str, steps: int = STEPS, kind: str = "mla-moe", options: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    """Return a run in which a fault finds everything that can break.

    It saves after every step, validates and samples after every third, and its text is so short that an epoch ends in
    every second step.  options: other values of its [run].
    """
    recipe = {"tokens": steps * 256, "dropout": 0.1, "optimizer": {"name": "muon", "bits": 8}} | train
    what = tiny_run(home, kind, run, **recipe)
    short = tiny_run(home).data.train[0].model_copy(update={"path": home / "shards/valid"})
    told = {"save_every_minutes": EVERY_STEP, "validate_every": 3, "sample_every": 3} | (options or {})
    update = {
        "data": what.data.model_copy(update={"train": (short,)}),
        "run": what.run.model_copy(update=told),
    }
    return what.model_copy(update=update)


def make_trainer(what: RunConfig, disk: Disk = DISK, micro_batch: int = 4, allow: tuple[str, ...] = ()) -> Trainer:
    """Return the trainer of a run on the CPU."""
    plan, _ = choose_plan(what.train, micro_batch)
    return prepare(RunSettings(what, plan, torch.device("cpu"), allow=allow), disk=disk)


def train(what: RunConfig, disk: Disk = DISK, micro_batch: int = 4, allow: tuple[str, ...] = ()) -> list[Event]:
    """Train as the command does: under the directory's lock, with the log and the plan written; returns the events."""
    events: list[Event] = []
    torch.set_num_threads(1)
    with lock_run(what.run.dir) as lock:
        trainer = make_trainer(what, disk, micro_batch, allow)
        trainer.lock = lock
        log = JsonlLog(what.run.dir / "log.jsonl")
        try:
            for event in trainer.run():
                if not events:
                    keep_plan(what.run.dir, trainer.plan, disk)
                log.write(event)
                events.append(event)
        finally:
            log.close()
    return events


def break_at(what: RunConfig, kind: type, step: int, deed: Callable[[], object], **how: Any) -> list[Event]:
    """Train, and do something to the run when its log has the event of that kind and step.  how: as for `train`."""
    real = JsonlLog.write

    def write(self: JsonlLog, event: Event) -> None:
        real(self, event)
        if isinstance(event, kind) and event.step == step:
            deed()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonlLog, "write", write)
        return train(what, **how)


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of a run's log of one kind, torn ones left out, in order."""
    found = []
    for line in (run / "log.jsonl").read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # what a kill left of a row
            continue
        if row["event"] == kind:
            found.append(row)
    return found


def told_by(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return what a run's log says at last of each step: its loss, its validation, its sample."""
    return {
        (kind, row["step"]): {name: row[name] for name in names if name in row}
        for kind, names in _OF_THE_RUN.items()
        for row in rows_of(run, kind)
    }


def expect_same_weights(whole: Path, broken: Path) -> None:
    """Fail unless the newest checkpoints of two run directories are equal to the bit, and none is damaged."""
    (truth, _), (found, passed_over) = find_checkpoint(whole), find_checkpoint(broken)
    assert passed_over == [], "the damaged checkpoint is still there"
    assert found.step == truth.step
    assert found.numbers() == truth.numbers()
    assert unequal(truth.weights(), found.weights()) == []
    assert unequal(truth.state(), found.state()) == []
    hashes, expected = (
        {name: each.manifest["files"][name]["sha256"] for name in ("weights.safetensors", "state.safetensors")}
        for each in (found, truth)
    )
    assert hashes == expected, "equal tensors in other files"


def expect_same_end(whole: Path, broken: Path) -> None:
    """Fail unless a run that was broken and restarted ended as the unbroken one did, to the bit.

    whole, broken: their directories.  Weights, optimizer states, counters and every step's numbers are equal, each step
    counts once, and nothing of an interrupted save, deletion or process is left.
    """
    expect_same_weights(whole, broken)
    assert told_by(broken) == told_by(whole)
    steps = [step for kind, step in told_by(broken) if kind == "StepDone"]
    assert sorted(steps) == list(range(1, max(steps) + 1)), "a step is missing"
    left = sorted(path.name for path in broken.iterdir() if not _LASTING.fullmatch(path.name))
    assert left == [], "left over"
    kept = [path.name for path in broken.glob("step-*")]
    assert len(kept) <= 3, "more than run.keep and the best one"


def expect_newest_used(events: list[Event], step: int) -> None:
    """Fail unless a restart went on from the checkpoint of this step."""
    assert events[0].step == step
    assert (events[0].resumed_from is not None) == (step > 0)
