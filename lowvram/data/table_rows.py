"""Reads the documents of a .csv or .tsv: one column, a row at a time; knows no other format."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lowvram.data.bad_rows import BadRow
from lowvram.data.fields import check_text, no_field
from lowvram.data.lines import MOST_LINE_BYTES, LineReader
from lowvram.errors import DataError

_DELIMITERS = ",;\t|"


def table_documents(file: Path, lines: LineReader, field: str, is_tsv: bool) -> Iterator[str | BadRow]:
    """Yield the column `field` of each row below the header, or what is wrong with it.

    A .tsv has a tab between columns and no quotation marks.  A .csv has a comma, semicolon, tab or bar: what parts the
    header so that a column is `field`; quotation marks may hold line ends.
    """
    feed = _Feed(lines)
    header = feed.read_line()
    if header is None:
        return
    delimiter = "\t" if is_tsv else _find_delimiter(header, field)
    # A quotation mark that is never closed would make one field of the whole rest.
    csv.field_size_limit(MOST_LINE_BYTES)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    [names] = csv.reader([header], delimiter=delimiter, quoting=quoting)
    if field not in names:
        raise no_field(f"{file}:1", field, names)
    column = names.index(field)
    reader = csv.reader(feed, delimiter=delimiter, quoting=quoting)
    while True:
        where = f"{file}:{feed.number + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            fix = "Close the quotation mark."
            raise DataError(
                f"{where} begins a field of more than {MOST_LINE_BYTES} bytes.", f"{error}.", fix
            ) from error
        bad = feed.take_bad()
        if bad is not None:
            yield bad
        elif row is None:
            return
        elif row:
            yield _read_row(where, row, names, column, field)


def _read_row(where: str, row: list[str], names: list[str], column: int, field: str) -> str | BadRow:
    if len(row) != len(names):
        what = f"{where} has {len(row)} columns, and the header {len(names)}."
        why = "Its delimiters or quotation marks are damaged, so that columns are not what they are called."
        return BadRow("with other columns", what, why, "Mend or delete it.", characters=sum(map(len, row)))
    return check_text(where, field, row[column])


def _find_delimiter(header: str, field: str) -> str:
    found = [mark for mark in _DELIMITERS if field in next(csv.reader([header], delimiter=mark))]
    return found[0] if found else max(_DELIMITERS, key=header.count)


class _Feed:
    """Lines for csv.reader.  number: of the last line that was read.

    A bad line is read as far as it can be decoded, so that rows behind it keep their places, and its row is given up.
    """

    def __init__(self, lines: LineReader) -> None:
        self._lines, self.number = lines.read(), 0
        self._bad: BadRow | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.read_line()
        if line is None:
            raise StopIteration
        return line

    def read_line(self) -> str | None:
        found = next(self._lines, None)
        if found is None:
            return None
        raw, line = found
        self.number += 1
        if isinstance(line, BadRow):
            self._bad = self._bad or line
            return raw.decode("utf-8", "replace").replace("\0", " ")
        return line.lstrip("\ufeff") if self.number == 1 else line

    def take_bad(self) -> BadRow | None:
        """Return the first bad line since the last call, None where there was none."""
        bad, self._bad = self._bad, None
        return bad
