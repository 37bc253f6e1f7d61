"""Refuses arguments of another type than a function takes, before anything is computed; knows no function itself."""

from __future__ import annotations

import reprlib
from pathlib import Path

from lowvram.errors import ConfigError, argument

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
    known = " or ".join(_NAMES.get(kind, kind.__name__) for kind in types)
    raise ConfigError(
        f"{argument(name)} is {reprlib.repr(value)}.", f"That is of type {type(value).__name__}.", f"Give {known}."
    )


def refuse_missing(name: str, value: object, *types: type) -> None:
    """Do what `refuse_type` does of an argument that may not be None."""
    if value is None:
        known = " or ".join(_NAMES.get(kind, kind.__name__) for kind in types)
        raise ConfigError(f"{argument(name)} is None.", "It may not be left out.", f"Give {known}.")
    refuse_type(name, value, *types)


def refuse_count(name: str, value: object) -> None:
    """Raise ConfigError where an argument that is not None is no whole number of at least 1."""
    refuse_type(name, value, int)
    if isinstance(value, int) and value < 1:
        raise ConfigError(f"{argument(name)} is {value}.", "It is a number of things.", "Give 1 or more.")
