"""Documents from files of text (.txt, .jsonl, .parquet, each plain, .gz or .zst); knows nothing of tokens."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from lowvram.data.bad_rows import BadRow, BadRows
from lowvram.data.encoding import Advice, explain_not_utf8
from lowvram.data.text_files import ENDINGS, KINDS, find_files, size_of
from lowvram.data.text_stream import COPY_BYTES, TextStream, need, open_text
from lowvram.errors import DataError
from lowvram.storage.disk import explain_full_disk

__all__ = ["ENDINGS", "KINDS", "documents", "documents_of", "find_files"]

_BOM = "\ufeff"
_PARQUET_ROWS = 1024
# Enough of a file to guess its encoding from.
_SAMPLE_BYTES = 1 << 16


def documents(
    file: Path,
    field: str = "text",
    tell: Callable[[int], None] | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[str]:
    """Yield the documents of one file, in its order, holding one document (or 1,024 rows) at a time.

    .txt: parted by blank lines, and where another file with a byte order mark was appended; line ends inside a
    document are kept.  .jsonl: `field` of each line.  .parquet: the column `field`; `a.b` is field b of field a.
    Documents of nothing but white space are passed over.
    tell: called before each document with the bytes read of the file as it lies on disk.
    bad_rows: what is done with rows that are no text; None stops at the first.
    Raises DataError, as `bad_rows` says: missing, unreadable, damaged, binary, not UTF-8, malformed, without
    `field`, without any document; MachineError if the package that reads this ending is not installed.
    """
    bad_rows = bad_rows or BadRows()
    any_yet = False
    for row in _rows(file, field, tell):
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
    files: Sequence[Path], field: str, tell: Callable[[int, int | None], None], bad_rows: BadRows | None = None
) -> Iterator[str]:
    """Yield the documents of several files, one file behind the other; otherwise as `documents`.

    tell: called before each document with the bytes read of all files, and with their sum, None where it is not known.
    """
    total, before = sum(map(size_of, files)), 0
    for file in files:

        def tell_of_all(inside: int, before: int = before) -> None:
            tell(before + inside, total or None)

        yield from documents(file, field, tell_of_all, bad_rows)
        before += size_of(file)


def _rows(file: Path, field: str, tell: Callable[[int], None] | None) -> Iterator[str | BadRow]:
    """Yield the documents and bad rows of a file; what ends the reading of the whole file is the last of them."""
    read = {".txt": _text_documents, ".parquet": _parquet_documents}
    try:
        with open_text(file) as stream:
            for row in read.get(stream.kind, _json_documents)(file, stream, field):
                if type(row) is BadRow:
                    yield row
                elif row and not row.isspace():
                    if tell:
                        tell(stream.read_bytes())
                    yield row
    except DataError as error:
        yield BadRow.of("unreadable", error, ends_file=True)


def _lines(stream: TextStream) -> Iterator[bytes]:
    """Return the lines of a file, with their ends; CR alone ends a line where the file begins without any LF."""
    head = stream.bytes.peek(1)
    return _lines_with_cr(stream) if b"\r" in head and b"\n" not in head else iter(stream.bytes)


def _lines_with_cr(stream: TextStream) -> Iterator[bytes]:
    parts: list[bytes] = []  # of one line; they are joined once, since a line may be many blocks long
    for block in iter(partial(stream.bytes.read1, COPY_BYTES), b""):
        if parts and (parts[-1].endswith(b"\n") or (parts[-1].endswith(b"\r") and not block.startswith(b"\n"))):
            yield b"".join(parts)
            parts = []
        first, *lines = block.splitlines(keepends=True)
        parts.append(first)
        if lines:
            yield b"".join(parts)
            yield from lines[:-1]
            parts = lines[-1:]
    if parts:
        yield b"".join(parts)


def _decoded(file: Path, stream: TextStream) -> Iterator[str | BadRow]:
    sample = bytes(stream.bytes.peek(1)[:_SAMPLE_BYTES])
    advice: Advice | None = None
    offset = 0
    for number, raw in enumerate(_lines(stream), 1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            if b"\0" not in raw:
                advice = advice or explain_not_utf8(sample + raw)
                what = f"{file}:{number} is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}."
                yield BadRow("not UTF-8", what, advice.why, advice.fix, characters=len(raw))
                offset += len(raw)
                continue
        if b"\0" in raw:
            what = f"{file}:{number} is not text: byte {offset + raw.index(0)} is NUL."
            why = "The file is binary, or text in UTF-16, or that line is damaged."
            fix = "Leave it out, mend the line, or convert it to UTF-8: iconv -f UTF-16 -t UTF-8"
            yield BadRow("with NUL", what, why, fix, characters=len(raw))
        else:
            yield line
        offset += len(raw)


def _text_documents(file: Path, stream: TextStream, field: str) -> Iterator[str | BadRow]:
    lines: list[str] = []
    bad: BadRow | None = None
    lost = 0
    for line in _decoded(file, stream):
        if type(line) is BadRow:
            lost += line.characters + sum(map(len, lines))
            bad, lines = bad or line, []
            continue
        if line[0] == _BOM:
            # Another file was appended here; its first line is no blank one, but a document ends all the same.
            yield replace(bad, characters=lost) if bad else _join(lines)
            bad, lost, line = None, 0, line.lstrip(_BOM)
        if not line.isspace():
            if bad:
                lost += len(line)
            else:
                lines.append(line)
        elif lines or bad:
            yield replace(bad, characters=lost) if bad else _join(lines)
            bad, lost = None, 0
    yield replace(bad, characters=lost) if bad else _join(lines)


def _join(lines: list[str]) -> str:
    """Return the document of these lines without its last line end, and empty the list: both at once may be much."""
    if lines:
        lines[-1] = lines[-1].rstrip("\r\n")
    text = "".join(lines)
    lines.clear()
    return text


def _json_documents(file: Path, stream: TextStream, field: str) -> Iterator[str | BadRow]:
    for number, line in enumerate(_decoded(file, stream), 1):
        if type(line) is BadRow:
            yield line
        elif not line.isspace():
            row = _read_line(f"{file}:{number}", line, field)
            yield replace(row, characters=len(line)) if type(row) is BadRow else row


def _read_line(where: str, line: str, field: str) -> str | BadRow:
    try:
        # Without the line end, behind which a string that is never closed would seem to go on.
        record = json.loads(line.strip(f"{_BOM} \t\r\n"))
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"{where} is not JSON.", f"{error}.", "Mend or delete it.")
    if not isinstance(record, dict):
        what = f"{where} is a JSON {type(record).__name__}, not an object."
        why = "Each line must be one object that holds the text in a field."
        return BadRow("not an object", what, why, f'Write lines like {{"{field}": "..."}}.')
    value: Any = record
    for name in [field] if field in record else field.split("."):
        if not isinstance(value, dict) or name not in value:
            return BadRow.of("without the field", _no_field(where, field, record))
        value = value[name]
    return _check_text(where, field, value)


def _check_text(where: str, field: str, value: object) -> str | BadRow:
    """Return a text as it is, and what is wrong with anything else: the same for lines of JSON and for Parquet."""
    if not isinstance(value, str):
        is_null = value is None
        what = f"{where}: the field {field!r} " + (
            "is null." if is_null else f"holds {type(value).__name__}, not text."
        )
        fix = "Name another field, or mend the file."
        return BadRow("null" if is_null else "not text", what, "Only strings can be documents.", fix)
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


def _no_field(where: str, field: str, known: Any) -> DataError:
    there = ", ".join(map(str, known)) or "none"
    return DataError(f"{where} has no field {field!r}.", f"Fields there: {there}.", "Name one of them.")


def _parquet_documents(file: Path, stream: TextStream, field: str) -> Iterator[str | BadRow]:
    pyarrow, parquet = need("pyarrow"), need("pyarrow.parquet")
    with tempfile.TemporaryFile() as copy:
        plain: IO[bytes] = stream.bytes
        if not stream.is_seekable:
            # Parquet is read from its end, which a compressed stream cannot offer.
            with explain_full_disk(Path(tempfile.gettempdir())):
                shutil.copyfileobj(stream.bytes, copy, COPY_BYTES)
            plain = copy
        try:
            table = parquet.ParquetFile(plain)
            path = _find_column(str(file), field, table.schema_arrow)
            row = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]):
                column = batch.column(0)
                for name in path[1:]:
                    column = need("pyarrow.compute").struct_field(column, name)
                for value in column:
                    yield _read_cell(f"{file}, row {row}", field, value)
                    row += 1
        except pyarrow.ArrowException as error:
            raise DataError(f"{file} is not a Parquet file.", f"{error}.", "Fetch it anew.") from error


def _find_column(file: str, field: str, schema: Any) -> list[str]:
    """Return the names that lead to a column through structs; a column whose own name has dots goes first.

    A list or a map is no way to one text in each row, although Arrow also has names for what lies in them.
    """
    is_struct = need("pyarrow.types").is_struct
    if field in schema.names:
        return [field]
    names = field.split(".")
    fields = {each.name: each for each in schema}  # by its name Arrow gives none that is there twice
    for name in names:
        if name not in fields:
            raise _no_field(file, field, schema.names)
        inner = fields[name].type
        inside = [inner.field(at) for at in range(inner.num_fields)] if is_struct(inner) else []
        fields = {each.name: each for each in inside}
    return names


def _read_cell(where: str, field: str, cell: Any) -> str | BadRow:
    try:
        value = cell.as_py()
    except UnicodeDecodeError as error:
        what = f"{where}: the text is not UTF-8 at its byte {error.start}."
        return BadRow("not UTF-8", what, f"({error.reason}.)", "Mend or delete that row.")
    except (ValueError, OverflowError):  # such as a time in nanoseconds, for which Python has no value
        value = cell
    return _check_text(where, field, value)
