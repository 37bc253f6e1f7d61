"""Decides whether a training process that ended is started again, and when; starts none, and knows no clock."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowvram.storage.json_files import JsonError, read_object
from lowvram.storage.manifest import MANIFEST, NUMBERS, list_checkpoints, step_of
from lowvram.train.conditions import KEY, device_kind
from lowvram.units import show_duration

# Before the first, second, … restart; the last one stays.
PAUSES_S = (10.0, 30.0, 60.0, 300.0, 900.0)
# After a process that trained so long and saved, the pauses begin anew.
SETTLED_S = 3600.0
# In a row, without a new checkpoint between them.
MOST_RESTARTS = 5
RECORD = "supervisor.jsonl"
# From the start of a process until its own row is in the record.
_BEGINS_WITHIN_S = 5.0

_ERROR, _FAULT, _INTERRUPTED = 1, 75, 130
# Finished, wrong usage, stopped by request and saved, interrupted by request.
_FINAL = (0, 2, 3, _INTERRUPTED)
# Signals that ask a program to end.  One that has not begun yet has no handler for them, and dies of them.
_REQUESTS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
# Of Windows (NTSTATUS): the console was closed or Ctrl-C pressed; and what crashes are called there.
_CLOSED_ON_WINDOWS = 0xC000013A
_CRASHES_ON_WINDOWS = {0xC0000005: "access violation", 0xC00000FD: "stack overflow", 0xC0000409: "abort"}
_OF_SIGNALS = {
    "SIGKILL": "the system does that where memory runs out",
    "SIGSEGV": "a driver or a library crashed",
    "SIGBUS": "a file that was being read became shorter, or a drive failed",
    "SIGABRT": "a driver or a library gave up",
}


@dataclass(frozen=True)
class Life:
    """One training process, from its start to its end.

    code: its exit code; below zero the number of the signal that killed it; None where nobody saw its end, because the
    computer went off.  step_before, step_after: the newest checkpoint's, None where there was none.
    """

    code: int | None
    ran_s: float
    step_before: int | None
    step_after: int | None

    @property
    def has_saved(self) -> bool:
        """Say whether there is a newer checkpoint than before."""
        return self.step_after is not None and self.step_after > (self.step_before or 0)

    @property
    def has_lost_all(self) -> bool:
        """Say whether there were checkpoints before it and none are left."""
        return self.step_before is not None and self.step_after is None


@dataclass(frozen=True)
class Restart:
    """Start the same command again.  stalled: restarts in a row without a new checkpoint, this one included."""

    after_s: float
    stalled: int


@dataclass(frozen=True)
class GiveUp:
    """Start it no more.  why: the reason, in a sentence; fix: what the user can do."""

    why: str
    fix: str


@dataclass(frozen=True)
class End:
    """End as the process did.  code: the exit code."""

    code: int


Action = Restart | GiveUp | End


@dataclass(frozen=True)
class Began:
    """A row of the record: a process is started.  step: the newest checkpoint's."""

    step: int | None


@dataclass(frozen=True)
class Ended:
    """A row of the record: a process ended, why, and what is done now ("restart", "give up" or "end")."""

    code: int
    reason: str
    ran_s: float
    step_before: int | None
    step_after: int | None
    action: str
    after_s: float | None


def next_action(lives: Sequence[Life], is_asked: bool = False) -> Action:
    """Return what to do after the last of these processes, oldest first.

    is_asked: the user has asked for the end.  Exit code 1 is an error that the user can repair, and final, but for two
    cases: after a new checkpoint it is tried once more, since an unforeseen error exits so, too; and after a fault it
    counts as one, since a card or a drive may need minutes to come back.
    """
    last = lives[-1]
    is_killed_on_request = last.code is not None and _signal_of(last.code) in _REQUESTS
    if is_killed_on_request or last.code == _CLOSED_ON_WINDOWS:
        return End(_INTERRUPTED)
    if is_asked:
        return End(last.code if last.code in (*_FINAL, _ERROR, _FAULT) else _INTERRUPTED)
    if last.code in _FINAL or (last.code == _ERROR and not last.has_saved and _only_errors(lives)):
        return End(last.code)
    if last.has_lost_all:
        return GiveUp(
            "Its checkpoints are gone, and a new process would begin at the first step.",
            "If the run directory was renamed, give it its name back, then type the same command again.",
        )
    stalled = count_stalled(lives)
    if stalled > MOST_RESTARTS:
        return GiveUp(
            f"It was started {MOST_RESTARTS} times in a row without saving a new checkpoint; "
            f"the last process ended by {describe_end(last.code)}, after {show_duration(last.ran_s)}.",
            "Read what it wrote before it ended, repair that, and type the same command again.",
        )
    settled = [place for place, life in enumerate(lives) if life.has_saved and life.ran_s >= SETTLED_S]
    restarts = len(lives) - 1 - (settled[-1] if settled else 0)
    return Restart(PAUSES_S[min(restarts, len(PAUSES_S) - 1)], stalled)


def count_stalled(lives: Sequence[Life]) -> int:
    """Return the number that the next restart would have among those without a new checkpoint."""
    stalled = 1
    for life in reversed(lives[1:]):
        if life.has_saved:
            break
        stalled += 1
    return stalled


def _only_errors(lives: Sequence[Life]) -> bool:
    """Say whether every process since the last new checkpoint ended by an error, and none by a fault."""
    saved = max((place for place, life in enumerate(lives) if life.has_saved), default=0)
    return all(life.code == _ERROR for life in lives[saved:])


def describe_end(code: int | None) -> str:
    """Return how a process ended, in words."""
    if code is None:
        return "a power cut, a crash of the system or a kill of the supervisor"
    if name := _signal_of(code):
        meaning = _OF_SIGNALS.get(name)
        return f"{name} ({meaning})" if meaning else name
    if code == _FAULT:
        return f"exit code {code} (a fault of the device)"
    if code == _ERROR:
        return f"exit code {code} (an error)"
    crash = _CRASHES_ON_WINDOWS.get(code)
    return f"exit code {code:#x} ({crash})" if crash else f"exit code {code}"


def _signal_of(code: int) -> str | None:
    """Return the name of the signal that a negative exit code means."""
    if code >= 0:
        return None
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def newest_step(run: Path) -> int | None:
    """Return the step of the newest checkpoint of a run directory, by its name; None where there is none."""
    newest = _newest_checkpoint(run)
    return None if newest is None else step_of(newest)


def device_of(run: Path) -> str | None:
    """Return the kind of device on which the newest checkpoint of a run was trained; None where that is not known.

    Without it a run whose card does not answer would go on, a hundred times slower, on the processor.
    """
    newest = _newest_checkpoint(run)
    if newest is None:
        return None
    try:
        return device_kind(read_object(newest / NUMBERS).get(KEY))
    except (OSError, JsonError):
        return None


def _newest_checkpoint(run: Path) -> Path | None:
    return next((path for path in list_checkpoints(run) if (path / MANIFEST).is_file()), None)


def seconds_to_restart(record: Path, now_s: float) -> float:
    """Return in how many seconds a process is started again, by the last row of a record; 0 where none waits for that.

    now_s: the Unix time.
    """
    try:
        row = json.loads(record.read_text(encoding="utf-8", errors="replace").splitlines()[-1])
        if row["event"] != "Ended" or row["action"] != "restart":
            return 0.0
        left_s = float(row["time_s"]) + float(row["after_s"]) - now_s
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0
    return max(1.0, left_s) if left_s > -_BEGINS_WITHIN_S else 0.0


def unseen_lives(record: Path, step: int | None) -> list[Life]:
    """Return the processes at the end of a record of which nobody saw the end: the computer went off, or crashed.

    step: the newest checkpoint's now.  A computer that switches off under load would otherwise be restarted for ever.
    """
    steps: list[int | None] = []
    try:
        lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a power cut may tear the last row
        if not isinstance(row, dict) or row.get("event") not in ("Began", "Ended"):
            continue
        if row["event"] == "Ended":
            steps = []
            continue
        began_at = row.get("step")
        steps.append(began_at if isinstance(began_at, int) else None)
    return [Life(None, 0.0, before, after) for before, after in zip(steps, [*steps[1:], step], strict=False)]
