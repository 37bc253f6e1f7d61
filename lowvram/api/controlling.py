"""Asks a run that another process trains to pause, go on or stop, and waits for its answer; prints nothing."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import psutil

from lowvram.errors import BusyError, ConfigError
from lowvram.storage.control_file import Asks, Request, Status, read_status, withdraw_request, write_request
from lowvram.train.supervision import RECORD, seconds_to_restart
from lowvram.units import show_duration

# How long a run may take to read a request: it looks twice a second, and a busy computer is slow.
HEARD_WITHIN_S = 10.0
# How long a request may take to be carried out before the command says what will happen, and ends.
DONE_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.1
# The state in which a request has been carried out.
_REACHED = {"pause": "paused", "resume": "training", "stop": "ended"}


@dataclass(frozen=True)
class Answer:
    """What a run did, in a sentence.  is_done: whether it is done already, or will be after the step in progress."""

    says: str
    is_done: bool


def control(
    run: Path, asks: Asks, clock: Callable[[], float] = time.monotonic, done_within_s: float = DONE_WITHIN_S
) -> Answer:
    """Ask a run to pause, to resume or to stop, and return what it did.

    run: its directory.  clock: seconds.  Nothing is left behind: a request that the run does not hear is withdrawn.
    Raises ConfigError where there is no such directory or nobody trains in it, BusyError where its process does not
    answer.
    """
    if not run.is_dir():
        raise _explain_run_file(run) if run.suffix == ".toml" and run.is_file() else _explain_no_run(run)
    status = read_status(run)
    if status is None or status.state == "ended" or _is_gone(status):
        raise _explain_nobody(run, status)
    if answer := _answer_at_once(asks, status):
        return answer
    request = Request(start=status.start, asks=asks, id=uuid.uuid4().hex)
    write_request(run, request)
    heard = _wait(run, lambda now: _has_heard(now, request), clock, HEARD_WITHIN_S)
    if heard is None or not _has_heard(heard, request):
        withdraw_request(run, request)
        if heard is None or _is_gone(heard):
            raise _explain_nobody(run, heard)
        raise BusyError(
            f"The run in {run} does not answer.",
            f"Its process {heard.pid} on {heard.host} read no request in {HEARD_WITHIN_S:.0f} s, so it was withdrawn.",
            "It may be stopped (kill -STOP), or its disk not answer; look at it, and ask again.",
        )
    reached = _wait(run, lambda now: _is_done(now, asks), clock, done_within_s)
    return _describe(asks, reached or heard, status)


def _wait(run: Path, holds: Callable[[Status], bool], clock: Callable[[], float], within_s: float) -> Status | None:
    """Return the first status for which a condition holds, or the last one when the time is over."""
    ends_s = clock() + within_s
    while True:
        status = read_status(run)
        if (status is not None and holds(status)) or clock() >= ends_s:
            return status
        sleep(_LOOK_EVERY_S)


def _has_heard(status: Status, request: Request) -> bool:
    """Say whether a run has read a request; a later start has not, nor need it."""
    return status.heard == request.id


def _is_done(status: Status, asks: Asks) -> bool:
    if status.state == "ended":
        return True
    return status.state == _REACHED[asks] and (asks != "pause" or status.is_asked)


def _answer_at_once(asks: Asks, status: Status) -> Answer | None:
    """Return the answer where there is nothing to ask for."""
    is_paused = status.state == "paused"
    if asks == "pause" and is_paused and status.is_asked:
        return Answer(f"It was paused before, at step {status.step}.", True)
    if asks == "stop" or not is_paused:
        return None
    if asks == "resume" and not status.is_asked:
        return Answer(f"Nobody paused it; it waits at step {status.step} all the same. {status.why}", False)
    return None


def _describe(asks: Asks, status: Status, before: Status) -> Answer:
    """Return what a run did.  before: what it said before it was asked."""
    step, is_done = status.step, _is_done(status, asks)
    if status.state == "ended":
        how = "Stopped and saved" if asks == "stop" else "The run has ended"
        return Answer(f"{how} at step {step}.", asks == "stop")
    begins = "as soon as it has started" if status.state == "starting" else "after the step in progress"
    if asks == "pause":
        saved = ", and saved" if step else ", before the first"
        says = f"Paused at step {step}{saved}." if is_done else f"It will pause {begins}."
    elif asks == "stop":
        says = f"It will save and stop {begins}."
    elif is_done:
        was_paused = before.state == "paused"
        says = f"It goes on after step {before.step}." if was_paused else "It trains; it was not paused."
    else:
        says = f"It was resumed, and waits all the same. {status.why or 'It is still starting.'}"
    return Answer(says, is_done)


def _is_gone(status: Status) -> bool:
    """Say whether the process of a status has ended; one on another computer is asked."""
    return status.host == socket.gethostname() and not psutil.pid_exists(status.pid)


def _explain_run_file(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a run file.",
        "A run that trains is asked by its directory, the run.dir in that file.",
        f"Name that one; lowvram train {path} starts or resumes it.",
    )


def _explain_no_run(run: Path) -> ConfigError:
    return ConfigError(
        f"{run} is no run directory." if run.exists() else f"There is no run directory {run}.",
        "A run makes it some seconds after its start; a run file names it as run.dir.",
        "Name that one, or wait until the run has begun.",
    )


def _explain_nobody(run: Path, status: Status | None) -> ConfigError:
    if status is None and not any(run.glob("step-*")) and not (run / "log.jsonl").exists():
        return _explain_no_run(run)
    if seconds := seconds_to_restart(run / RECORD, time.time()):
        return ConfigError(
            f"No process trains in {run} at this moment.",
            f"Its supervisor starts one again in about {show_duration(seconds)}.",
            "Type this again then; Ctrl-C in the supervisor's terminal, or SIGTERM to it, ends it now.",
        )
    ended = f"It ended at step {status.step}." if status is not None and status.state == "ended" else "It has ended."
    return ConfigError(
        f"No run is training in {run}.",
        ended,
        "lowvram train RUN.toml goes on with it, unless all of its tokens were seen.",
    )
