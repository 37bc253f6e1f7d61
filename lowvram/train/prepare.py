"""From the settings of a run to a Trainer: opens tokenizer and shards, builds the model; starts nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowvram.config.run import RunConfig
from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.data.loader import Loader
from lowvram.data.shards import ShardSet
from lowvram.data.source_set import SourceSet, list_sets, open_sources
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import MachineError, PromptError
from lowvram.storage.checkpoint import Store
from lowvram.storage.disk import DISK, Disk
from lowvram.train.light_subset import read_light_subset
from lowvram.train.oom import is_out_of_memory
from lowvram.train.replay import Replay
from lowvram.train.settings import RunSettings
from lowvram.train.start import RunLock
from lowvram.train.state import TrainState, build_state
from lowvram.train.trainer import Trainer


def prepare(settings: RunSettings, lock: RunLock | None = None, disk: Disk = DISK) -> Trainer:
    """Return a Trainer at step 0; `run()` then resumes, or takes `start_from`'s weights.

    lock: on the run's directory, which the trainer checks before each save.
    Raises DataError for shards that are damaged or of another tokenizer, and where run.pairs, run.suffixes or
    run.choices is of another kind;
    PromptError for a sample prompt too long.
    """
    config, run = settings.config, settings.config.run
    tokenizer = load_tokenizer(config.data.tokenizer)
    _check_prompts(config, tokenizer)
    read_light_subset(run)  # a fault in a file is told now, and not at the first validation
    parts = _gather(settings, tokenizer, disk)
    valid = _open_held_out(config.data.held_out, tokenizer)
    return Trainer(**parts, valid=valid, lock=lock, allow=settings.allow)


def prepare_replay(settings: RunSettings) -> Replay:
    """Return what repeats steps of a run: a trainer without validation, samples and lock, which saves nothing."""
    return Replay(**_gather(settings, load_tokenizer(settings.config.data.tokenizer), DISK))


def _gather(settings: RunSettings, tokenizer: Tokenizer, disk: Disk) -> dict[str, Any]:
    """Return the arguments of a Trainer that decide what its steps compute and where it saves."""
    config, run = settings.config, settings.config.run
    corpora = [(_open(c.path, tokenizer), c.weight) for c in config.data.train]
    return {
        "config": config,
        "plan": settings.plan,
        "state": _build(settings),
        "loader": Loader(corpora, config.train.seq_len, config.train.seed),
        "tokenizer": tokenizer,
        "store": Store(run.dir, run.keep, run.milestone_steps, run.disk_budget, disk),
        "hashes": {"tokenizer": tokenizer.hash, "training data": _join([shards.hash for shards, _ in corpora])},
    }


def _build(settings: RunSettings) -> TrainState:
    config = settings.config
    try:
        return build_state(config.model, config.train, settings.plan, settings.device, config.train.seed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            "Memory ran out while the model and its optimizer were made.",
            f"torch says: {str(error).splitlines()[0]}",
            "Close what else uses the memory, or ask lowvram fit with the same run file what would make it fit.",
        ) from error


def _open(directory: Path, tokenizer: Tokenizer) -> ShardSet:
    """Open shards and verify their SHA-256: finding a flipped bit takes seconds now and saves weeks later."""
    shards = ShardSet.open(directory, tokenizer.hash, tokenizer.size)
    shards.verify()
    return shards


def _open_held_out(named: Sequence[tuple[str, Path]], tokenizer: Tokenizer) -> ShardSet | SourceSet | None:
    found = open_sources(named, tokenizer.hash, tokenizer.size) if named else None
    for shards in list_sets(found) if found is not None else ():
        shards.verify()
    return found


def _check_prompts(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Refuse now what would end the run at its first sample."""
    for prompt in config.run.prompts:
        count = 1 + len(tokenizer.encode(prompt))
        if count >= config.train.seq_len:
            raise PromptError(
                f"A prompt in run.prompts has {count} tokens.",
                f"train.seq_len is {config.train.seq_len}, and the answer needs room in it too.",
                "Shorten it, or write prompts = [].",
            )


def _join(hashes: list[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()
