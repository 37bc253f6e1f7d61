"""A task of lowvram.api in the terminal: its notices as lines, its progress as a bar."""

from __future__ import annotations

from contextlib import ExitStack, closing

from lowvram.api.tasks import Level, Notice, Progress, Result, Task
from lowvram.cli.console import ProgressLine, bar, notice
from lowvram.cli.spelling import as_options

STYLES: dict[Level, str] = {"detail": "dim", "info": "", "warning": "yellow"}


def tell(said: Notice) -> None:
    """Print a notice, with options where it names arguments."""
    notice(as_options(said.text), STYLES[said.level])


def run_task(task: Task[Result]) -> Result:
    """Run a task, show what it yields, and return its result."""
    with closing(task), ExitStack() as shown:
        line: ProgressLine | None = None
        what = ""
        while True:
            try:
                event = next(task)
            except StopIteration as end:
                return end.value
            if isinstance(event, Progress) and line is not None and event.what == what:
                line.tell(event.done, event.total, event.detail)
                continue
            shown.close()
            line = None
            if isinstance(event, Notice):
                tell(event)
            else:
                line, what = shown.enter_context(bar(event.what)), event.what
