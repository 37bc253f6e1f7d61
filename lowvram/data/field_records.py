"""Reads rows with named fields whole, one at a time, from every format that has them; knows no field's meaning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowvram.data.bad_rows import BadRow
from lowvram.data.hub_rows import hub_records
from lowvram.data.lines import LineReader
from lowvram.data.table_rows import table_records
from lowvram.data.text_files import is_dataset, size_of
from lowvram.data.text_stream import TextStream, need, open_seekable, open_text
from lowvram.errors import DataError
from lowvram.storage.json_files import name_kind

_WITHOUT_FIELDS = (".txt", ".pdf", ".docx")
_PARQUET_ROWS = 1024
# A row's fields by name, or what is wrong with it.
FieldRecord = dict[str, Any] | BadRow


def field_records(
    file: Path,
    convert: Callable[[str], None] | None = None,
    tell: Callable[[int, int | None], None] = lambda done, total: None,
) -> Iterator[tuple[str, FieldRecord]]:
    """Yield each row of a .tsv, .csv, .parquet, of JSON lines or of a data set, and before it where it stands.

    convert: as of `LineReader`.  tell: called before each row with the bytes read so far and the size of the file, None
    where it is not known.
    Raises DataError for another format and what `open_text` refuses, MachineError where a package is missing.
    """
    if is_dataset(file):
        for number, record in hub_records(file):
            yield f"{file}, row {number}", record
        return
    with open_text(file) as stream:
        if stream.kind in _WITHOUT_FIELDS:
            why = f"A {stream.kind} has no columns; .tsv, .csv, .parquet and JSON lines have."
            raise DataError(f"{file} is no table.", why, "Name one of these.")
        total = size_of(file) or None
        for row in _read(file, stream, convert):
            tell(stream.read_bytes(), total)
            yield row


def _read(file: Path, stream: TextStream, convert: Callable[[str], None] | None) -> Iterator[tuple[str, FieldRecord]]:
    if stream.kind == ".parquet":
        for number, record in enumerate(parquet_records(file, stream)):
            yield f"{file}, row {number}", record
        return
    lines = LineReader(file, stream, convert)
    if stream.kind in (".csv", ".tsv"):
        for number, row in table_records(file, lines, stream.kind == ".tsv"):
            yield f"{file}:{number}", row
        return
    for number, (_, line) in enumerate(lines.read(), 1):
        if isinstance(line, BadRow):
            yield f"{file}:{number}", line
        elif not line.isspace():
            yield f"{file}:{number}", read_object(f"{file}:{number}", line)


def read_object(where: str, line: str, field: str = "text") -> FieldRecord:
    """Return the object in a line of JSON.  where: the line's place, and field: one that is needed, for the bad row."""
    try:
        # The line end is removed, so that the error for a string without its closing quote is at the right place.
        record = json.loads(line.strip("\ufeff \t\r\n"))
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"{where} is not JSON.", f"{error}.", "Mend or delete it.", characters=len(line))
    if not isinstance(record, dict):
        what = f"{where} is {name_kind(record)}, not an object."
        why = "Each line must be one object that holds the text in a field."
        fix = f'Write lines like {{"{field}": "..."}}.'
        return BadRow("not an object", what, why, fix, characters=len(line))
    return record


def parquet_records(file: Path, stream: TextStream) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file; raises DataError where it is none, or holds what Python cannot represent."""
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    with open_seekable(stream) as plain:
        try:
            for rows in parquet.ParquetFile(plain).iter_batches(_PARQUET_ROWS):
                yield from rows.to_pylist()
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"{file} is not a Parquet file of texts.", f"{error}.", "Fetch it anew.") from error
