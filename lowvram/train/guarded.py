"""Holds a run between two steps: it slows or waits where its guard or another terminal asks for it; knows no sensor."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from time import sleep

from lowvram.train.control import Control
from lowvram.train.events import Event, Paused, Resumed, Slowed
from lowvram.train.guard import Go, Guard, Slow, Verdict, Wait
from lowvram.train.saver import RunSaver

# A run that waits asks so often whether it may go on; one that is slowed looks as often whether it is to stop.
ASKED_EVERY_S = 0.5
_ASKED = Wait("asked", "It was asked to by lowvram pause.", "by lowvram pause")
# Steps of whose times the shortest is taken: the others may hold a validation or a save.
_TIMED_STEPS = 5


@dataclass
class GuardedRun(RunSaver):
    """A run that slows and waits between two steps, and computes the same as one that does not.

    guard, control: None where nothing is watched, and nobody is heard.  held_by: why the run waits or is slowed, in a
    few words, "" where neither is so; other threads may read it at any time.
    """

    guard: Guard | None = None
    control: Control | None = None
    held_by: str = field(default="", init=False)
    _is_slowed: bool = field(default=False, init=False)
    _step_times_s: list[float] = field(default_factory=list, init=False)
    _held_at: tuple[int, float] = field(default=(-2, 0.0), init=False)

    def _read_step(self) -> Generator[Event, None, bool]:
        """Read the numbers of the step that was launched last."""
        raise NotImplementedError

    def _hold(self) -> Iterator[Event]:
        """Return when the next step may begin, or the run is to stop."""
        if self.guard is None and self.control is None:
            return
        if self._is_slowed:  # else only the launch of the step would be timed, and the card work on in the pause
            yield from self._read_step()
        self._time_step()
        verdict = self._ask()
        if isinstance(verdict, Wait):
            yield from self._wait(verdict)
            verdict = Go() if self._stopping else self._ask()
        if isinstance(verdict, Slow):
            yield from self._slow(verdict)
        elif self._is_slowed:
            self._is_slowed, self.held_by = False, ""
            yield Slowed(self.state.step, "")
        self._held_at = (self.state.step, time.monotonic())

    def _ask(self) -> Verdict:
        if self.control is not None and self.control.is_pause_asked:
            return _ASKED
        return Go() if self.guard is None else self.guard.ask(min(self._step_times_s, default=0.0))

    def _time_step(self) -> None:
        step, began = self._held_at
        if self.state.step == step + 1:
            self._step_times_s = [*self._step_times_s[1 - _TIMED_STEPS :], time.monotonic() - began]

    def _slow(self, verdict: Slow) -> Iterator[Event]:
        yield from self._read_step()
        self.held_by = verdict.why
        if not self._is_slowed:
            self._is_slowed = True
            yield Slowed(self.state.step, verdict.why)
        ends_at = time.monotonic() + verdict.pause_s
        while not self._stopping and not (self.control is not None and self.control.is_pause_asked):
            left_s = ends_at - time.monotonic()
            if left_s <= 0:
                break
            sleep(min(left_s, ASKED_EVERY_S))

    def _wait(self, verdict: Wait) -> Iterator[Event]:
        """Save what is new, and wait until the run may go on or is to stop."""
        yield from self._read_step()
        yield from self._end_save()
        if self.state.step not in (0, self._saved_step) and not self.state.skipped_in_row:
            yield from self._save()
        began = time.monotonic()
        yield self._pause(verdict)
        while not self._stopping:
            sleep(ASKED_EVERY_S)
            if self._stopping:
                break
            self._refuse_lost_lock()
            now = self._ask()
            if not isinstance(now, Wait):
                yield Resumed(self.state.step, time.monotonic() - began)
                break
            if now.cause != verdict.cause:
                verdict = now
                yield self._pause(verdict)
            self.held_by = now.brief
        self.held_by = ""
        self._pace.begin(self.state.tokens)

    def _pause(self, verdict: Wait) -> Paused:
        self.doing, self.held_by = "paused", verdict.brief
        return Paused(self.state.step, verdict.why, verdict.cause)
