"""Output in the terminal: results to stdout, progress and notices to stderr, without characters that could harm it."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from lowvram.cli.spelling import as_options
from lowvram.cli.wrapping import WordWrap, wrap_words
from lowvram.units import show_duration

# Control characters except newline and tab, C1, bidirectional overrides, and tags, which show nothing and carry words
# to wherever the text is pasted: a model's text may hold any of them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]")

_BOUNDLESS = 1_000
# How often progress is printed where no terminal shows a bar; short work prints none.
PLAIN_EVERY_S = 15.0
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def clean(text: str) -> str:
    """Return text without the characters that could move a terminal's cursor, recolour it or reorder its letters."""
    return _UNSAFE.sub("", text)


def escape(text: str) -> str:
    """Return text with the number of each character that `clean` takes out in its place."""

    def write_number(match: re.Match[str]) -> str:
        return json.dumps(match[0])[1:-1]

    return _UNSAFE.sub(write_number, text)


def quote(value: object) -> str:
    """Return JSON that keeps letters as they are, and of what `clean` takes out the number."""
    return escape(json.dumps(value, ensure_ascii=False, indent=1))


def show_error(text: str) -> None:
    """Print an error as one paragraph, with options where it names arguments."""
    words = Text(_wrap(f"Error: {clean(as_options(text))}", err))
    words.stylize("bold red", 0, len("Error:"))
    err.print(words)


def notice(text: str, style: str = "") -> None:
    """Print a notice; a terminal breaks it between words."""
    err.print(Text(_wrap(clean(text), err), style))


def result(text: str = "", style: str = "") -> None:
    """Print a line that the user asked for; a terminal breaks it between words."""
    out.print(Text(_wrap(clean(text), out), style))


def written(text: str) -> None:
    """Print what a model wrote, as it is; a terminal breaks it between words."""
    out.print(Text(_wrap(clean(text), out)))


def literal(text: str, style: str = "") -> None:
    """Print a result that is copied or parsed, such as a command or an object: no line break is added anywhere."""
    out.print(Text(clean(text), style))


def copyable(text: str, style: str = "") -> None:
    """Print a command that is no result, of a command whose results are files: to stderr, and without line breaks."""
    err.print(Text(clean(text), style))


def _wrap(text: str, console: Console) -> str:
    return wrap_words(text, console.width) if console.file.isatty() else text


def table_width(table: Table) -> int:
    """Return how wide a table would be where nothing is folded."""
    return Measurement.get(out, out.options.update_width(_BOUNDLESS), table).maximum


def tabulate(names: Sequence[str], rows: Iterable[Sequence[str | Text]], gap: int = 2) -> Table:
    """Return a table whose first column is text, which a narrow window folds, and whose others are numbers.

    gap: blanks between columns.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, gap), header_style="bold")
    for place, name in enumerate(names):
        table.add_column(Text(clean(name)), justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(clean(cell)) if isinstance(cell, str) else cell for cell in row))
    return table


def lay_out(table: Table, is_folded: bool = False) -> None:
    """Print a table in its own width.

    is_folded: a window narrower than that folds it.  A pipe has no width, and rich would take it for 80 columns.
    """
    width = table_width(table)
    if is_folded and out.is_terminal:
        width = min(width, out.width)
    out.print(Segments(out.render(table, out.options.update_width(width))), soft_wrap=True, end="")


class AnswerStream:
    """An answer on the screen while it is written: a terminal breaks its lines between words, a pipe gets it as it is.

    indent: blanks before each line that a terminal adds.
    """

    def __init__(self, indent: int = 0) -> None:
        self._file = out.file  # rich's null file where stdout is closed
        self._wrap = WordWrap(out.width, indent) if self._file.isatty() else None

    def write(self, piece: str) -> None:
        """Print a piece; on a terminal a word is printed when it has ended."""
        piece = clean(piece)
        self._file.write(self._wrap.push(piece) if self._wrap else piece)
        self._file.flush()

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._file.write((self._wrap.end() if self._wrap else "") + "\n")
        self._file.flush()


@contextmanager
def bar(what: str) -> Iterator[ProgressLine]:
    """Show the progress of long work while the block runs; without a terminal, as a plain line from time to time."""
    if not err.is_terminal:
        with _plain_lines(what) as line:
            yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
        task = progress.add_task(what, total=None, said="")

        def show(done: float, total: float | None, said: str) -> None:
            progress.update(task, completed=done, total=total, said=said)

        yield ProgressLine(show)


@contextmanager
def _plain_lines(what: str) -> Iterator[ProgressLine]:
    """Print the progress now and then, from a thread, because native code does not call back while it works."""
    started, finished = time.monotonic(), threading.Event()
    state: tuple[float, float | None, str] = (0.0, None, "")

    def keep(done: float, total: float | None, said: str) -> None:
        nonlocal state
        state = (done, total, said)

    def speak() -> None:
        while not finished.wait(PLAIN_EVERY_S):
            done, total, said = state
            share = f"{done / total:.0%}" if total else ""
            words = ", ".join(filter(None, (share, said, show_duration(time.monotonic() - started))))
            notice(f"{what}: {words}")

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield ProgressLine(keep)
    finally:
        finished.set()
        speaker.join()


class ProgressLine:
    """One progress bar."""

    def __init__(self, show: Callable[[float, float | None, str], None]) -> None:
        self._show = show

    def tell(self, done: float, total: float | None, said: str = "") -> None:
        """Move the bar; total None: unknown."""
        self._show(done, total, said)
