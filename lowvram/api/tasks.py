"""Work that takes a while, as a generator of what a caller may show meanwhile; knows no terminal and no model."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from lowvram.units import count_of

Result = TypeVar("Result")
Level = Literal["detail", "info", "warning"]


@dataclass(frozen=True)
class Notice:
    """A sentence about what was found or chosen.  level: "warning" where the user should do something about it."""

    text: str
    level: Level = "info"


@dataclass(frozen=True)
class Progress:
    """The work that begins or goes on now.  done, total: of one unit, total None where it is not known.

    detail: a few words beside the numbers.
    """

    what: str
    done: float = 0.0
    total: float | None = None
    detail: str = ""


Task = Generator[Notice | Progress, None, Result]


@dataclass
class KeptWork:
    """Tells once how much of resumed work an earlier start had finished.  noun: what is counted."""

    noun: str
    kept: int = 0
    is_told: bool = False

    def count(self, kept: int) -> Iterator[Notice]:
        """Note how much was found up to now; yield the notice when something else follows."""
        if kept > self.kept:
            self.kept = kept
        else:
            yield from self.tell()

    def tell(self) -> Iterator[Notice]:
        """Yield the notice where there is anything to tell and it was not told."""
        if self.kept and not self.is_told:
            self.is_told = True
            yield Notice(f"Going on: {count_of(self.kept, self.noun)} kept from an earlier start.")


def finish(task: Task[Result]) -> tuple[Result, tuple[Notice, ...]]:
    """Run a task to its end, and return its result and the notices that it gave."""
    notices: list[Notice] = []
    while True:
        try:
            event = next(task)
        except StopIteration as end:
            return end.value, tuple(notices)
        if isinstance(event, Notice):
            notices.append(event)


def count_progress(parts: Generator[tuple[int, int], None, Result], what: str) -> Task[Result]:
    """Turn parts of work, as pairs of those that are done and those that there are, into progress."""
    yield Progress(what)
    while True:
        try:
            done, total = next(parts)
        except StopIteration as end:
            return end.value
        yield Progress(what, done, total)
