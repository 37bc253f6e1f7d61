"""Errors that a user can mend: each says what happened, why, and what to do.  Knows nothing else."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lowvram_kernels.errors import ShapeError

__all__ = [
    "BusyError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceFaultError",
    "DiskFullError",
    "ExportError",
    "LowvramError",
    "MachineError",
    "MemoryRanOutError",
    "NumbersError",
    "PromptError",
    "PromptTooLongError",
    "ShapeError",
    "TokenizerError",
    "TrainingError",
    "name_nearest",
]


class LowvramError(Exception):
    """An error that the user can mend; the command line prints it as one paragraph and ends with its exit code."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(" ".join(part.strip() for part in (what, why, fix) if part))


class ConfigError(LowvramError):
    """A run file, preset or --set that cannot be meant."""


class DataError(LowvramError):
    """Text or shards that cannot be read as what they claim to be."""


class TokenizerError(LowvramError):
    """A tokenizer that cannot be trained, loaded, or used on this text."""


class CheckpointError(LowvramError):
    """A checkpoint that is missing, incomplete or altered."""


class BusyError(LowvramError):
    """A directory that another process is using."""


class DiskFullError(LowvramError):
    """No space left where something had to be written."""


class MachineError(LowvramError):
    """A device, driver or package that cannot do what was asked."""


class PromptError(LowvramError):
    """A prompt that the model cannot take."""


class ExportError(LowvramError):
    """A model that another program's form cannot hold, or such a form that cannot be read."""


class PromptTooLongError(PromptError):
    """A prompt that does not fit the context; its newest part would."""


class NumbersError(LowvramError):
    """Numbers of a model that are not finite where something must be read from them."""


class TrainingError(LowvramError):
    """Training that cannot go on."""


class DeviceFaultError(TrainingError):
    """A device or its driver that failed during training: the same command goes on from the last checkpoint."""

    exit_code = 75


class MemoryRanOutError(TrainingError):
    """A step that cannot be cut further and does not fit; another recipe may."""


def name_nearest(word: str, known: Iterable[str]) -> str:
    """Return a sentence with the known words nearest to `word`, or with all of them where none is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(choices)}."
