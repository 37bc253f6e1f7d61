"""Reads arguments, and refuses those of another type than a function takes, before anything is computed."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from pathlib import Path

from lowvram.errors import ConfigError, argument
from lowvram.units import parse_bytes, parse_count, parse_share

PATH = (str, Path)
_NAMES = {
    str: "a text (str)",
    Path: "a Path",
    int: "a whole number (int)",
    float: "a number (float)",
    bool: "True or False",
}


def refuse_type(name: str, value: object, *types: type) -> None:
    """Raise ConfigError where an argument that is not None is of none of these types; a truth value is no number."""
    is_truth = isinstance(value, bool) and bool not in types
    if value is None or (isinstance(value, types) and not is_truth):
        return
    why = f"That is of type {type(value).__name__}."
    raise ConfigError(f"{argument(name)} is {reprlib.repr(value)}.", why, _ask_for(types))


def refuse_missing(name: str, value: object, *types: type) -> None:
    """Do what `refuse_type` does of an argument that may not be None."""
    if value is None:
        raise ConfigError(f"{argument(name)} is None.", "It may not be left out.", _ask_for(types))
    refuse_type(name, value, *types)


def _ask_for(types: Sequence[type]) -> str:
    return f"Give {' or '.join(_NAMES.get(kind, kind.__name__) for kind in types)}."


def refuse_count(name: str, value: object) -> None:
    """Raise ConfigError where an argument that is not None is no whole number of at least 1."""
    refuse_type(name, value, int)
    if isinstance(value, int) and value < 1:
        raise ConfigError(f"{argument(name)} is {value}.", "At least one is needed.", "Give 1 or more.")


def read_paths(name: str, value: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Return the paths of an argument that may be one or a list; raises ConfigError for anything else, or none."""
    refuse_missing(name, value, *PATH, list, tuple)
    values = [value] if isinstance(value, PATH) else list(value)
    if not values:
        raise ConfigError(f"{argument(name)} is empty.", "There is nothing to read.", "Name files or folders.")
    for each in values:
        refuse_missing(name, each, *PATH)
    return tuple(map(Path, values))


def read_count(name: str, value: int | str) -> int:
    """Return a whole number of at least 1, from 32768 or "32k"; raises ConfigError."""
    refuse_missing(name, value, int, str)
    try:
        number = parse_count(value)
    except ValueError as error:
        raise ConfigError(f"{argument(name)} is {value!r}.", f"{error}.", f"Write {argument(name, '32k')}.") from error
    refuse_count(name, number)
    return number


def read_size(name: str, value: int | str) -> int:
    """Return bytes, at least 1, from 200_000_000 or "200MB"; raises ConfigError."""
    refuse_missing(name, value, int, str)
    try:
        size = parse_bytes(value)
    except ValueError as error:
        fix = f"Write {argument(name, '200MB')}."
        raise ConfigError(f"{argument(name)} is {value!r}.", f"{error}.", fix) from error
    refuse_count(name, size)
    return size


def read_share(name: str, value: float | str | None) -> float | None:
    """Return a share between 0 and 1, from 0.005 or "0.5%"; raises ConfigError."""
    refuse_type(name, value, float, str)
    fix = f"Write {argument(name, 0.005)} or {argument(name, '0.5%')}."
    if isinstance(value, str):
        try:
            return parse_share(value)
        except ValueError as error:
            raise ConfigError(f"{argument(name)} is {value!r}.", f"{error}.", fix) from error
    if value is not None and not 0.0 < value < 1.0:
        raise ConfigError(f"{argument(name)} is {value!r}.", "It is a share of the documents.", fix)
    return value
