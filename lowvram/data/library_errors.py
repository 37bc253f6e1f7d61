"""Converts what a native library raises as the bare class Exception; knows no library."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from lowvram.errors import LowvramError


class LibraryErrors:
    """Raises the error that `explain` makes of a bare Exception inside the block; narrower exceptions pass through."""

    def __init__(self, explain: Callable[[BaseException], LowvramError]) -> None:
        self._explain = explain

    def __enter__(self) -> None:
        """Do nothing at the start."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Raise the explained error where there is one to explain."""
        if error is not None and kind is Exception:
            raise self._explain(error) from error
