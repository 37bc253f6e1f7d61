"""Compares the checkpoints that a run will keep with its disk budget and its disk, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowvram.errors import ConfigError
from lowvram.storage.disk import free_bytes
from lowvram.units import show_bytes

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig


def check_disk_room(config: RunConfig, checkpoint_bytes: int) -> str | None:
    """Return a sentence where the drive has less room than the run's checkpoints will take; None where it has enough.

    Raises ConfigError where run.disk_budget is less than one checkpoint.
    """
    run = config.run
    if run.disk_budget is not None and run.disk_budget < checkpoint_bytes:
        size, budget = show_bytes(checkpoint_bytes), show_bytes(run.disk_budget)
        raise ConfigError(
            f"run.disk_budget is {budget}, and one checkpoint of this run has {size}.",
            "The newest checkpoint is always kept, so the budget could not be.",
            f"Give it {show_bytes(2 * checkpoint_bytes)} or more, or leave it out.",
        )
    needed = run.disk_bytes(checkpoint_bytes, config.train.steps)
    taken = sum(path.stat().st_size for path in run.dir.glob("*/*") if path.is_file())
    free = free_bytes(run.dir)
    if taken + free >= needed:
        return None
    return (
        f"The checkpoints of this run will take up to {show_bytes(needed)}, and {run.dir} has {show_bytes(free)} free: "
        "where the disk is full, training waits until there is room. run.keep and run.disk_budget decide what is kept."
    )
