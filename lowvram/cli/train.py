"""`lowvram train`: start or resume a run; Ctrl-C saves it and stops."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.lasting import write_at_once
from lowvram.cli.options import add_device, count
from lowvram.cli.signals import FROM_SUPERVISOR, INTERRUPTED, heard_signals, means_at_once

if TYPE_CHECKING:
    from lowvram.api.training import TrainingRun
    from lowvram.cli.progress import TrainingScreen
    from lowvram.config.plan import Recompute
    from lowvram.config.run import RunConfig
    from lowvram.train.events import Stopped


# The exit code of a run that was stopped by request and saved.
STOPPED = 3
_SWITCH = {"auto": None, "on": True, "off": False}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="start or resume a run",
        description="Train what RUN.toml describes; docs/run-file.md explains every key. Starting and resuming are "
        "the same command. Ctrl-C once saves and stops; twice stops at once, and the last checkpoint is kept. "
        "SIGTERM and a closed terminal save and stop, too; under nohup a closed terminal changes nothing. If the "
        "output cannot be written any more, training goes on without it. The exit code is 0 if all tokens were seen, "
        "and 3 if the run was stopped before that and saved.",
    )
    parser.add_argument("run_file", type=Path, metavar="RUN.toml", help="the run file: model, data, training")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value: --set optimizer.lr=3e-4"
    )
    parser.add_argument(
        "--micro-batch", type=count, metavar="N", help="sequences at a time (default: chosen, then kept)"
    )
    parser.add_argument(
        "--recompute",
        choices=("none", "attention", "block"),
        help="what backward computes again instead of keeping it (default: chosen, then kept)",
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the blocks (default: tried in a new run on CUDA, then kept)",
    )
    parser.add_argument(
        "--graphs",
        choices=("auto", "on", "off"),
        default="auto",
        help="replay the passes of a micro-batch from CUDA graphs (default: if that is faster and fits)",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("data", "tokenizer"),
        help="go on although this has other contents than at the last save; no other run can equal it to the bit then",
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="train in a process of its own, and start it again after exit code 75 and after a crash, with growing "
        "pauses; give up after 5 restarts without a new checkpoint",
    )
    parser.add_argument(
        "--device-check",
        choices=("auto", "on", "off"),
        default="auto",
        help="compare the device with the processor before the first step (default: in a new run that the processor "
        "does not compute)",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the run file and train; 0 where all tokens were seen, 3 where the run was stopped before that and saved."""
    from lowvram.api.training import PlanOptions, read_run_file
    from lowvram.cli.ending import show_next_steps
    from lowvram.cli.supervise import command_of_child, supervise, typed_by_user

    switches = [_SWITCH[word] for word in (arguments.compile, arguments.graphs, arguments.device_check)]
    asked = PlanOptions(arguments.micro_batch, arguments.recompute, *switches)
    what = read_run_file(arguments.run_file, arguments.set, asked)
    if arguments.supervise:
        words, is_chosen = command_of_child(arguments.typed), arguments.device != "auto"
        return supervise(words, what.run.dir, not is_chosen, arguments.typed)
    compiled, recorded, checked = switches
    options = (arguments.micro_batch, arguments.device, None, arguments.recompute, compiled, recorded, checked)
    ended = train(what, *options, arguments.allow)
    arguments.typed = typed_by_user(arguments.typed)
    show_next_steps(arguments, what, ended)
    return exit_code(ended)


def exit_code(ended: Stopped) -> int:
    """Return the exit code of a run without an error, so that `train && export` exports no unfinished run."""
    return 0 if ended.is_finished else STOPPED


def train(
    what: RunConfig,
    micro_batch: int | None = None,
    device: str = "auto",
    stop_at: int | None = None,
    recompute: Recompute | None = None,
    compiled: bool | None = None,
    recorded: bool | None = None,
    checked: bool | None = None,
    allow: Sequence[str] = (),
) -> Stopped:
    """Train and show it; returns how it ended.  stop_at: interrupt after this step, as Ctrl-C would."""
    from lowvram.api.training import PlanOptions, TrainingRun, prepare_run
    from lowvram.cli.ending import show_verdict
    from lowvram.cli.progress import TrainingScreen
    from lowvram.cli.tasks import run_task

    asked = PlanOptions(micro_batch, recompute, compiled, recorded, checked)
    prepared = run_task(prepare_run(what, device, asked, allow))
    trainer = prepared.trainer
    with TrainingRun(prepared) as run, _stop_on_signal(run), TrainingScreen(trainer) as screen:
        ended = _follow(run, screen, stop_at)
    if ended.is_finished:
        show_verdict(what, trainer.tokenizer, trainer.valid, screen.evaluated)
    return ended


def _follow(run: TrainingRun, screen: TrainingScreen, stop_at: int | None) -> Stopped:
    """Train, and show what happens."""
    from lowvram.api.tasks import Notice
    from lowvram.cli.tasks import tell
    from lowvram.train.events import StepDone, Stopped

    ended: Stopped | None = None
    for event in run:
        if isinstance(event, Notice):
            tell(event)
            continue
        screen.show(event)
        if isinstance(event, StepDone) and event.step == stop_at:
            run.stop()
        if isinstance(event, Stopped):
            ended = event
    assert ended is not None, "a run's last event is Stopped"
    return ended


@contextmanager
def _stop_on_signal(run: TrainingRun) -> Iterator[None]:
    """Save and end at the first signal; the same one again ends the process without touching a file.

    A terminal that closes may send SIGHUP more than once, and the end of a session SIGTERM and SIGHUP together: these
    count as one request.
    """
    asked: set[int] = set()

    def ask(number: int, _frame: object) -> None:
        if means_at_once(number, asked):
            if sys.__stderr__ is not None and os.isatty(2):
                write_at_once(b"\x1b[?25h")  # the live line has hidden the cursor
            saved = run.trainer.saved_step
            goes_on = "nothing had been saved" if saved is None else f"the same command goes on from step {saved}"
            write_at_once(f"\nStopped at once, without saving; {goes_on}.\n".encode())
            os._exit(INTERRUPTED)
        is_first = not asked
        asked.add(number)
        run.stop()
        if is_first:
            write_at_once(
                b"\nStopping: this step is finished and saved first.\nOnce more stops at once, without saving.\n"
            )

    try:
        with heard_signals(ask):
            yield
    finally:
        if asked and FROM_SUPERVISOR is not None:
            # On a busy machine a supervisor may pass on a request that has been carried out meanwhile.
            signal.signal(FROM_SUPERVISOR, signal.SIG_IGN)
