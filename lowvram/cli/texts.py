"""What `tokenizer train` and `data pack` share: the files they read, rows that are no text, words for the next step."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_texts

if TYPE_CHECKING:
    from lowvram.api.texts import TextOptions
    from lowvram.data.bad_rows import BadRow


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the texts to read, --field and --on-bad-row."""
    add_texts(parser)
    parser.add_argument(
        "--on-bad-row",
        choices=("stop", "skip", "report"),
        default="stop",
        help="rows that are not text: stop at the first (default); skip them, up to 1%% of rows and text and 10,000 "
        "rows, but stop at a file that cannot be read to its end; or report: read everything, list them all and do "
        "nothing else",
    )


def read_options(arguments: argparse.Namespace) -> TextOptions:
    """Return which texts are read, and how; not where --on-bad-row is report, which makes nothing of them."""
    from lowvram.api.texts import TextOptions

    return TextOptions(tuple(arguments.text), arguments.field, arguments.on_bad_row, arguments.holdout)


def report(arguments: argparse.Namespace, command: Sequence[str], options: Sequence[str | Path]) -> int:
    """Read everything, list every bad row and name the next step; return 1 if there are any.

    command: the words of the command that was typed.  options: those that it was typed with and that say what is made
    of the texts, so that the next step makes the same of them.
    """
    from lowvram.api.texts import TextOptions, check_texts_task
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task
    from lowvram.units import count_of

    def tell(row: BadRow) -> None:
        result(f"{row.what} {row.why}" if row.ends_file else row.what)

    found = run_task(check_texts_task(TextOptions(tuple(arguments.text), arguments.field), tell))
    if not found.bad:
        rows = "The only row" if found.rows == 1 else f"All {found.rows:,} rows"
        are = "is" if found.rows == 1 else "are"
        result(f"{rows} of {count_of(found.files, 'file')} {are} text.")
        literal(next_step(*command, *reading_words(arguments, "stop"), *options))
        return 0
    are = "is" if found.bad == 1 else "are"
    result(f"{found.bad:,} of {count_of(found.rows, 'row')} {are} bad: {found.summary}.")
    action, why = ("skip", "or mend them") if found.can_be_skipped else ("report", "when these are mended or left out")
    literal(next_step(*command, *reading_words(arguments, action), *options, why=why))
    return 1


def reading_words(arguments: argparse.Namespace, on_bad_row: str) -> list[str | Path]:
    """Return the words of the command line that say which texts are read, and how."""
    words: list[str | Path] = [*arguments.text]
    words += [] if arguments.field == "text" else ["--field", arguments.field]
    return words + ([] if on_bad_row == "stop" else ["--on-bad-row", on_bad_row])


def option_words(arguments: argparse.Namespace, defaults: Mapping[str, object]) -> list[str | Path]:
    """Return the options of these names as they were typed, without those that have their default."""
    from lowvram.data.holdout import show_share

    words: list[str | Path] = []
    for name, default in defaults.items():
        value = getattr(arguments, name)
        if value in (default, None):
            continue
        words.append(f"--{name}")
        if name == "holdout":
            words.append(show_share(value))
        elif value is not True:
            words.append(value if isinstance(value, Path) else str(value))
    return words
