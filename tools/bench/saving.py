"""Measures what a checkpoint costs training: beside it, from a copy of the state, and between two steps.

python tools/bench/saving.py --tokenizer tok --shards shards/train [--preset tr-60m] [--rounds 5] [--steps 8]

Every round trains the same number of steps three times: without a save, with one beside training, and with one between
two steps; the save begins after the first of them, and the last of them waits for its end.  Printed are the seconds by
which a save prolongs its steps, and its processor time: the median and the range of all rounds, and their share of ten
minutes.  On a machine with other work only the processor time and the seconds that training stood still are of use.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # read when torch is imported; as `lowvram train` sets it

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lowvram.config.plan import choose_plan
from lowvram.config.run import RunConfig
from lowvram.config.run_file import load_preset
from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.train.events import Event, Saved, StepDone
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from tools.bench.reading_model import describe_machine

WITHOUT, BESIDE, BETWEEN = "no save", "beside training", "between two steps"
INTERVAL_S = 600.0


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--preset", default="tr-60m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    print(describe_machine(), f"{torch.get_num_threads()} threads", sep=", ")
    with tempfile.TemporaryDirectory() as folder:
        found, size_bytes = measure(asked, Path(folder))
    print(f"{asked.preset}: a checkpoint of {size_bytes / 2**20:.0f} MiB, {asked.rounds} rounds of {asked.steps} steps")
    base = statistics.median(spent.clock_s for spent in found[WITHOUT])
    print(f"  {WITHOUT:18} {base / asked.steps:8.3f} s a step")
    for kind in (BESIDE, BETWEEN):
        pairs = list(zip(found[kind], found[WITHOUT], strict=True))
        show(kind, "s longer", [one.clock_s - other.clock_s for one, other in pairs])
        show("", "s held", [one.held_s for one in found[kind]])
        show("", "CPU s", [one.cpu_s - other.cpu_s for one, other in pairs])


class Spent(NamedTuple):
    """What the steps of a round took.  held_s: how long training stood still for the save, as the event tells it."""

    clock_s: float
    cpu_s: float
    held_s: float


def show(kind: str, unit: str, found: list[float]) -> None:
    """Print the median and the range of what a save takes, and its share of the usual interval."""
    middle, least, most = statistics.median(found), min(found), max(found)
    share = f"{middle / INTERVAL_S:.2%} at one in ten minutes"
    print(f"  {kind:18} {middle:8.3f} {unit} ({least:.3f} to {most:.3f}), {share}")


def measure(asked: argparse.Namespace, folder: Path) -> tuple[dict[str, list[Spent]], int]:
    """Return the seconds of each round by its kind, and a checkpoint's bytes."""
    tokenizer = load_tokenizer(asked.tokenizer)
    steps = (3 * asked.rounds + 2) * asked.steps
    model = load_preset(asked.preset)[0].model_copy(update={"vocabulary": tokenizer.size})
    config = RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {"train": asked.shards, "tokenizer": asked.tokenizer},
            "train": {"tokens": steps * 512, "seq_len": 128, "batch_tokens": 512, "optimizer": {"name": "muon"}},
            "run": {"dir": folder / "run", "prompts": [], "save_every_minutes": 1e9},
        }
    )
    trainer = prepare(RunSettings(config, choose_plan(config.train, None)[0], torch.device("cpu")))
    events, size_bytes = trainer.run(), 0
    train_steps(events, asked.steps)  # nothing is measured before the memory has been touched
    found: dict[str, list[Spent]] = {WITHOUT: [], BESIDE: [], BETWEEN: []}
    for _ in range(asked.rounds):
        for kind, times in found.items():
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            told = train_steps(events, 1)
            if kind != WITHOUT:
                told += list(trainer._begin_save() if kind == BESIDE else trainer._save())
            told += train_steps(events, asked.steps - 1) + list(trainer._end_save())
            spent_s, spent_cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
            saves = [event for event in told if isinstance(event, Saved)]
            times.append(Spent(spent_s, spent_cpu_s, sum(event.held_s for event in saves)))
            saved = [event.directory for event in saves]
            assert len(saved) == (kind != WITHOUT), "a save of every kind ends in its round"
            size_bytes = sum(path.stat().st_size for folder in saved for path in folder.iterdir()) or size_bytes
    trainer.stop()
    return found, size_bytes


def train_steps(events: Iterator[Event], count: int) -> list[Event]:
    """Train so many steps, and return what was told meanwhile."""
    told: list[Event] = []
    while count:
        told.append(next(events))
        count -= isinstance(told[-1], StepDone)
    return told


if __name__ == "__main__":
    main()
