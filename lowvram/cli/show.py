"""How things look in a terminal: results to stdout, progress and notices to stderr, nothing that could harm either."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

# Control characters except newline and tab, C1, bidirectional overrides: a model's text may hold any of them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def clean(text: str) -> str:
    """Return text without the characters that could move a terminal's cursor, recolour it or reorder its letters."""
    return _UNSAFE.sub("", text)


def show_error(text: str) -> None:
    """Print an error as one paragraph."""
    err.print(Text.assemble(("Error: ", "bold red"), clean(text)))


def notice(text: str, style: str = "") -> None:
    """Print a line about what is going on."""
    err.print(Text(clean(text), style))


def result(text: str = "") -> None:
    """Print a line that the user asked for."""
    out.print(Text(clean(text)))


def stream(piece: str) -> None:
    """Print a piece of an answer at once, without a line end."""
    sys.stdout.write(clean(piece))
    sys.stdout.flush()


@contextmanager
def bar(what: str) -> Iterator[ProgressLine]:
    """Show progress of long work while the block runs."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(
        *columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        yield ProgressLine(progress, progress.add_task(what, total=None, said=""))


class ProgressLine:
    """One bar that is told how far the work is."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def tell(self, done: float, total: float | None, said: str = "") -> None:
        """Move the bar; total None: unknown."""
        self._progress.update(self._task, completed=done, total=total, said=said)
