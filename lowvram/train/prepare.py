"""From a checked run file to a Trainer: opens tokenizer and shards, builds the model; starts nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.data.loader import Loader
from lowvram.data.shards import ShardSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import MachineError, PromptError
from lowvram.storage.checkpoint import Store
from lowvram.storage.disk import DISK, Disk
from lowvram.train.oom import is_out_of_memory
from lowvram.train.state import TrainState, build_state
from lowvram.train.trainer import Trainer


def prepare(what: RunConfig, plan: Plan, device: torch.device, disk: Disk = DISK) -> Trainer:
    """Return a Trainer at step 0; `run()` then resumes, or takes `start_from`'s weights.

    Raises DataError for shards that are damaged or of another tokenizer, PromptError for a sample prompt too long.
    """
    tokenizer = load_tokenizer(what.data.tokenizer)
    _check_prompts(what, tokenizer)
    corpora = [(_open(c.path, tokenizer), c.weight) for c in what.data.train]
    valid = _open(what.data.valid, tokenizer) if what.data.valid else None
    run = what.run
    return Trainer(
        what=what,
        plan=plan,
        state=_build(what, plan, device),
        loader=Loader(corpora, what.train.seq_len, what.train.seed),
        tokenizer=tokenizer,
        store=Store(run.dir, run.keep, run.milestone_steps, run.disk_budget, disk),
        hashes={"tokenizer": tokenizer.hash, "training data": _join([shards.hash for shards, _ in corpora])},
        valid=valid,
    )


def _build(what: RunConfig, plan: Plan, device: torch.device) -> TrainState:
    try:
        return build_state(what.model, what.train, plan, device, what.train.seed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            "Memory ran out while the model and its optimizer were made.",
            f"torch says: {str(error).splitlines()[0]}",
            "Close what else uses the memory, or ask lowvram fit with the same run file what would make it fit.",
        ) from error


def _open(directory: Path, tokenizer: Tokenizer) -> ShardSet:
    """Open shards and compare them with their SHA-256: a flipped bit costs seconds now, and weeks later."""
    shards = ShardSet.open(directory, tokenizer.hash, tokenizer.size)
    shards.verify()
    return shards


def _check_prompts(what: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse now what would end the run at its first sample."""
    for prompt in what.run.prompts:
        count = 1 + len(tokenizer.encode(prompt))
        if count >= what.train.seq_len:
            raise PromptError(
                f"A prompt in run.prompts has {count} tokens.",
                f"train.seq_len is {what.train.seq_len}, and the answer needs room in it too.",
                "Shorten it, or write prompts = [].",
            )


def _join(hashes: list[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
