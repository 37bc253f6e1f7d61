"""Documents from files of text (.txt, .jsonl, .parquet, each plain, .gz or .zst); knows nothing of tokens."""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lowvram.errors import DataError, MachineError
from lowvram.files import explain_full_disk

KINDS = (".txt", ".jsonl", ".parquet")
ENDINGS = tuple(kind + packing for kind in KINDS for packing in ("", ".gz", ".zst"))
_LOOKED_FOR = f"Read are {', '.join(KINDS)}, each plain or with .gz or .zst behind it."
_COPY_BYTES = 1 << 20
# So little at a time because even few bytes of a .zst can be much text: one word repeated unpacks to 128 KiB per ~5.
_ZSTD_BYTES = 128
_PARQUET_ROWS = 1024


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the text files among `paths` and below the folders among them, sorted, each once.

    Inside a folder hidden files and other endings are passed over.
    Raises DataError for a path that is missing or has another ending, and for a folder without a text file.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            inside = {file for file in path.rglob("*") if _is_text(file.relative_to(path)) and file.is_file()}
            if not inside:
                raise DataError(f"The folder {path} holds no text files.", _LOOKED_FOR, "Name another.")
            found |= inside
        elif not path.exists():
            raise DataError(f"{path} does not exist.", _LOOKED_FOR, "Name a file or a folder that exists.")
        elif not path.name.lower().endswith(ENDINGS):
            raise DataError(f"{path} has an unknown ending.", _LOOKED_FOR, "Rename or convert the file.")
        else:
            found.add(path)
    return sorted(found, key=Path.as_posix)


def _is_text(inside: Path) -> bool:
    hidden = any(part.startswith(".") for part in inside.parts)
    return inside.name.lower().endswith(ENDINGS) and not hidden


def documents(file: Path, field: str = "text", tell: Callable[[int], None] | None = None) -> Iterator[str]:
    """Yield the documents of one file, in its order, holding one document (or 1,024 rows) at a time.

    .txt: parted by blank lines, line ends inside a document kept.  .jsonl: `field` of each line.  .parquet:
    the column `field`.  Documents of nothing but white space are passed over.
    tell: called before each document with the bytes read of the file as it lies on disk.
    Raises DataError, at the first fault: missing, unreadable, damaged, binary, not UTF-8, malformed, without
    `field`, without any document; MachineError if the package that reads this ending is not installed.
    """
    read = {".txt": _text_documents, ".jsonl": _json_documents, ".parquet": _parquet_documents}[_kind(file)]
    any_yet = False
    with _reading(file) as (stream, raw):
        for text in read(file, stream, field):
            if text and not text.isspace():
                any_yet = True
                if tell:
                    tell(raw.tell())
                yield text
    if not any_yet:
        raise DataError(f"{file} holds no document.", "It is empty, or all white space.", "Leave it out.")


def _kind(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz").removesuffix(".zst")
    if not name.endswith(KINDS):
        raise DataError(f"{file} has an unknown ending.", _LOOKED_FOR, "Rename or convert the file.")
    return name[name.rindex(".") :]


@contextmanager
def _reading(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a file; gives its bytes decompressed, and the file itself."""
    if not file.exists():
        raise DataError(f"{file} does not exist.", "", "Name a file that exists.")
    try:
        with open(file, "rb") as raw:
            match file.suffix.lower():
                case ".gz":
                    with gzip.GzipFile(fileobj=raw) as stream:
                        yield stream, raw  # type: ignore[misc]
                case ".zst":
                    yield io.BufferedReader(_ZstdStream(raw), _COPY_BYTES), raw
                case _:
                    yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        why = f"{type(error).__name__}: {error}."
        raise DataError(f"{file} cannot be read to its end.", why, "Fetch or compress it anew.") from error


class _ZstdStream(io.RawIOBase):
    """The bytes inside a .zst file; unlike zstandard's own reader it notices a file that was cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._zstd = raw, _need("zstandard")
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        try:
            while not self._ready:
                is_between = self._frame is None or self._frame.eof
                rest = self._frame.unused_data if self._frame and is_between else b""
                packed = rest or self._raw.read(_ZSTD_BYTES)
                if not packed and not is_between:
                    raise EOFError("the file ends inside a frame")
                if not packed:
                    return 0
                if is_between:
                    self._frame = self._zstd.ZstdDecompressor().decompressobj()
                self._ready = memoryview(self._frame.decompress(packed))
        except self._zstd.ZstdError as error:
            raise EOFError(str(error)) from error
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        what = f"Reading this file needs the package {package}."
        raise MachineError(what, "It is not installed.", f"Type: pip install {package}") from error


def _lines(file: Path, stream: IO[bytes]) -> Iterator[str]:
    offset = 0
    for raw in stream:
        start = len(codecs.BOM_UTF8) if offset == 0 and raw.startswith(codecs.BOM_UTF8) else 0
        if b"\0" in raw:
            raise DataError(
                f"{file} is not text: byte {offset + raw.index(0)} is NUL.",
                "The file is binary, or text in UTF-16.",
                "Leave it out, or convert it to UTF-8: iconv -f UTF-16 -t UTF-8",
            )
        try:
            yield raw[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            at = start + error.start
            raise DataError(
                f"{file} is not UTF-8: byte {offset + at} is 0x{raw[at]:02x}.",
                f"({error.reason}.) Older Turkish text is often windows-1254.",
                "If so, convert it: iconv -f WINDOWS-1254 -t UTF-8",
            ) from error
        offset += len(raw)


def _text_documents(file: Path, stream: IO[bytes], field: str) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(file, stream):
        if not line.isspace():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\r\n")
            lines = []
    yield "".join(lines).rstrip("\r\n")


def _json_documents(file: Path, stream: IO[bytes], field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file, stream), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number} is not JSON.", f"{error}.", "Mend or delete it.") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{file}:{number} is a JSON {type(record).__name__}, not an object.",
                "Each line must be one object that holds the text in a field.",
                f'Write lines like {{"{field}": "..."}}.',
            )
        if field not in record:
            raise _no_field(f"{file}:{number}", field, record)
        text = record[field]
        if not isinstance(text, str):
            raise _not_text(f"{file}:{number}", field, text)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{file}:{number} holds half a character: \\u{ord(text[error.start]):04x} at {error.start}.",
                "A lone surrogate is no Unicode text; whoever wrote the file cut a pair in two.",
                "Mend or delete that line.",
            ) from error
        yield text


def _no_field(where: str, field: str, known: Any) -> DataError:
    there = ", ".join(map(str, known)) or "none"
    return DataError(f"{where} has no field {field!r}.", f"Fields there: {there}.", "Name one of them.")


def _not_text(where: str, field: str, value: object) -> DataError:
    return DataError(
        f"{where}: the field {field!r} holds {type(value).__name__}, not text.",
        "Only strings can be documents.",
        "Name another field, or mend the file.",
    )


def _parquet_documents(file: Path, stream: IO[bytes], field: str) -> Iterator[str]:
    pyarrow, parquet = _need("pyarrow"), _need("pyarrow.parquet")
    row = 0
    with tempfile.TemporaryFile() as plain:
        if file.suffix.lower() != ".parquet":
            # Parquet is read from its end, which a compressed stream cannot offer.
            with explain_full_disk(Path(tempfile.gettempdir())):
                shutil.copyfileobj(stream, plain, _COPY_BYTES)
            stream = plain
        try:
            table = parquet.ParquetFile(stream)
            if field not in table.schema_arrow.names:
                raise _no_field(str(file), field, table.schema_arrow.names)
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]):
                for value in batch.column(0):
                    text = value.as_py()
                    if text is not None and not isinstance(text, str):
                        raise _not_text(f"{file}, row {row}", field, text)
                    row += 1
                    yield text or ""
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}, row {row}: the text is not UTF-8 at its byte {error.start}.",
                f"({error.reason}.)",
                "Mend or delete that row.",
            ) from error
        except pyarrow.ArrowException as error:
            raise DataError(f"{file} is not a Parquet file.", f"{error}.", "Fetch it anew.") from error
