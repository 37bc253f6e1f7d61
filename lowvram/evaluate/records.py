"""Reads evaluation items from files, one record with named fields for each line; does not know what the fields mean."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lowvram.data.text_files import name_unpacked
from lowvram.data.text_stream import open_table
from lowvram.errors import DataError
from lowvram.storage.json_files import name_kind

Item = TypeVar("Item")
_TABLES = (".tsv", ".tab")
_LINES = (".jsonl", ".ndjson", ".json")
_TREEBANKS = (".conllu",)
_ENDINGS = (*_LINES, *_TABLES, *_TREEBANKS)
# Of CoNLL-U, whose lines name no columns (universaldependencies.org/format.html).
_TREEBANK_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_BOM = "\ufeff"


class Record(NamedTuple):
    """One line of a file.  where: the file and the line's number.  values: its fields by name."""

    where: str
    values: dict[str, Any]

    def text(self, *names: str) -> str:
        """Return the first of these fields that the record has; raises DataError unless that is a text."""
        for name in names:
            if name in self.values:
                value = self.values[name]
                if isinstance(value, str):
                    return value
                raise self.refuse(f"its field {name!r} is {name_kind(value)}, not text")
        wanted = " or ".join(map(repr, names))
        raise self.refuse(f"it has no field {wanted}; its fields are {', '.join(self.values) or 'none'}")

    def refuse(self, why: str) -> DataError:
        """Return the error for a record of the wrong form.  why: a clause without its full stop."""
        return DataError(f"{self.where} is not of the form that is needed.", f"{why[0].upper()}{why[1:]}.")


def read_records(file: Path) -> Iterator[Record]:
    """Yield the records of JSON lines, of a table with tabs whose first line names the columns, or of CoNLL-U.

    Each may be plain, .gz or .zst.  An empty line of a table is a record without fields: it separates sentences.
    Raises DataError: missing, of another kind, damaged, not UTF-8, not JSON, a row with another number of columns.
    """
    if not file.is_file():
        what = f"{file} is a folder." if file.is_dir() else f"{file} does not exist."
        raise DataError(what, "Items are read from files.", "Name a file that exists.")
    name = name_unpacked(file)
    if not name.endswith(_ENDINGS):
        what = f"{file} is neither JSON lines nor a table with tabs."
        why = f"Items are read from {', '.join(_ENDINGS)}, each plain or with .gz or .zst at the end."
        raise DataError(what, why, "Rename or convert it.")
    lines = _read_lines(file)
    any_yet = False
    if name.endswith(_LINES):
        records = _read_json(lines)
    elif name.endswith(_TREEBANKS):
        records = _read_table((line for line in lines if not line[1].startswith("#")), _TREEBANK_COLUMNS)
    else:
        names = next(lines, ("", ""))[1]
        records = _read_table(lines, names.split("\t"))
    for record in records:
        any_yet = any_yet or bool(record.values)
        yield record
    if not any_yet:
        raise DataError(f"{file} holds no items.", "It is empty, or holds a header alone.", "Name another file.")


def _read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each line without its end, and where it stands."""
    with open_table(file) as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{file}:{number}"
            try:
                yield where, raw.decode("utf-8").lstrip(_BOM).rstrip("\r\n")
            except UnicodeDecodeError as error:
                what = f"{where} is not UTF-8: its byte {error.start} is 0x{raw[error.start]:02x}."
                raise DataError(what, "", "Convert the file to UTF-8.") from error


def _read_json(lines: Iterator[tuple[str, str]]) -> Iterator[Record]:
    for where, line in lines:
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON.", f"{error}.", "Write one object on each line.") from error
        if not isinstance(values, dict):
            what = f"{where} is {name_kind(values)}, not an object."
            raise DataError(what, "Each line is one item with named fields.", "Write one object on each line.")
        yield Record(where, values)


def _read_table(lines: Iterable[tuple[str, str]], names: Sequence[str]) -> Iterator[Record]:
    for where, line in lines:
        cells = line.split("\t")
        if not line.strip():
            yield Record(where, {})
        elif len(cells) != len(names):
            why = f"It has {len(cells)} columns, and the table has {len(names)}: {', '.join(names)}."
            raise DataError(f"{where} is not a row of its table.", why, "Mend the row, or name another file.")
        else:
            yield Record(where, dict(zip(names, cells, strict=True)))


def spread(items: Sequence[Item], most: int | None) -> list[Item]:
    """Return at most so many items, evenly spread over all of them: a file may be sorted by what it asks."""
    if most is None or most >= len(items):
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]
