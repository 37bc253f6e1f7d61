"""Runs of six steps with their logs, to be made again, and ways to change them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lowvram.config.run import RunConfig
from lowvram.train.log import JsonlLog
from tests.resign import sign_anew
from tests.tiny import tiny_run, trainer_of


def run_of(home: Path, name: str, **train: Any) -> RunConfig:
    """Return a run of six steps that keeps the checkpoint of each."""
    what = tiny_run(home, run=name, **train)
    options = {"save_every_minutes": 1e-9, "keep": 9, "prompts": (), "validate_every": 1000}
    return what.model_copy(update={"run": what.run.model_copy(update=options)})


def train(what: RunConfig, kept: tuple[int, ...] = (3, 6)) -> Path:
    """Train a run with its log; of its checkpoints only some are left."""
    log = JsonlLog(what.run.dir / "log.jsonl")
    for event in trainer_of(what).run():
        log.write(event)
    log.close()
    keep_only(what.run.dir, *kept)
    return what.run.dir


def keep_only(run: Path, *steps: int) -> None:
    for path in run.glob("step-*"):
        if int(path.name[5:]) not in steps:
            shutil.rmtree(path)


def contents(run: Path) -> dict[str, tuple[str, int]]:
    """Every file of a directory, with its hash and when it was changed."""
    return {
        path.relative_to(run).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in run.rglob("*")
        if path.is_file()
    }


def rewrite_log(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change rows of the log; those that become None are left out."""
    path = run / "log.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not None), encoding="utf-8")


def flip_bit(checkpoint: Path, file: str, name: str, place: int = 0) -> None:
    """Flip the lowest bit of one number of a tensor, and sign the checkpoint anew."""
    tensors = {each: tensor.clone() for each, tensor in load_file(checkpoint / file).items()}
    tensors[name].view(-1).view(torch.int32)[place] ^= 1
    save_file(tensors, checkpoint / file)
    sign_anew(checkpoint)


def copy_run(home: Path, name: str = "plain") -> Path:
    """Return a copy of a run of a home; the copy before it is gone."""
    copy = home / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home / name, copy)
    return copy
