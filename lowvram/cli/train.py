"""`lowvram train`: start a run, or go on with it; Ctrl-C saves."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.lasting import write_at_once
from lowvram.cli.options import add_device, count

if TYPE_CHECKING:
    import torch

    from lowvram.cli.progress import TrainingScreen
    from lowvram.cli.promise import Promise
    from lowvram.config.plan import Plan, Recompute
    from lowvram.config.run import RunConfig
    from lowvram.train.events import Stopped
    from lowvram.train.log import Log
    from lowvram.train.trainer import Trainer


# The exit code of a run that was stopped by request and saved.
STOPPED = 3
_SWITCH = {"auto": None, "on": True, "off": False}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "train",
        help="start a run, or go on with it",
        description="Train what RUN.toml describes.  Starting and resuming are the same command.  Ctrl-C once saves "
        "and stops; twice stops at once, and the last checkpoint is kept.  SIGTERM and a closed terminal save and "
        "stop, too; under nohup a closed terminal changes nothing.  Where the output cannot be written any more, "
        "training goes on without it.  The exit code is 0 where all tokens were seen, and 3 where the run was stopped "
        "before that and saved.  Every key of RUN.toml: docs/run-file.md.",
    )
    parser.add_argument("run_file", type=Path, metavar="RUN.toml", help="what to learn, from which shards")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value: --set optimizer.lr=3e-4"
    )
    parser.add_argument("--micro-batch", type=count, metavar="N", help="sequences at once (default: chosen, then kept)")
    parser.add_argument(
        "--recompute",
        choices=("none", "attention", "block"),
        help="what backward computes again instead of keeping it (default: chosen, then kept)",
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="compile the blocks (default: tried where a new run is on CUDA, then kept)",
    )
    parser.add_argument(
        "--graphs",
        choices=("auto", "on", "off"),
        default="auto",
        help="play the passes of a micro-batch from CUDA graphs (default: where that is faster and fits)",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Load the run file and train; 0 where all tokens were seen, 3 where the run was stopped before that and saved."""
    from lowvram.cli.ending import say_next
    from lowvram.config.run_file import load_run
    from lowvram.data.hf_tokenizer import load_tokenizer

    what = load_run(arguments.run_file, arguments.set, lambda directory: load_tokenizer(directory).size)
    compiled, recorded = (_SWITCH[word] for word in (arguments.compile, arguments.graphs))
    ended = train(what, arguments.micro_batch, arguments.device, None, arguments.recompute, compiled, recorded)
    say_next(arguments, what, ended)
    return exit_code(ended)


def exit_code(ended: Stopped) -> int:
    """Return how a run that ended without an error tells its shell, so that `train && export` exports no half run."""
    return 0 if ended.is_finished else STOPPED


def train(
    what: RunConfig,
    micro_batch: int | None = None,
    device: str = "auto",
    stop_at: int | None = None,
    recompute: Recompute | None = None,
    compiled: bool | None = None,
    recorded: bool | None = None,
) -> Stopped:
    """Train and show it; returns how it ended.  stop_at: interrupt after this step, as Ctrl-C would."""
    from lowvram.cli.console import bar, notice
    from lowvram.cli.ending import say_verdict
    from lowvram.cli.machine import choose_device
    from lowvram.cli.place import warn_of_precision
    from lowvram.cli.progress import TrainingScreen
    from lowvram.cli.promise import Promise
    from lowvram.errors import MemoryRanOutError
    from lowvram.train.log import open_logs
    from lowvram.train.oom import explain_device_fault
    from lowvram.train.prepare import prepare
    from lowvram.train.start import lock_run, settle_plan

    place = choose_device(device)
    with ExitStack() as stack:
        lock = stack.enter_context(lock_run(what.run.dir))
        promise = Promise(what, place)
        with bar("Looking for the plan that fits"):
            plan, reason, is_kept = settle_plan(
                what.run.dir, what.train, micro_batch, recompute, compiled, promise.choose
            )
        plan = promise.keep_here(plan)
        notice(_describe_size(what, place))
        notice(_describe_plan(plan, reason))
        if is_kept and (doubt := promise.doubt(plan)):
            notice(doubt, "yellow")
        if warning := warn_of_precision(what.train, promise.place.profile):
            notice(warning, "yellow")
        with bar("Checking the shards and building the model"):
            trainer = prepare(what, plan, place)
        trainer.lock = lock
        _tell_of_text(what)
        promise.bind(plan)
        _settle_trials(trainer, promise, compiled, recorded, not is_kept)
        logs = open_logs(what.run.dir, what.run.log)
        for log in logs:
            stack.callback(log.close)
        stack.enter_context(_stop_on_signal(trainer))
        screen = stack.enter_context(TrainingScreen(trainer))
        try:
            ended = _follow(trainer, promise, logs, screen, stop_at)
        except MemoryRanOutError as error:
            raise promise.propose(error, trainer.plan) from error
        except RuntimeError as error:
            fault = explain_device_fault(error, trainer.saved_step)
            if fault is None:
                raise
            raise fault from error
    if ended.is_finished:
        say_verdict(what, trainer.tokenizer, trainer.valid, screen.evaluated)
    return ended


def _follow(
    trainer: Trainer, promise: Promise, logs: list[Log], screen: TrainingScreen, stop_at: int | None
) -> Stopped:
    """Run the trainer, and write, show and compare with the promise what happens."""
    from lowvram.cli.console import notice
    from lowvram.train.events import Halved, Started, StepDone, Stopped
    from lowvram.train.start import keep_plan

    for event in trainer.run():
        if isinstance(event, Started | Halved):
            keep_plan(trainer.what.run.dir, trainer.plan)
            promise.bind(trainer.plan, trainer.recording is not None)
        for log in logs:
            log.write(event)
        screen.show(event)
        if isinstance(event, StepDone):
            if surprise := promise.look(event):
                notice(surprise, "yellow")
            if event.step == stop_at:
                trainer.stop()
    assert isinstance(event, Stopped), "a run's last event is Stopped"
    return event


def _settle_trials(
    trainer: Trainer, promise: Promise, compiled: bool | None, recorded: bool | None, is_new: bool
) -> None:
    """Try what may be faster on this machine, and say why it came out so."""
    from lowvram.cli.console import notice
    from lowvram.train.autotune import settle_compilation, settle_cuda_graphs

    room = promise.room_to_compile(trainer.state.optimizer.bytes_on_device())
    for sentence in settle_compilation(trainer, compiled, is_new, room):
        notice(sentence)
    room = promise.room_to_compile(trainer.state.optimizer.bytes_on_device())
    for sentence in settle_cuda_graphs(trainer, recorded, room):
        notice(sentence)


def _describe_size(what: RunConfig, device: torch.device) -> str:
    from lowvram.hardware.detect import describe_machine

    size = f"{what.model.num_parameters():,} parameters in {what.train.precision}"
    return f"{describe_machine()}: {size} on {device}."


def _describe_plan(plan: Plan, reason: str) -> str:
    from lowvram.units import count_of

    again = "" if plan.recompute == "none" else f", {plan.recompute} computed again in backward"
    moved = ", the optimizer's states in the computer's memory" if plan.offload == "optimizer" else ""
    compiled = ", blocks compiled" if plan.compile else ""
    cut = f"{count_of(plan.micro_batch, 'sequence')} × {plan.accumulate} a step"
    return f"Plan: {cut}{again}{moved}{compiled} ({reason})."


def _tell_of_text(what: RunConfig) -> None:
    """Say how often the text is read, which decides more than anything else what can be learnt from it."""
    from lowvram.cli.console import notice
    from lowvram.fit.epochs import open_text, remark_on

    for remark in remark_on(open_text(what.data), what.model, what.train):
        notice(remark.says, "yellow" if remark.is_warning else "")


# Sent when the terminal closes; on Windows Ctrl-Break, and the closing of the console, are another signal.
_HANG_UP = getattr(signal, "SIGHUP", None)
_BREAK = getattr(signal, "SIGBREAK", None)


@contextmanager
def _stop_on_signal(trainer: Trainer) -> Iterator[None]:
    """Save and end at the first signal; the same one again ends the process without touching a file.

    A terminal that closes may send SIGHUP more than once, and the end of a session SIGTERM and SIGHUP together: these
    are one wish.  SIGHUP that was ignored when the process began, as nohup does, stays ignored.
    """
    asked: set[int] = set()

    def ask(number: int, _frame: object) -> None:
        if number in asked and number != _HANG_UP:
            if sys.__stderr__ is not None and os.isatty(2):
                write_at_once(b"\x1b[?25h")  # the live line has hidden the cursor
            os._exit(130)
        is_first = not asked
        asked.add(number)
        trainer.stop()
        if is_first:
            write_at_once(b"\nStopping: this step is finished and saved first.\nOnce more stops at once, unsaved.\n")

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM, _HANG_UP, _BREAK) if number is not None]
    heard = [number for number in numbers if number != _HANG_UP or signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
