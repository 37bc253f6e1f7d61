"""Errors that a user can fix: each says what happened, why, and what to do.  Knows nothing else."""

from __future__ import annotations

import difflib
import json
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
    "argument",
    "name_nearest",
]


class LowvramError(Exception):
    """An error that the user can fix; the command line prints it as one paragraph and exits with its exit code."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(" ".join(part.strip() for part in (what, why, fix) if part))


class ConfigError(LowvramError):
    """A run file, preset or --set is invalid."""


class DataError(LowvramError):
    """Text or shards cannot be read in the format that they claim to have."""


class TokenizerError(LowvramError):
    """A tokenizer cannot be trained, loaded, or used on this text."""


class CheckpointError(LowvramError):
    """A checkpoint is missing, incomplete or altered."""


class BusyError(LowvramError):
    """Another process is using a directory."""


class DiskFullError(LowvramError):
    """There is no space left where something had to be written."""


class MachineError(LowvramError):
    """A device, driver or package cannot do what was asked."""


class PromptError(LowvramError):
    """The model cannot take a prompt."""


class ExportError(LowvramError):
    """Another program's format cannot hold a model, or a model in such a format cannot be read."""


class PromptTooLongError(PromptError):
    """A prompt does not fit the context; its newest part would."""


class NumbersError(LowvramError):
    """A model's numbers are not finite where a result must be computed from them."""


class TrainingError(LowvramError):
    """Training cannot go on."""


class DeviceFaultError(TrainingError):
    """A device or its driver failed during training: the same command goes on from the last checkpoint."""

    exit_code = 75


class MemoryRanOutError(TrainingError):
    """A training step does not fit the memory and cannot be split further; another training configuration may fit."""


def argument(name: str, value: object = None) -> str:
    """Return an argument of the Python interface as a part of a message, in backquotes: `out`, `device="cpu"`.

    The command line, which has an option for each, writes the option there: see `lowvram.cli.spelling`.
    """
    if value is None:
        return f"`{name}`"
    if isinstance(value, bool):
        return f"`{name}={value}`"
    is_plain = isinstance(value, int | float | list)
    return f"`{name}={json.dumps(value if is_plain else str(value), ensure_ascii=False)}`"


# By how much less alike a known word may be than the nearest one to be named beside it, of 1 for the same word.
_ABOUT_AS_NEAR = 0.2


def name_nearest(word: str, known: Iterable[str]) -> str:
    """Return a sentence with the known words nearest to `word`, or with all of them where none is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.5)
    if near:
        best = difflib.SequenceMatcher(None, near[0], word).ratio()
        near = [name for name in near if difflib.SequenceMatcher(None, name, word).ratio() > best - _ABOUT_AS_NEAR]
        return f"Did you mean {' or '.join(near)}?"
    return f"Known: {', '.join(choices)}."


def refuse_unknown(name: str, value: object, known: Iterable[str]) -> None:
    """Raise ConfigError where an argument that may be left out has a value that is not known."""
    words = list(known)
    if value is not None and value not in words:
        raise ConfigError(f"{argument(name)} is {value!r}.", fix=f"Known: {', '.join(words)}.")
