"""Runs a generator to its end for the value that it returns; knows no work."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

_Result = TypeVar("_Result")


def finish(work: Generator[Any, None, _Result]) -> _Result:
    """Return what a generator returns; what it yields on the way, such as its progress, is dropped."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: _Result = end.value
            return result
