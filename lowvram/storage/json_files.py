"""Parses a JSON object within limits on its size and nesting, whoever wrote it; knows no file's meaning.

Every JSON file or request that anybody could have changed is read here, so that all damage raises one error.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from lowvram.units import show_bytes

# tokenizer.json with 256,000 ids takes about 20 MB; nothing else that is read comes near.
MOST_BYTES = 256 << 20
# Files of lowvram and transformers stay below 10 levels; Python's own parser fails near 1,000, in 3.12 later.
MOST_LEVELS = 64


# A truth value is a number for Python.
_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "true or false"),
    ((int, float), "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "an object"),
    (bytes, "binary data"),
)


class JsonError(ValueError):
    """The bytes are not one JSON object within the limits; the error's text is half a sentence that says why."""


def parse_object(data: bytes | str, most_bytes: int = MOST_BYTES, most_levels: int = MOST_LEVELS) -> dict[str, Any]:
    """Return the JSON object that `data` is.

    most_bytes: the greatest length that is allowed (of a str in characters).  most_levels: the deepest nesting.
    Raises JsonError: too long, not UTF-8, not JSON (NaN and Infinity are not), nested too deeply, not an object.
    """
    if len(data) > most_bytes:
        raise JsonError(f"it is larger than {show_bytes(most_bytes)}, the most that is read")
    try:
        # Editors on Windows put a byte order mark before the text.
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        value = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise JsonError(f"it is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise JsonError(_too_deep(most_levels)) from error
    except ValueError as error:  # NaN, or an integer of more digits than Python converts
        raise JsonError(f"it is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise JsonError(f"it holds {_kind_of(value)}, not an object")
    _check_levels(value, most_levels)
    return value


def read_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file.  Raises OSError, and JsonError as `parse_object`; a larger file is not read."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        # Python allocates all that a read asks for, so a file with a size is asked for no more than that.
        asked = min(status.st_size, most_bytes) if stat.S_ISREG(status.st_mode) else most_bytes
        return parse_object(file.read(asked + 1), most_bytes)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _kind_of(value: object) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _too_deep(most_levels: int) -> str:
    return f"it is nested deeper than {most_levels} levels"


def _check_levels(top: dict[str, Any], most_levels: int) -> None:
    level: list[Any] = [top]
    for _ in range(most_levels):
        level = [
            value
            for container in level
            for value in (container.values() if isinstance(container, dict) else container)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise JsonError(_too_deep(most_levels))


def name_kind(value: object) -> str:
    """Return what a value from a file is, in words with their article: "a list", "a number", "text"."""
    for kinds, name in _KINDS:
        if isinstance(value, kinds):
            return name
    return f"a value of type {type(value).__name__.removesuffix('Scalar')}"
