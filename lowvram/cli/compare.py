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
    from rich.table import Table

    from lowvram.evaluate.comparison import Comparison


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "compare",
        help="which of several runs is better, and how certain that is",
        description="Compare runs by bits per byte of the same documents, which may have other tokenizers. The "
        "interval of a difference comes from drawing documents anew, each paired with itself, and no winner is "
        "named where it contains 0. Runs of as many steps that differ in train.seed alone are one recipe; with "
        "fewer than three seeds of each, the interval says nothing of how a recipe would do again. Of one recipe "
        "alone the spread of its seeds is told.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or their step-… folders")
    text = f"{TEXTS}; a mix for what it holds out (default: what the first run holds out)"
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
    from lowvram.cli.console import lay_out, out, result, table_width
    from lowvram.evaluate.comparison import describe_difference, describe_seeds

    names = [_join([str(path) for path in recipe.runs]) for recipe in found.recipes]
    if out.is_terminal and table_width(_tabulate(found, names)) > out.width:
        letters = [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(names))]
        for letter, recipe in zip(letters, found.recipes, strict=True):
            for place, path in enumerate(recipe.runs):
                result(f"{'' if place else letter:2} {path}")
        result()
        names = letters
    lay_out(_tabulate(found, names), is_folded=True)
    result(f"{found.documents:,} documents of {found.text_bytes:,} bytes, each read alone.")
    for difference in found.differences:
        best, other = (names[found.recipes.index(recipe)] for recipe in (difference.best, difference.other))
        result(describe_difference(difference, (best, other)))
    if not found.differences:
        result(describe_seeds(found.recipes[0]))


def _tabulate(found: Comparison, names: Sequence[str]) -> Table:
    from lowvram.cli.console import tabulate

    heads = ("recipe", "seeds", "bits per byte", "seed to seed", "above the best", "95 %")
    rows = []
    for place, recipe in enumerate(found.recipes):
        spread = f"{min(recipe.of_runs):.4f}–{max(recipe.of_runs):.4f}" if len(recipe.runs) > 1 else "–"
        cells = [names[place], str(len(recipe.runs)), f"{recipe.bits_per_byte:.4f}", spread]
        if place:
            difference = found.differences[place - 1]
            interval = difference.interval
            cells += [f"{difference.bits_per_byte:+.4f}", f"{interval.low:+.4f} to {interval.high:+.4f}"]
        rows.append(cells)
    return tabulate(heads if found.differences else heads[:4], rows)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
