"""Says what a path is where a run was expected; opens nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowvram.errors import CheckpointError

# What `data mix` and `data pack` write into the folders that are sometimes named in place of a run.
_PACKED = ("mix.json", "shards.json", "train/shards.json")


def explain_no_directory(path: Path) -> CheckpointError:
    """Return the error for a path that is not a directory: it is missing, a run file, a GGUF file or another file."""
    fix = "Name a run directory or one of its step-… folders."
    if not path.is_file():
        return CheckpointError(f"There is no directory {path}.", fix=fix)
    if path.suffix == ".toml":
        return CheckpointError(f"{path} is a run file.", "Its checkpoints are in its run.dir.", fix)
    if path.suffix == ".gguf":
        return CheckpointError(f"{path} is a GGUF file.", "llama.cpp reads it; lowvram does not.", fix)
    return CheckpointError(f"{path} is a file.", fix=fix)


def explain_no_checkpoint(path: Path, runs: Sequence[Path]) -> CheckpointError:
    """Return the error for a directory without checkpoints.  runs: the folders in it that have some."""
    what = f"There is no checkpoint in {path}."
    if any((path / name).exists() for name in _PACKED):
        return CheckpointError(what, "It holds packed text, and no run.", "Name the run; the text goes with `data`.")
    if not runs:
        return CheckpointError(what, "The run has saved nothing yet.", "Train it first.")
    names = ", ".join(map(str, runs[:3])) + (", …" if len(runs) > 3 else "")
    return CheckpointError(what, "Its folders are runs.", f"Name one: {names}.")
