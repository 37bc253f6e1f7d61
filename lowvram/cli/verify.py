"""`lowvram verify`: are the last steps of a run the same to the bit when they are made again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_device, count

if TYPE_CHECKING:
    from lowvram.api.verifying import Verification


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "verify",
        help="are a run's last steps the same to the bit",
        description="Make the steps between the last two checkpoints of RUN again, and compare every tensor, every "
        "number and every step's logged loss with what was saved. RUN is only read, and may be training meanwhile. "
        "Where the same torch, threads, device and plan give other bits, memory or a file was damaged, or the device "
        "does not compute the same twice. The exit code is 0 if all is equal, and 1 if something differs.",
    )
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN", help="a run directory, or the later one of the two checkpoints in it"
    )
    parser.add_argument(
        "--from",
        dest="origin",
        choices=("checkpoint", "start"),
        help="begin at the checkpoint before, or at the run's first step (default: the checkpoint before; where there "
        "is none, the start if that takes at most a minute)",
    )
    parser.add_argument(
        "--steps", type=count, metavar="N", help="repeat at most N steps; of fewer than all only the log is compared"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(parser, "where the run was trained, if that is here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Repeat the steps and say what differs; 0 where nothing does."""
    from lowvram.api.verifying import verify_task
    from lowvram.cli.console import literal
    from lowvram.cli.tasks import run_task

    found = run_task(verify_task(arguments.run_dir, arguments.origin, arguments.steps, arguments.device))
    if arguments.json:
        literal(json.dumps(found.as_dict()))
    else:
        _show(found)
    return 0 if found.is_equal else 1


def _show(found: Verification) -> None:
    from lowvram.cli.console import result
    from lowvram.units import count_of

    repeated = found.last_step - found.first_step
    where = f"{count_of(repeated, 'step')} from step {found.first_step} to step {found.last_step}"
    if found.last_step < found.checkpoint_step:
        verdict = "The log is equal to the bit" if found.is_equal else "Not equal in the log"
        first, last = found.last_step + 1, found.checkpoint_step
        what = f"Step {last} was" if first == last else f"Steps {first} to {last} were"
        left = f"{what} not repeated, so no tensor was compared."
    else:
        verdict = "Equal to the bit" if found.is_equal else "Not equal"
        left = f"{count_of(found.compared_tensors, 'tensor')} of {found.checkpoint} were compared."
    result(f"{verdict}: {where}.", "green" if found.is_equal else "bold red")
    if found.step is not None:
        result(found.step.describe())
    if found.tensor is not None:
        several = f"The first of {found.differing_tensors} tensors that differ is"
        which = several if found.differing_tensors > 1 else "The only tensor that differs is"
        result(f"{which} {found.tensor.describe()}")
        if found.step is None and found.unlogged_steps < repeated:
            result("Every step has its logged loss, so the checkpoint was changed, or only its last update differs.")
    elif found.step is not None and found.last_step == found.checkpoint_step:
        result("Every tensor is equal, so the log was changed, or is of another run.")
    for number in found.numbers:
        result(f"{number.name} is {number.saved!r} in the checkpoint, and {number.repeated!r} now.")
    result(left)
    if found.unlogged_steps:
        result(f"log.jsonl has no row of {count_of(found.unlogged_steps, 'step')} of them.")
    if found.changed_conditions:
        result(f"Not as it was when it was saved, so equality is not promised: {'; '.join(found.changed_conditions)}.")
