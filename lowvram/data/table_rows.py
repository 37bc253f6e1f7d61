"""Reads the rows of a .csv or .tsv, or one column of them, a row at a time; knows no other format."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lowvram.data.bad_rows import BadRow
from lowvram.data.fields import check_text, no_field
from lowvram.data.lines import MOST_LINE_BYTES, LineReader
from lowvram.data.places import Cursor
from lowvram.errors import DataError

_DELIMITERS = ",;\t|"


def table_documents(file: Path, lines: LineReader, field: str, is_tsv: bool, cursor: Cursor) -> Iterator[str | BadRow]:
    """Yield the column `field` of each row below the header, or what is wrong with it.

    A .tsv has a tab between columns and no quotation marks.  A .csv has a comma, semicolon, tab or bar: what parts the
    header so that a column is `field`; quotation marks may hold line ends.  cursor: told the first line of each row.
    """
    rows = _read_rows(file, lines, field, is_tsv)
    _, names = next(rows, (1, None))
    if not isinstance(names, list):
        return
    if field not in names:
        raise no_field(f"{file}:1", field, names)
    column = names.index(field)
    for number, row in rows:
        cursor.line = number
        yield row if isinstance(row, BadRow) else check_text(f"{file}:{number}", field, row[column])


def table_records(file: Path, lines: LineReader, is_tsv: bool) -> Iterator[tuple[int, dict[str, str] | BadRow]]:
    """Yield the first line of each row below the header, and its cells by the names of their columns.

    A row with a fault is a bad row; otherwise as above.

    The delimiter of a .csv is the one that stands most often in the header.
    """
    rows = _read_rows(file, lines, None, is_tsv)
    _, names = next(rows, (1, None))
    if isinstance(names, list):
        for number, row in rows:
            yield number, row if isinstance(row, BadRow) else dict(zip(names, row, strict=True))


def _read_rows(
    file: Path, lines: LineReader, field: str | None, is_tsv: bool
) -> Iterator[tuple[int, list[str] | BadRow]]:
    """Yield the first line of each row and its columns, the header first."""
    feed = _Feed(lines)
    header = feed.read_line()
    if header is None:
        return
    # A quotation mark that is never closed would make one field of the whole rest.
    csv.field_size_limit(MOST_LINE_BYTES)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    try:
        delimiter = "\t" if is_tsv else _find_delimiter(header, field)
        [names] = csv.reader([header], delimiter=delimiter, quoting=quoting)
    except csv.Error as error:
        what, why, fix = _explain(f"{file}:1", error)
        raise DataError(what, why, fix) from error
    yield 1, names
    if feed.bad is not None:
        yield 1, feed.bad
    # Where it is not strict, the reader takes for text what follows a closed mark, and a mark left open for a field.
    reader = csv.reader(feed, delimiter=delimiter, quoting=quoting, strict=True)
    while True:
        feed.begin_row()
        number = feed.number + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield number, _give_up(feed, f"{file}:{number}", error)
            continue
        if feed.bad is not None:
            yield number, feed.bad
        elif row is None:
            return
        elif row:
            yield number, row if len(row) == len(names) else _refuse_columns(f"{file}:{number}", row, names)


def _give_up(feed: _Feed, where: str, error: csv.Error) -> BadRow:
    """Return what is wrong with the first line of a row that cannot be read; the lines behind it are read anew."""
    characters = feed.give_back()
    what, why, fix = _explain(where, error)
    return feed.bad or BadRow("with damaged marks or line ends", what, why, fix, characters=characters)


def _explain(where: str, error: csv.Error) -> tuple[str, str, str]:
    """Return what is wrong with a line, why, and what to do.  The sentences of Python's csv name its own settings."""
    reason = str(error)
    if "field larger" in reason:
        what = f"{where} begins a field that is longer than {MOST_LINE_BYTES} characters."
        return (
            what,
            "A quotation mark is not closed, or it is no text.",
            "Close the quotation mark, or delete the line.",
        )
    if "new-line character" in reason:
        what = f"{where} has a carriage return (CR) inside a line."
        return what, "Lines of a table end alike, by LF or by CR and LF.", "Delete it, or put quotation marks around."
    if "unexpected end" in reason:
        what = f"{where} opens a quotation mark that is not closed up to the end of the file."
        return what, "The rest of the file would be one field.", "Close the quotation mark."
    what = f"{where} has a quotation mark in the wrong place."
    why = "A mark opens where a field begins and closes where it ends, and one inside is written twice."
    return what, why, "Mend the marks of this row, or of one shortly behind it."


def _refuse_columns(where: str, row: list[str], names: list[str]) -> BadRow:
    what = f"{where} has {len(row)} columns, and the header {len(names)}."
    why = "Its delimiters or quotation marks are damaged, so that columns are not what they are called."
    return BadRow("with other columns", what, why, "Mend or delete it.", characters=sum(map(len, row)))


def _find_delimiter(header: str, field: str | None) -> str:
    found = [mark for mark in _DELIMITERS if field in next(csv.reader([header], delimiter=mark))]
    return found[0] if found else max(_DELIMITERS, key=header.count)


class _Feed:
    """Lines for csv.reader.  number: of the last line that was read.

    A bad line is read as far as it can be decoded, so that rows behind it keep their places, and its row is given up.
    """

    def __init__(self, lines: LineReader) -> None:
        self._lines, self.number = lines.read(), 0
        self._row: list[tuple[str, BadRow | None]] = []
        self._again: deque[tuple[str, BadRow | None]] = deque()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.read_line()
        if line is None:
            raise StopIteration
        return line

    def read_line(self) -> str | None:
        read = self._again.popleft() if self._again else self._decode()
        if read is None:
            return None
        self.number += 1
        self._row.append(read)
        return read[0].lstrip("\ufeff") if self.number == 1 else read[0]

    def _decode(self) -> tuple[str, BadRow | None] | None:
        found = next(self._lines, None)
        if found is None:
            return None
        raw, line = found
        return (raw.decode("utf-8", "replace").replace("\0", " "), line) if isinstance(line, BadRow) else (line, None)

    def begin_row(self) -> None:
        """Forget the lines of the row before."""
        self._row.clear()

    def give_back(self) -> int:
        """Keep the first line of the row alone and let the others be read again; return its length in characters."""
        self._again.extendleft(reversed(self._row[1:]))
        self.number -= len(self._row) - 1
        del self._row[1:]
        return len(self._row[0][0])

    @property
    def bad(self) -> BadRow | None:
        """The first bad line of the row, None where there is none."""
        return next((bad for _, bad in self._row if bad is not None), None)
