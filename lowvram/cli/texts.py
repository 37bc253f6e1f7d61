"""What commands that read text share: which texts, rows that are not text, words for the next step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowvram.cli.options import TEXTS, add_texts

if TYPE_CHECKING:
    from lowvram.api.texts import TextOptions
    from lowvram.data.bad_rows import BadRow


def add_reading(
    parser: argparse.ArgumentParser, on_bad_row: Literal["stop", "skip"] = "stop", what: str = TEXTS
) -> None:
    """Add the texts to read, --field and --on-bad-row.  on_bad_row: the default; what: what the texts may be."""
    add_texts(parser, what)
    stop, skip = (" (default)" if on_bad_row == each else "" for each in ("stop", "skip"))
    parser.add_argument(
        "--on-bad-row",
        choices=("stop", "skip", "report"),
        default=on_bad_row,
        help=f"rows that are not text: stop at the first{stop}; skip them{skip}, up to 1%% of rows and text and 10,000 "
        "rows, but stop at a file that cannot be read to its end; or report: read everything, list them all and do "
        "nothing else",
    )


def read_options(arguments: argparse.Namespace) -> TextOptions:
    """Return which texts are read, and how; not where --on-bad-row is report, which makes nothing of them."""
    from lowvram.api.texts import TextOptions

    holdout = getattr(arguments, "holdout", None)
    return TextOptions(tuple(arguments.text), arguments.field, arguments.on_bad_row, holdout)


def report(arguments: argparse.Namespace) -> int:
    """Read everything, list every bad row and name the next step; return 1 if there are any.

    The next step is the command that was typed, with another value of --on-bad-row.
    """
    from lowvram.api.texts import TextOptions, check_texts_task
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step, with_value
    from lowvram.cli.tasks import run_task
    from lowvram.units import count_of

    def tell(row: BadRow) -> None:
        result(f"{row.what} {row.why}" if row.ends_file else row.what)

    found = run_task(check_texts_task(TextOptions(tuple(arguments.text), arguments.field), tell))
    if not found.bad:
        rows = "The only row" if found.rows == 1 else f"All {found.rows:,} rows"
        are = "is" if found.rows == 1 else "are"
        result(f"{rows} of {count_of(found.files, 'file')} {are} text.")
        literal(next_step(*with_value(arguments.typed, "--on-bad-row", "stop")))
        return 0
    are = "is" if found.bad == 1 else "are"
    result(f"{found.bad:,} of {count_of(found.rows, 'row')} {are} bad: {found.summary}.")
    action, why = (
        ("skip", "or repair them") if found.can_be_skipped else ("report", "when these are repaired or left out")
    )
    literal(next_step(*with_value(arguments.typed, "--on-bad-row", action), why=why))
    return 1


def reading_words(arguments: argparse.Namespace) -> list[str | Path]:
    """Return the words of another command that reads the same texts in the same way."""
    words: list[str | Path] = [*arguments.text]
    words += [] if arguments.field == "text" else ["--field", arguments.field]
    return words + ([] if arguments.on_bad_row == "stop" else ["--on-bad-row", arguments.on_bad_row])
