"""`lowvram compare`: runs on the same documents, with intervals, and no winner within them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.next_step import next_step
from lowvram.cli.options import TEXTS, add_device, add_field, add_precision, count, device_words

if TYPE_CHECKING:
    from lowvram.evaluate.comparison import Comparison, Recipe


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="which of several runs is better, and how certain that is",
        description="Compare runs by bits per byte of the same documents, which may have other tokenizers.  The "
        "interval of a difference comes from drawing documents anew, each paired with itself, and no winner is "
        "named where it contains 0.  Runs of as many steps that differ in train.seed alone are one recipe; with "
        "fewer than three seeds of each, the interval says nothing of how a recipe would do again.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or their step-… folders")
    text = f"{TEXTS} (default: what the first run holds out)"
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", action="extend", help=text)
    parser.add_argument("--items", type=count, metavar="N", help="only N documents, evenly spread (default: all)")
    add_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_precision(parser, "what each run validates in")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare and print."""
    from lowvram.api.comparing import compare_task
    from lowvram.cli.console import literal
    from lowvram.cli.tasks import run_task

    given = (arguments.items, arguments.field, arguments.precision, arguments.device)
    found = run_task(compare_task(arguments.runs, tuple(arguments.text or ()), *given))
    if arguments.json:
        literal(json.dumps(found.as_dict()))
        return
    _show(found.comparison)
    best = found.comparison.recipes[0].runs[0]
    literal(next_step("evaluate", best, *device_words(arguments), why="measure the best one"))


def _show(found: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text as Cell

    from lowvram.cli.console import clean, lay_out, result
    from lowvram.evaluate.comparison import describe_difference

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("recipe", "seeds", "bits per byte", "seed to seed", "more than the best", "95 %"):
        table.add_column(
            name, justify="left" if name == "recipe" else "right", overflow="fold", no_wrap=name != "recipe"
        )
    for place, recipe in enumerate(found.recipes):
        spread = f"{min(recipe.of_runs):.4f}–{max(recipe.of_runs):.4f}" if len(recipe.runs) > 1 else "–"
        cells = [_name(recipe), str(len(recipe.runs)), f"{recipe.bits_per_byte:.4f}", spread]
        if place:
            difference = found.differences[place - 1]
            interval = difference.interval
            cells += [f"{difference.bits_per_byte:+.4f}", f"{interval.low:+.4f} to {interval.high:+.4f}"]
        table.add_row(*(Cell(clean(cell)) for cell in cells))
    lay_out(table, is_folded=True)
    result(f"{found.documents:,} documents of {found.text_bytes:,} bytes, each read alone.")
    for difference in found.differences:
        result(describe_difference(difference, (_name(difference.best), _name(difference.other))))


def _name(recipe: Recipe) -> str:
    return _join([str(path) for path in recipe.runs])


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
