"""`lowvram train --supervise`: one process trains, this one starts it again; `supervision` decides whether and when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from lowvram.cli.console import err, notice
from lowvram.cli.lasting import write_at_once
from lowvram.cli.signals import FROM_SUPERVISOR, heard_signals, means_at_once
from lowvram.errors import DiskFullError, TrainingError
from lowvram.shell import own_command
from lowvram.train.log import JsonlLog
from lowvram.train.supervision import (
    MOST_RESTARTS,
    RECORD,
    Action,
    Began,
    End,
    Ended,
    GiveUp,
    Life,
    Restart,
    count_stalled,
    describe_end,
    device_of,
    newest_step,
    next_action,
    unseen_lives,
)
from lowvram.units import show_duration

_OPTION = "--supervise"
# A process that was asked to end at once gets so long to do it itself.
_AT_ONCE_S = 2.0
# Windows' wait for a process cannot be interrupted by a signal.
_WAIT_S = 0.5 if sys.platform == "win32" else None
_SHOW_CURSOR = b"\x1b[?25h"
# The environment variable in which a process that is supervised finds what the user typed, as a JSON list.
_TYPED = "LOWVRAM_TYPED"


def command_of_child(typed: Sequence[str]) -> list[str]:
    """Return the command that does what was typed, but for `--supervise`, which may be typed shortened."""
    end = list(typed).index("--") if "--" in typed else len(typed)
    shortened = [word for word in typed[:end] if not (len(word) > len("--s") and _OPTION.startswith(word))]
    return [*own_command(Path.cwd()), *shortened, *typed[end:]]


def typed_by_user(typed: Sequence[str]) -> list[str]:
    """Return what the user typed: in a process that a supervisor has started, its command and not this one's."""
    handed_on = os.environ.get(_TYPED)
    return json.loads(handed_on) if handed_on else list(typed)


class _Watch:
    """The process that trains, and the signals that this one has heard.  typed: the words that the user typed."""

    def __init__(self, typed: Sequence[str]) -> None:
        self._typed = list(typed)
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: set[int] = set()

    @property
    def is_asked(self) -> bool:
        """Whether the user has asked for the end."""
        return bool(self._asked)

    def hear(self, number: int, _frame: object) -> None:
        """Pass a request on, once; at its repetition see to it that the process ends."""
        is_last = means_at_once(number, self._asked)
        self._asked.add(number)
        if is_last and self._child is not None:
            killer = threading.Timer(_AT_ONCE_S, self._child.kill)
            killer.daemon = True
            killer.start()
        else:
            self._pass_on()

    def _pass_on(self) -> None:
        # On Windows every process of a console hears what this one hears.
        if self._child is not None and FROM_SUPERVISOR is not None:
            self._child.send_signal(FROM_SUPERVISOR)

    def follow(self, words: Sequence[str]) -> int:
        """Start a process in this terminal, and return its exit code."""
        self._child = subprocess.Popen(words, env={**os.environ, _TYPED: json.dumps(self._typed)})
        if self._asked:  # meanwhile
            self._pass_on()
        while True:
            try:
                code = self._child.wait(_WAIT_S)
                break
            except subprocess.TimeoutExpired:
                continue
        self._child = None
        if code < 0 and err.is_terminal:
            write_at_once(_SHOW_CURSOR)  # a killed live line has left it hidden
        return code

    def wait(self, seconds: float, ordinal: str) -> None:
        """Count down in one line, until the time has passed or the user asks for the end."""
        until_s = time.monotonic() + seconds
        if not err.is_terminal:
            notice(f"It starts again in {show_duration(seconds)} {ordinal}.")
        with err.status("") if err.is_terminal else nullcontext() as line:
            while not self._asked and (left_s := until_s - time.monotonic()) > 0:
                if line is not None:
                    line.update(f"Again in {show_duration(left_s)} {ordinal}; Ctrl-C ends it")
                time.sleep(min(0.2, left_s))


def supervise(words: Sequence[str], run: Path, keeps_device: bool = False, typed: Sequence[str] = ()) -> int:
    """Run a command until it ends for good, and return its exit code.

    run: where its checkpoints are.  keeps_device: add the option --device where a checkpoint says which it was.
    typed: what the user typed, which the process shows as what comes next.
    Raises TrainingError where it was restarted in vain.
    """
    lives, watch = unseen_lives(run / RECORD, newest_step(run)), _Watch(typed)
    if lives and count_stalled(lives) > MOST_RESTARTS:
        why = (
            f"The computer went off or crashed {len(lives)} times in a row while it trained, without a new checkpoint."
        )
        fix = "Look at its power supply and its temperature first. Typed once more, the same command begins."
        _tell(run, lives[-1], GiveUp(why, fix))
        raise TrainingError("The run is not started.", why, fix)
    with heard_signals(watch.hear):
        while True:
            before = newest_step(run)
            _write_down(run, Began(before))
            began_s = time.monotonic()
            device = device_of(run) if keeps_device else None
            code = watch.follow([*words, "--device", device] if device else words)
            lives.append(Life(code, time.monotonic() - began_s, before, newest_step(run)))
            action = next_action(lives, watch.is_asked)
            _tell(run, lives[-1], action)
            if code == 1 and device not in (None, "cpu"):
                notice(f"The run was trained on {device} so far, and --supervise keeps to it; --device cpu moves it.")
            if isinstance(action, Restart):
                watch.wait(action.after_s, f"(restart {action.stalled} of {MOST_RESTARTS} without a checkpoint)")
                action = next_action(lives, True) if watch.is_asked else action
            if isinstance(action, End):
                return action.code
            if isinstance(action, GiveUp):
                raise TrainingError("The run is not started again.", action.why, action.fix)


def _tell(run: Path, life: Life, action: Action) -> None:
    """Say how a process ended, unless it says so itself, and write down what is done now."""
    reason = describe_end(life.code)
    if isinstance(action, Restart):
        saved = "no checkpoint" if life.step_after is None else f"the checkpoint of step {life.step_after}"
        notice(f"Training ended by {reason}, after {show_duration(life.ran_s)}. It goes on from {saved}.", "yellow")
    names = {Restart: "restart", GiveUp: "give up", End: "end"}
    after_s = action.after_s if isinstance(action, Restart) else None
    code = -1 if life.code is None else life.code
    row = Ended(code, reason, round(life.ran_s, 1), life.step_before, life.step_after, names[type(action)], after_s)
    _write_down(run, row)


def _write_down(run: Path, row: Began | Ended) -> None:
    """Add a row to the record; where the run directory is not there yet, or not any more, it is not made."""
    if not run.is_dir():
        return
    try:
        with closing(JsonlLog(run / RECORD)) as record:
            record.write(row)
    except (DiskFullError, OSError) as error:
        notice(f"{run / RECORD} could not be written: {error}", "yellow")
