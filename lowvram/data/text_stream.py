"""Opens a text file as a stream of decompressed bytes, whatever its name says of compression; knows no documents."""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from lowvram.data.text_files import KINDS, NAMED_KINDS, STANDARD_INPUT, is_stream, name_unpacked, unknown_ending
from lowvram.errors import DataError, MachineError
from lowvram.storage.disk import explain_full_disk

COPY_BYTES = 1 << 20
# Few bytes are read at a time, because a .zst can expand very far: one repeated word takes about 5 bytes per 128 KiB.
_ZSTD_BYTES = 128
_BUFFER_BYTES = 1 << 17
_UTF16_BYTES = 1 << 16
_MAGIC = {".gz": b"\x1f\x8b\x08", ".zst": b"\x28\xb5\x2f\xfd"}
# The beginning of an object, or of an array of objects or strings; the rest may not have arrived yet.  A line of plain
# text may begin with a bracket, too: `[Müzik]`.
_JSON = re.compile(rb"\s*(\{\s*([\"}]|$)|\[\s*[\[{\"])")
# The first bytes of formats that are not plain text, with the name of the format and what to do.
_OTHERS = {
    b"PAR1": ("a Parquet file", "Rename it so that it ends in .parquet."),
    b"PK\x03\x04": ("a ZIP archive, or a document of an office program", "Unpack it, or save it as plain text."),
    b"%PDF": ("a PDF", "Rename it so that it ends in .pdf."),
    b"\xff\xfe\0\0": ("text in UTF-32", "Convert it: iconv -f UTF-32 -t UTF-8"),
    b"BZh": ("compressed by bzip2", "Unpack it first: bunzip2"),
    b"\xfd7zXZ": ("compressed by xz", "Unpack it first: unxz"),
}


# Formats with a structure of their own, which are not looked at as text.
BINARY_KINDS = (".parquet", ".pdf", ".docx")
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class TextStream(NamedTuple):
    """An open file.  kind: its ending.  read_bytes: returns how many bytes were read from the file on disk.

    bytes: of text in UTF-8, whatever `encoding` it was in, but for damaged lines; or of a binary format.
    """

    kind: str
    bytes: io.BufferedReader
    read_bytes: Callable[[], int]
    is_seekable: bool
    encoding: str = "UTF-8"


@contextmanager
def open_text(file: Path) -> Iterator[TextStream]:
    """Open a file, or standard input (`-`); a stream without ending is JSON lines if it begins like JSON, else text.

    Raises DataError: missing, not text although its ending says so, unreadable or damaged (also while it is read);
    MachineError if the package that reads this kind of file is not installed.
    """
    kind = _kind_by_name(file)
    with _opened(file) as (raw, stream):
        head = stream.peek(8).removeprefix(b"\xef\xbb\xbf")
        kind = kind or (".jsonl" if _JSON.match(head) else ".txt")
        is_seekable, encoding = stream is raw and raw.seekable(), "UTF-8"
        if kind not in BINARY_KINDS:
            _refuse_other_formats(file, head)
            if head.startswith(_UTF16_MARKS):
                stream, encoding = io.BufferedReader(_Utf16Stream(stream), _BUFFER_BYTES), "UTF-16"
                is_seekable = False
        yield TextStream(kind, stream, raw.tell if raw.seekable() else lambda: 0, is_seekable, encoding)


@contextmanager
def open_seekable(stream: TextStream) -> Iterator[IO[bytes]]:
    """Yield the bytes of a file as one that can be read in any order: a compressed stream is copied first."""
    if stream.is_seekable:
        yield stream.bytes
        return
    with tempfile.TemporaryFile() as copy:
        with explain_full_disk(Path(tempfile.gettempdir())):
            shutil.copyfileobj(stream.bytes, copy, COPY_BYTES)
        copy.seek(0)
        yield copy


@contextmanager
def open_table(file: Path) -> Iterator[io.BufferedReader]:
    """Open a file of text with any ending, or standard input (`-`), as its decompressed bytes; errors as `open_text`.

    For files whose columns have meanings, whoever reads them decides what an ending means.
    """
    with _opened(file) as (_, stream):
        _refuse_other_formats(file, stream.peek(8).removeprefix(b"\xef\xbb\xbf"))
        yield stream


@contextmanager
def _opened(file: Path) -> Iterator[tuple[io.BufferedReader, io.BufferedReader]]:
    """Open a file as its bytes on disk and as its decompressed bytes, and explain what fails while it is read."""
    if file != STANDARD_INPUT and not file.exists():
        raise DataError(f"{file} does not exist.", "", "Name a file that exists.")
    try:
        is_file = file != STANDARD_INPUT
        raw: io.BufferedReader = io.BufferedReader(io.FileIO(file if is_file else 0, closefd=is_file), _BUFFER_BYTES)
        with raw:
            yield raw, _unpack(file, raw)
    except (OSError, EOFError, zlib.error, _DamagedError) as error:
        raise DataError(f"{file} cannot be read to its end.", _explain(error), "Fetch or compress it anew.") from error


class _DamagedError(Exception):
    """A stream is damaged; the text is a sentence that says how."""


_CUT_SHORT = "It was cut short: its compressed data end too early."


def _explain(error: Exception) -> str:
    match error:
        case EOFError():  # of Python's gzip
            return _CUT_SHORT
        case gzip.BadGzipFile() | zlib.error():
            return f"Its compressed data are damaged ({error})."
        case OSError(strerror=str(reason)):
            return f"The system says: {reason}."
        case _:
            return str(error)


def _kind_by_name(file: Path) -> str | None:
    """Return the kind that a file's ending means, None for a stream without one."""
    name = name_unpacked(file)
    if name.endswith(KINDS + NAMED_KINDS):
        return name[name.rindex(".") :]
    if is_stream(file):
        return None
    raise unknown_ending(file)


def _unpack(file: Path, raw: io.BufferedReader) -> io.BufferedReader:
    packing = file.suffix.lower()
    if packing not in _MAGIC:
        head = raw.peek(4)
        packing = next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "")
    match packing:
        case ".gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)
        case ".zst":
            return io.BufferedReader(_ZstdStream(raw), _BUFFER_BYTES)
        case _:
            return raw


def _refuse_other_formats(file: Path, head: bytes) -> None:
    for magic, (what, fix) in _OTHERS.items():
        if head.startswith(magic):
            raise DataError(f"{file} is {what}.", "Its first bytes say so, whatever its name.", fix)


class _Utf16Stream(io.RawIOBase):
    """Text in UTF-16, in UTF-8; a file that is cut short, or half a character, is an error."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder("utf-16")()
        self._ready = b""
        self._is_over = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._ready and not self._is_over:
            block = self._raw.read(_UTF16_BYTES)
            self._is_over = not block
            try:
                self._ready = self._decoder.decode(block, self._is_over).encode("utf-8")
            except UnicodeDecodeError as error:
                raise _DamagedError(f"It is damaged UTF-16 ({error.reason}).") from error
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


class _ZstdStream(io.RawIOBase):
    """The bytes inside a .zst file; unlike zstandard's own reader it detects a truncated file."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._zstd = raw, need("zstandard")
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
                    raise _DamagedError(_CUT_SHORT)
                if not packed:
                    return 0
                if is_between:
                    self._frame = self._zstd.ZstdDecompressor().decompressobj()
                self._ready = memoryview(self._frame.decompress(packed))
        except self._zstd.ZstdError as error:
            raise _DamagedError(f"Its compressed data are damaged ({error}).") from error
        count = min(len(target), len(self._ready))
        target[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def need(module: str, package: str = "") -> Any:
    """Return an imported module; raises MachineError where its package is not installed.

    package: its name for pip, where that is not the module's.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        what = f"Reading this file needs the package {package}."
        raise MachineError(what, "It is not installed.", f"Type: pip install {package}") from error
