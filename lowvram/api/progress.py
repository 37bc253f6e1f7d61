"""A progress bar around work of this package, in a terminal or a notebook; only on request (`progress=True`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lowvram.api.tasks import Notice, Result, Task, finish
from lowvram.api.tasks import Progress as Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress

    from lowvram.train.events import Event


def carry_out(task: Task[Result], progress: bool) -> tuple[Result, tuple[Notice, ...]]:
    """Run a task to its end; return its result and its notices.  progress: whether to show a progress bar."""
    return finish(with_bar(task) if progress else task)


def with_bar(task: Task[Result]) -> Task[Result]:
    """Do a task and show its progress; yields and returns what the task does."""
    with _open_bar() as bar:
        number = bar.add_task("", total=None)
        while True:
            try:
                event = next(task)
            except StopIteration as end:
                return end.value
            if isinstance(event, Work):
                bar.update(number, description=event.what, completed=event.done, total=event.total)
            yield event


def with_step_bar(events: Generator[Event | Notice, None, None], steps: int) -> Generator[Event | Notice, None, None]:
    """Train and show the step, the loss and the time that is left; yields the run's events.

    steps: of the whole run.
    """
    from lowvram.train.events import StepDone
    from lowvram.units import show_duration

    with _open_bar() as bar:
        number = bar.add_task("Training", total=steps)
        for event in events:
            if isinstance(event, StepDone):
                says = f"step {event.step}/{steps}  loss {event.loss:.3f}  {show_duration(event.left_s)} left"
                bar.update(number, description=says, completed=event.step)
            yield event


@contextmanager
def _open_bar() -> Iterator[Progress]:
    """Show a bar while the block runs; nothing where neither a terminal nor a notebook can show one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(stderr=True)
    # In a notebook rich needs ipywidgets, and warns in each cell where it is missing.
    can_show = importlib.util.find_spec("ipywidgets") is not None if console.is_jupyter else console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=console, transient=True, disable=not can_show) as bar:
        yield bar
