"""Cuts an open text file into decoded lines, whatever ends them; a line is never longer than a limit; knows no row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from lowvram.data.bad_rows import BadRow
from lowvram.data.encoding import Advice, explain_not_utf8, is_windows_1254
from lowvram.data.text_stream import COPY_BYTES, TextStream
from lowvram.units import show_bytes

# No document is as long: a file of gigabytes without a line end is damaged, or no text.
MOST_LINE_BYTES = 64 << 20
# This much of a file is enough to guess its encoding.
_SAMPLE_BYTES = 1 << 16
_SHOWN_BYTES = 64


class _LongLine(bytes):
    """The beginning of a line that is longer than the limit.  size: its length in bytes."""

    size: int

    @staticmethod
    def of(head: bytes, size: int) -> _LongLine:
        line = _LongLine(head)
        line.size = size
        return line


class LineReader:
    """The lines of one file, one after the other.

    convert: called once with the name of the encoding where lines are not in UTF-8 and it is known for certain.
    """

    def __init__(self, file: Path, stream: TextStream, convert: Callable[[str], None] | None = None) -> None:
        self._file, self._stream, self._convert = file, stream, convert
        self._sample = bytes(stream.bytes.peek(1)[:_SAMPLE_BYTES])
        self._advice: Advice | None = None
        self._is_windows = False
        if stream.encoding != "UTF-8" and convert:
            convert(stream.encoding)

    def read(self) -> Iterator[tuple[bytes, str | BadRow]]:
        """Yield each line as it is in the file, and decoded, or what is wrong with it."""
        offset = 0
        for number, raw in enumerate(cut_lines(self._stream), 1):
            yield raw, self._decode(raw, number, offset)
            offset += raw.size if type(raw) is _LongLine else len(raw)

    def _decode(self, raw: bytes, number: int, offset: int) -> str | BadRow:
        try:
            line = raw.decode("utf-8")
            if "\0" not in line and type(raw) is not _LongLine:
                return line
        except UnicodeDecodeError as error:
            return self._explain(raw, f"{self._file}:{number}", offset, error)
        return self._explain(raw, f"{self._file}:{number}", offset, None)

    def _explain(self, raw: bytes, where: str, offset: int, error: UnicodeDecodeError | None) -> str | BadRow:
        """Return what is wrong with a line, or the line in Windows-1254 where it is that for certain."""
        if isinstance(raw, _LongLine):
            what = f"{where} is a line of {show_bytes(raw.size)}."
            why = f"Lines of more than {show_bytes(MOST_LINE_BYTES)} are no documents; its end is damaged or missing."
            return BadRow("longer than lines may be", what, why, "Mend or delete it.", characters=raw.size)
        if error is not None and b"\0" not in raw:
            if self._is_windows or is_windows_1254(self._sample + raw):
                return self._decode_windows(raw)
            self._advice = self._advice or explain_not_utf8(self._sample + raw)
            what = f"{where} is not UTF-8: byte {offset + error.start} is 0x{raw[error.start]:02x}."
            return BadRow("not UTF-8", what, self._advice.why, self._advice.fix, characters=len(raw))
        what = f"{where} is not text: byte {offset + raw.index(0)} is NUL."
        why = "The file is binary, or text in UTF-16 without its mark, or that line is damaged."
        fix = "Leave it out, mend the line, or convert it to UTF-8: iconv -f UTF-16 -t UTF-8"
        return BadRow("with NUL", what, why, fix, characters=len(raw))

    def _decode_windows(self, raw: bytes) -> str:
        if not self._is_windows:
            self._is_windows = True
            if self._convert:
                self._convert("Windows-1254")
        # The few bytes that mean nothing there become U+FFFD.
        return raw.decode("cp1254", "replace")


def cut_lines(stream: TextStream) -> Iterator[bytes]:
    """Yield the lines of a file with their ends; a CR alone ends a line if the first block has CR but no LF."""
    head = stream.bytes.peek(1)
    return _lines_with_cr(stream) if b"\r" in head and b"\n" not in head else _lines_with_lf(stream)


def _lines_with_lf(stream: TextStream) -> Iterator[bytes]:
    for line in iter(partial(stream.bytes.readline, MOST_LINE_BYTES + 1), b""):
        if len(line) <= MOST_LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        size = len(line)
        head, line = line[:_SHOWN_BYTES], b""
        for rest in iter(partial(stream.bytes.readline, COPY_BYTES), b""):
            size += len(rest)
            if rest.endswith(b"\n"):
                break
        yield _LongLine.of(head, size)


def _lines_with_cr(stream: TextStream) -> Iterator[bytes]:
    parts: list[bytes] = []  # the parts of one line, joined only once, because a line may be many blocks long
    size = 0

    def join() -> bytes:
        return b"".join(parts) if size <= MOST_LINE_BYTES else _LongLine.of(parts[0], size)

    for block in iter(partial(stream.bytes.read1, COPY_BYTES), b""):
        if parts and (parts[-1].endswith(b"\n") or (parts[-1].endswith(b"\r") and not block.startswith(b"\n"))):
            yield join()
            parts, size = [], 0
        first, *lines = block.splitlines(keepends=True)
        parts.append(first)
        size += len(first)
        if size > MOST_LINE_BYTES:
            parts = [parts[0][:_SHOWN_BYTES], first[-1:]]
        if lines:
            yield join()
            yield from lines[:-1]
            parts, size = lines[-1:], len(lines[-1])
    if parts:
        yield join()
