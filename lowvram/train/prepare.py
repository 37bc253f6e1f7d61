"""From a checked run file to a Trainer: opens tokenizer and shards, builds the model; starts nothing."""

from __future__ import annotations

import hashlib

import torch

from lowvram.checkpoint import Store, find_checkpoint
from lowvram.config import RunConfig
from lowvram.data.loader import Loader
from lowvram.data.shards import ShardSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.files import DISK, Disk
from lowvram.model.transformer import Transformer
from lowvram.plan import Plan
from lowvram.train.optim import build_optimizer
from lowvram.train.state import TrainState, load_weights
from lowvram.train.trainer import Trainer


def prepare(what: RunConfig, plan: Plan, device: torch.device, disk: Disk = DISK) -> Trainer:
    """Return a Trainer at step 0, or at `start_from`'s weights; `run()` then resumes if there is something to resume.

    Raises DataError for shards that are truncated or of another tokenizer, CheckpointError for start_from.
    """
    tokenizer = Tokenizer.load(what.data.tokenizer)
    corpora = [(ShardSet.open(c.path, tokenizer.hash), c.weight) for c in what.data.train]
    valid = ShardSet.open(what.data.valid, tokenizer.hash) if what.data.valid else None
    model = Transformer(what.model, what.train.seed, device)
    if what.train.start_from is not None:
        load_weights(model, find_checkpoint(what.train.start_from)[0])
    run = what.run
    return Trainer(
        what=what,
        plan=plan,
        state=TrainState(model, build_optimizer(model, what.train.optimizer)),
        loader=Loader(corpora, what.train.seq_len, what.train.seed),
        tokenizer=tokenizer,
        store=Store(run.dir, run.keep, run.milestone_steps, run.disk_budget, disk),
        hashes={"tokenizer": tokenizer.hash, "training data": _join([shards.hash for shards, _ in corpora])},
        valid=valid,
    )


def _join(hashes: list[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
