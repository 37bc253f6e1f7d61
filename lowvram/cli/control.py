"""`lowvram pause`, `resume` and `stop`: ask a run in another terminal, and say what it answered."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.next_step import next_step

if TYPE_CHECKING:
    from lowvram.storage.control_file import Asks

_SAYS: dict[Asks, tuple[str, str]] = {
    "pause": (
        "let a run that is training save and wait",
        "Let the run that trains in RUN save after the step in progress, and wait until `lowvram resume RUN`. It keeps "
        "its memory, on the card too; `lowvram stop` frees it. Where its process ends meanwhile, the next start trains "
        "as usual.",
    ),
    "resume": ("let a paused run go on", "Let the run in RUN go on that `lowvram pause` has paused."),
    "stop": (
        "let a run that is training save and end",
        "Let the run that trains in RUN save after the step in progress and end with exit code 3, as Ctrl-C in its own "
        "terminal does. `lowvram train RUN.toml` goes on from there.",
    ),
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the three commands."""
    for asks, (short, description) in _SAYS.items():
        parser = commands.add_parser(asks, help=short, description=description)
        parser.add_argument("run_dir", type=Path, metavar="RUN", help="the directory of the run")
        parser.set_defaults(run=run, asks=asks)


def run(arguments: argparse.Namespace) -> None:
    """Ask, and show the answer."""
    from lowvram.api.controlling import control
    from lowvram.cli.console import copyable, result

    answer = control(arguments.run_dir, arguments.asks)
    result(answer.says)
    if arguments.asks == "pause":
        copyable(next_step("resume", arguments.run_dir, why="lets it go on"))
