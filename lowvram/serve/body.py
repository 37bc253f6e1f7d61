"""A request's bytes as one JSON object, refused before it is parsed where that would take long; knows no field.

Python's JSON parser and pydantic hold the interpreter until they are done, and every other request waits for them.
Four megabytes of text are parsed in milliseconds, four megabytes of brackets or names take up to a second, and so
do some more of numbers.
"""

from __future__ import annotations

from typing import Any

from lowvram.serve.limits import MOST_COMMAS, MOST_CONTAINERS, MOST_FIELDS, MOST_LEVELS
from lowvram.storage.json_files import JsonError, parse_object


def read_body_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a body holds.

    Raises JsonError, whose text is half a sentence: not JSON, no object, nested too deeply, or of too many values.
    """
    check_shape(body)
    return parse_object(body, max(1, len(body)), MOST_LEVELS)


def check_shape(body: bytes) -> None:
    """Raise JsonError where a body has more lists, objects, fields or values than any request needs, in linear time."""
    # Without its escapes a text begins and ends at a quote, so every other piece between quotes is no text.
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if (quotes := bare.count(b'"')) > 4 * MOST_FIELDS:
        raise JsonError(f"it holds {quotes // 2:,} strings, and no request needs more than {2 * MOST_FIELDS:,}")
    outside = b"".join(bare.split(b'"')[::2])
    containers = outside.count(b"[") + outside.count(b"{")
    if containers > MOST_CONTAINERS:
        raise JsonError(
            f"it holds {containers:,} lists and objects, and no request needs more than {MOST_CONTAINERS:,}"
        )
    if (fields := outside.count(b":")) > MOST_FIELDS:
        raise JsonError(f"it holds {fields:,} fields, and no request needs more than {MOST_FIELDS:,}")
    if (commas := outside.count(b",")) > MOST_COMMAS:
        raise JsonError(f"it holds {commas:,} commas between values, and no request needs more than {MOST_COMMAS:,}")
