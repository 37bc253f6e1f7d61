"""Reads documents from files of every kind that lowvram reads; knows nothing of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lowvram.data.bad_rows import BadRow, BadRows
from lowvram.data.field_records import read_object
from lowvram.data.fields import EACH, check_text, find_text, no_field, split_field
from lowvram.data.hub_rows import hub_documents
from lowvram.data.lines import MOST_LINE_BYTES, LineReader
from lowvram.data.office_documents import docx_document, pdf_document
from lowvram.data.places import Cursor, read_origin
from lowvram.data.table_rows import table_documents
from lowvram.data.text_files import ENDINGS, KINDS, find_files, is_dataset, size_of
from lowvram.data.text_stream import TextStream, need, open_seekable, open_text
from lowvram.errors import DataError

__all__ = ["ENDINGS", "KINDS", "documents", "documents_of", "find_files"]

_BOM = "\ufeff"
_PARQUET_ROWS = 1024
# Called with the name of an encoding that a file is converted from.
Convert = Callable[[str], None]


def documents(
    file: Path,
    field: str = "text",
    tell: Callable[[int], None] | None = None,
    bad_rows: BadRows | None = None,
    cursor: Cursor | None = None,
) -> Iterator[str]:
    """Yield the documents of one file, in its order, with one document (or 1,024 rows) in memory at a time.

    .txt: documents are separated by blank lines, and where another file with a byte order mark was appended; line ends
    inside a document are kept.  .jsonl, .json: `field` of each line.  .parquet, .csv, .tsv: the column `field`; `a.b`
    means field b of field a, `a[].b` those of a list.  .pdf, .docx: one document.  Documents of nothing but white
    space are skipped.
    tell: called before each document with the number of bytes read from the file as stored on disk.
    bad_rows: what is done with rows that are not text; None stops at the first.  cursor: told the place of each
    document before it is yielded.
    Raises DataError, depending on `bad_rows`: missing, unreadable, damaged, binary, not UTF-8, malformed, without
    `field`, without any document; MachineError if the package that reads this kind of file is not installed.
    """
    bad_rows = bad_rows or BadRows()
    any_yet = False
    for row in _rows(file, field, tell, partial(bad_rows.note_encoding, file), cursor or Cursor()):
        any_yet = True
        if type(row) is BadRow:
            bad_rows.take(row)
        else:
            bad_rows.count_text(len(row))
            yield row
    if not any_yet:
        what, why = f"{file} holds no document.", "It is empty, or all white space."
        bad_rows.take(BadRow("empty", what, why, "Leave it out."))


def documents_of(
    files: Sequence[Path],
    field: str,
    tell: Callable[[int, int | None], None] = lambda done, total: None,
    bad_rows: BadRows | None = None,
) -> Iterator[str]:
    """Yield the documents of several files, one file after the other; otherwise as `documents`.

    tell: called before each document with the bytes read so far and the size of all files, None where it is not known.
    """
    total, before = sum(map(size_of, files)), 0
    for file in files:

        def tell_of_all(inside: int, before: int = before) -> None:
            tell(before + inside, total or None)

        yield from documents(file, field, tell_of_all, bad_rows)
        before += size_of(file)


def _rows(
    file: Path, field: str, tell: Callable[[int], None] | None, convert: Convert, cursor: Cursor
) -> Iterator[str | BadRow]:
    """Yield the documents and bad rows of a file; if an error ends the file early, it is the last bad row."""
    cursor.reset()
    try:
        if is_dataset(file):
            rows = hub_documents(file, field, cursor)
            yield from (row for row in rows if row and not (type(row) is str and row.isspace()))
            return
        with open_text(file) as stream:
            for row in _READERS.get(stream.kind, _json_documents)(file, stream, field, convert, cursor):
                if type(row) is BadRow:
                    yield row
                elif row and not row.isspace():
                    if tell:
                        tell(stream.read_bytes())
                    yield row
    except DataError as error:
        yield BadRow.of("unreadable", error, file)


def _text_documents(
    file: Path, stream: TextStream, field: str, convert: Convert, cursor: Cursor
) -> Iterator[str | BadRow]:
    lines: list[str] = []
    bad: BadRow | None = None
    lost = size = 0
    for number, (_, line) in enumerate(LineReader(file, stream, convert).read(), 1):
        if type(line) is BadRow:
            lost += line.characters + sum(map(len, lines))
            bad, lines = bad or line, []
            continue
        if line[0] == _BOM:
            # Another file was appended here; no blank line comes before it, but the document ends all the same.
            yield replace(bad, characters=lost) if bad else _join(lines)
            bad, lost, size, line = None, 0, 0, line.lstrip(_BOM)
        if not line.isspace():
            if bad:
                lost += len(line)
            else:
                if not lines:
                    cursor.line = number
                lines.append(line)
                size += len(line)
                if size > MOST_LINE_BYTES:
                    # A file of gigabytes without a blank line, such as one sentence a line, is cut at a line's end.
                    yield _join(lines)
                    size = 0
        elif lines or bad:
            yield replace(bad, characters=lost) if bad else _join(lines)
            bad, lost, size = None, 0, 0
    yield replace(bad, characters=lost) if bad else _join(lines)


def _join(lines: list[str]) -> str:
    """Return the document of these lines without its last line end, and empty the list to save memory."""
    if lines:
        lines[-1] = lines[-1].rstrip("\r\n")
    text = "".join(lines)
    lines.clear()
    return text


def _json_documents(
    file: Path, stream: TextStream, field: str, convert: Convert, cursor: Cursor
) -> Iterator[str | BadRow]:
    for number, (_, line) in enumerate(LineReader(file, stream, convert).read(), 1):
        if type(line) is BadRow:
            yield line
        elif not line.isspace():
            cursor.line = number
            row = _read_line(file, line, field, cursor)
            yield replace(row, characters=len(line)) if type(row) is BadRow else row


def _read_line(file: Path, line: str, field: str, cursor: Cursor) -> str | BadRow:
    where = f"{file}:{cursor.line}"
    record = read_object(where, line, field)
    if type(record) is BadRow:
        return record
    cursor.origin = read_origin(file, record)
    return find_text(where, record, field)


def _csv_documents(
    file: Path, stream: TextStream, field: str, convert: Convert, cursor: Cursor
) -> Iterator[str | BadRow]:
    return table_documents(file, LineReader(file, stream, convert), field, stream.kind == ".tsv", cursor)


def _office_documents(
    file: Path, stream: TextStream, field: str, convert: Convert, cursor: Cursor
) -> Iterator[str | BadRow]:
    read = pdf_document if stream.kind == ".pdf" else docx_document
    with open_seekable(stream) as plain:
        yield from read(file, plain)


def _parquet_documents(
    file: Path, stream: TextStream, field: str, convert: Convert, cursor: Cursor
) -> Iterator[str | BadRow]:
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    with open_seekable(stream) as plain:
        try:
            table = parquet.ParquetFile(plain)
            path = _find_column(str(file), field, table.schema_arrow)
            row = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[path[0] if EACH in field else field]):
                column = batch.column(0)
                if EACH in field:
                    for value in column:
                        cursor.line = row
                        yield find_text(f"{file}, row {row}", {path[0]: value.as_py()}, field)
                        row += 1
                    continue
                for name in path[1:]:
                    column = need("pyarrow.compute").struct_field(column, name)
                for value in column:
                    cursor.line = row
                    yield _read_cell(f"{file}, row {row}", field, value)
                    row += 1
        except pyarrow.ArrowException as error:
            raise DataError(f"{file} is not a Parquet file.", f"{error}.", "Fetch it anew.") from error


def _find_column(file: str, field: str, schema: Any) -> list[str]:
    """Return the names that lead to a column through structs; a column whose own name has dots is preferred.

    Lists and maps are not followed: they have not one text per row, although Arrow names their elements too.
    """
    is_struct = need("pyarrow.types").is_struct
    if field in schema.names:
        return [field]
    names = field.split(".")
    if EACH in field and split_field(field)[0] in schema.names:
        return split_field(field)[:1]
    fields = {each.name: each for each in schema}  # Arrow's own look-up by name fails for names that occur twice
    for name in names:
        if name not in fields:
            raise no_field(file, field, schema.names)
        inner = fields[name].type
        children = [inner.field(index) for index in range(inner.num_fields)] if is_struct(inner) else []
        fields = {each.name: each for each in children}
    return names


def _read_cell(where: str, field: str, cell: Any) -> str | BadRow:
    try:
        value = cell.as_py()
    except UnicodeDecodeError as error:
        what = f"{where}: the text is not UTF-8 at its byte {error.start}."
        return BadRow("not UTF-8", what, f"({error.reason}.)", "Mend or delete that row.")
    except (ValueError, OverflowError):  # for example a time in nanoseconds, which Python cannot represent
        value = cell
    return check_text(where, field, value)


_READERS: dict[str, Callable[[Path, TextStream, str, Convert, Cursor], Iterator[str | BadRow]]] = {
    ".txt": _text_documents,
    ".parquet": _parquet_documents,
    ".csv": _csv_documents,
    ".tsv": _csv_documents,
    ".pdf": _office_documents,
    ".docx": _office_documents,
}
