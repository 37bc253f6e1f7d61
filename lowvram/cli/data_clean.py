"""`lowvram data clean`: text without what a model should not learn, with a report of what was taken out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.cleaning import DEFAULT_CLEAN_OUT
from lowvram.cli.options import process_count
from lowvram.cli.texts import add_reading, read_options, report

if TYPE_CHECKING:
    from lowvram.api.cleaning import Cleaned


def add_clean(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    clean = actions.add_parser(
        "clean",
        help="repair, filter and deduplicate text",
        description="Repair characters, leave out documents that are no good text, and duplicates, and write one "
        ".jsonl for each file, with a report of what each rule did. What is read stays as it is. If it is "
        "interrupted, the same command continues where it stopped. Every rule: docs/cleaning.md.",
    )
    add_reading(clean, "skip")
    clean.add_argument("--out", type=Path, default=DEFAULT_CLEAN_OUT, metavar="DIR", help="(default: %(default)s)")
    clean.add_argument("--rules", type=Path, metavar="FILE.toml", help="rules and thresholds, see docs/cleaning.md")
    clean.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of a rule: --set length.least_words=5, --set toxicity.on=false",
    )
    clean.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an evaluation set, or a folder of them: documents that share 13 words in a row with it are removed",
    )
    clean.add_argument("--replace", action="store_true", help="replace cleaned text of another run that DIR holds")
    clean.add_argument("--processes", type=process_count, metavar="N", help="processes (default: one per core)")
    clean.set_defaults(run=run_clean, goes_on=True)


def run_clean(arguments: argparse.Namespace) -> int:
    """Clean, and show what was taken out and what comes next."""
    from lowvram.api.cleaning import CleaningOptions, clean_task
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step, or_step
    from lowvram.cli.tasks import run_task

    if arguments.on_bad_row == "report":
        return report(arguments)
    options = CleaningOptions(
        arguments.out, arguments.rules, tuple(arguments.set), tuple(arguments.against), arguments.replace
    )
    cleaned = run_task(clean_task(read_options(arguments), options, arguments.processes))
    for line in _describe(cleaned):
        result(line)
    literal(next_step("tokenizer", "train", cleaned.path, "--holdout", "0.5%", "--out", "tok"))
    literal(or_step("data", "pack", cleaned.path, "--holdout", "0.5%", why="with a tokenizer that you have"))
    return 0


def _describe(cleaned: Cleaned) -> list[str]:
    from lowvram.units import count_of, show_bytes

    rows = [row for row in cleaned.report["rules"] if row["documents_removed"] or row["documents_changed"]]
    lines = [
        f"{row['rule']}: {count_of(row['documents_removed'], 'document')} removed, {row['documents_changed']:,} changed"
        for row in rows
    ]
    share = 1 - cleaned.documents / max(1, cleaned.documents_read)
    return [
        *lines,
        f"{cleaned.path}: {cleaned.documents:,} of {count_of(cleaned.documents_read, 'document')} "
        f"({share:.2%} removed), {show_bytes(cleaned.text_bytes)}; what each rule did: {cleaned.page}",
    ]
