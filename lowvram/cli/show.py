"""How things look in a terminal: results to stdout, progress and notices to stderr, nothing that could harm either."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from lowvram.train.trainer import Evaluated, Event, Sampled, Saved, Started, StepDone, Stopped
from lowvram.units import show_bytes, show_count, show_duration

# Control characters except newline and tab, C1, bidirectional overrides: a model's text may hold any of them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# Without a terminal a progress line would fill a log file; one of them every so often is enough.
QUIET_INTERVAL_S = 30.0

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


class TrainingScreen:
    """Turns a trainer's events into lines: one live line for steps, and a lasting one for everything else."""

    def __init__(self, steps: int) -> None:
        self._steps, self._told_at = steps, 0.0
        columns = (BarColumn(bar_width=24), TextColumn("{task.fields[said]}"))
        self._progress = Progress(
            *columns, console=err, transient=True, refresh_per_second=4, disable=not err.is_terminal
        )
        self._task = self._progress.add_task("", total=steps, said="")
        self._last: StepDone | None = None

    def __enter__(self) -> TrainingScreen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, Started):
            for problem in event.passed_over:
                notice(f"Passed over a corrupt checkpoint: {problem}", "yellow")
            if event.resumed_from:
                notice(f"Going on from {event.resumed_from} (step {event.step} of {event.steps}).")
        elif isinstance(event, Evaluated):
            notice(f"step {event.step:>6}  valid {event.bits_per_byte:.4f} bits/byte  (loss {event.loss:.4f})", "cyan")
        elif isinstance(event, Sampled):
            text = " ".join(f"{event.prompt}│{event.text}".split("\n"))
            notice(f"step {event.step:>6}  {text}", "dim")
        elif isinstance(event, Saved):
            notice(f"step {event.step:>6}  saved {event.directory} ({event.took_s:.1f} s)", "dim")
        elif isinstance(event, Stopped):
            self._show_end(event)

    def _show_step(self, event: StepDone) -> None:
        if event.is_skipped:
            notice(f"step {event.step:>6}  skipped: its gradients were not finite", "yellow")
        self._last = event
        self._progress.update(self._task, completed=event.step, said=step_line(event, self._steps))
        if not err.is_terminal and time.monotonic() - self._told_at > QUIET_INTERVAL_S:
            self._told_at = time.monotonic()
            notice(step_line(event, self._steps))

    def _show_end(self, event: Stopped) -> None:
        self._progress.update(self._task, visible=False)
        if self._last is not None:
            notice(step_line(self._last, self._steps))
        if event.is_finished:
            notice("All tokens were seen.", "green")
        else:
            notice(f"Stopped after step {event.step}; the same command goes on from here.", "green")


def step_line(event: StepDone, steps: int) -> str:
    """Return the live line of a step."""
    return (
        f"step {event.step}/{steps}  loss {event.loss:.3f}  {show_count(event.tokens_per_second)} tok/s  "
        f"{show_bytes(event.memory_bytes)}  {show_duration(event.left_s)} left"
    )
