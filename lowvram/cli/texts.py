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
        help=f"rows that are not text: stop at the first{stop}; skip them{skip}, up to 10 or 1%% of rows and text, and "
        "10,000 rows, but stop at a file that cannot be read to its end; or report: read everything, list them all and "
        "do nothing else",
    )
    parser.add_argument(
        "--leave-out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file, or a folder, of the text that is not read, such as one that is damaged",
    )


def read_options(arguments: argparse.Namespace) -> TextOptions:
    """Return which texts are read, and how; not where --on-bad-row is report, which makes nothing of them."""
    from lowvram.api.texts import TextOptions

    holdout = getattr(arguments, "holdout", None)
    named = (tuple(arguments.text), arguments.field, arguments.on_bad_row, holdout, tuple(arguments.leave_out))
    return TextOptions(*named)


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
        result(f"{row.what} {row.why}" if row.ended_file else row.what)

    options = TextOptions(tuple(arguments.text), arguments.field, leave_out=tuple(arguments.leave_out))
    found = run_task(check_texts_task(options, tell))
    if not found.bad:
        rows = "The only row" if found.rows == 1 else f"All {found.rows:,} rows"
        are = "is" if found.rows == 1 else "are"
        result(f"{rows} of {count_of(found.files, 'file')} {are} text.")
        literal(next_step(*with_value(arguments.typed, "--on-bad-row", "stop")))
        return 0
    are = "is" if found.bad == 1 else "are"
    result(f"{found.bad:,} of {count_of(found.rows, 'row')} {are} bad: {found.summary}.")
    left_out = [word for file in found.unreadable for word in ("--leave-out", str(file))]
    if found.rest_can_be_skipped and len(found.unreadable) < found.files:
        action = "skip" if found.bad > len(found.unreadable) else "stop"
        words = with_value(arguments.typed, "--on-bad-row", action)
        literal(next_step(*words, *left_out, why="or repair them"))
    else:
        result("skip would stop, too: repair these files, or leave files out with --leave-out.")
    return 1


def reading_words(arguments: argparse.Namespace) -> list[str | Path]:
    """Return the words of another command that reads the same texts in the same way."""
    words: list[str | Path] = [*arguments.text]
    words += [] if arguments.field == "text" else ["--field", arguments.field]
    words += [word for file in arguments.leave_out for word in ("--leave-out", file)]
    return words + ([] if arguments.on_bad_row == "stop" else ["--on-bad-row", arguments.on_bad_row])
