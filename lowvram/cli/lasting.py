"""A stderr that cannot be written any more must not end the work: after its first failure it is silent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


class LastingStream:
    """A text stream that drops what cannot be written (closed pipe or terminal, full disk); all else is the stream's.

    After the first failure the stream's descriptor leads to the null device, so that what is buffered cannot fail
    again, neither here nor when the interpreter ends.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_lost = False

    def write(self, text: str) -> int:
        """Write the text, or drop it if it cannot be written."""
        if not self._is_lost:
            try:
                return self._stream.write(text)
            except OSError:
                self._lose()
        return len(text)

    def flush(self) -> None:
        """Flush, unless the stream is lost."""
        if not self._is_lost:
            try:
                self._stream.flush()
            except OSError:
                self._lose()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self) -> None:
        self._is_lost = True
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except OSError:
            return  # a stream without a descriptor has nothing buffered below it


@contextmanager
def lasting_stderr() -> Iterator[None]:
    """Let no command end because stderr cannot be written; a stdout that cannot be written is still an error."""
    before = sys.stderr
    if before is None:  # closed by the process that started this one
        yield
        return
    sys.stderr = LastingStream(before)
    try:
        yield
    finally:
        sys.stderr = before


def write_at_once(text: bytes) -> None:
    """Write to the error output from a signal handler: not through buffers, which the signal may have interrupted."""
    if sys.__stderr__ is None:
        return  # its descriptor may be any other file by now
    try:
        os.write(2, text)
    except OSError:
        return  # the terminal is gone
