"""Finds the text in a row by the name of its field, `a.b` and `a[].b` included; knows no file format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lowvram.data.bad_rows import BadRow
from lowvram.errors import DataError
from lowvram.storage.json_files import name_kind

# In the name of a field: each element of a list.
EACH = "[]"
# Kinds of bad rows that readers of several fields tell from others.
NULL, NO_FIELD = "null", "without the field"


def find_text(where: str, record: Mapping[str, Any], field: str) -> str | BadRow:
    """Return the text in a field of a row, or a bad row where there is none.

    `a.b` is field b of field a, unless a field has that name; `a[].b` is that of each object in the list a, all of them
    on lines of their own.  where: the place of the row, for the bad row.
    """
    if field in record:
        return check_text(where, field, record[field])
    try:
        values = list(_follow(record, split_field(field)))
    except KeyError:
        return BadRow.of(NO_FIELD, no_field(where, field, record))
    if EACH not in field:
        return check_text(where, field, values[0])
    texts = [check_text(where, field, value) for value in values]
    bad = next((text for text in texts if isinstance(text, BadRow)), None)
    return bad or "\n".join(text for text in texts if isinstance(text, str))


def split_field(field: str) -> list[str]:
    """Return the steps that lead to a field: `a[].b` is a, [], b."""
    return [step for name in field.replace(EACH, f".{EACH}").split(".") for step in [name] if step]


def _follow(value: Any, steps: list[str]) -> Iterator[Any]:
    for index, step in enumerate(steps):
        if step == EACH and isinstance(value, list):
            for inner in value:
                yield from _follow(inner, steps[index + 1 :])
            return
        if step == EACH or not isinstance(value, dict) or step not in value:
            raise KeyError(step)
        value = value[step]
    yield value


def check_text(where: str, field: str, value: object) -> str | BadRow:
    """Return a valid text unchanged, or a bad row for any other value; all formats with fields share these rules."""
    if not isinstance(value, str):
        is_null = value is None
        what = f"{where}: the field {field!r} " + ("is null." if is_null else f"holds {name_kind(value)}, not text.")
        fix = "Name another field, or mend the file."
        return BadRow(NULL if is_null else "not text", what, "Only strings can be documents.", fix)
    if "\0" in value:
        what = f"{where} is not text: its character {value.index(chr(0))} is NUL."
        return BadRow("with NUL", what, "NUL belongs to no text; the row is damaged, or binary.", "Mend or delete it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"{where} holds half a character: \\u{ord(value[error.start]):04x} at {error.start}."
        why = "A lone surrogate is no Unicode text; whoever wrote the file cut a pair in two."
        return BadRow("with half a character", what, why, "Mend or delete that line.")
    return value


def no_field(where: str, field: str, known: Iterable[Any]) -> DataError:
    """Return the error for a field that a row or a file has not."""
    names = ", ".join(map(str, known)) or "none"
    # In one part, since of a row that is skipped or listed no more is shown.
    what = f"{where} has no field {field!r}. Fields there: {names}."
    return DataError(what, "", "Name the one that holds the text with `field`.")
