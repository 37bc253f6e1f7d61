"""What `tokenizer train` and `data pack` share: which files are read, what is passed over, rows that are not text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_texts

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRow, BadRows

_SHOWN = 5
_HINT = "--on-bad-row skip leaves such rows out, and --on-bad-row report lists them all."
_FILE_HINT = "--on-bad-row skip leaves out single rows, never the rest of a file; report lists all such files."


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


def find(paths: Sequence[Path]) -> list[Path]:
    """Return the files that the paths name, and show what was passed over."""
    from lowvram.cli.console import notice
    from lowvram.data.text_files import find_text_files

    found = find_text_files(paths)
    for line in found.describe():
        notice(line)
    return found.files


def start_reading(arguments: argparse.Namespace) -> BadRows:
    """Return what --on-bad-row asks for; the first rows that are skipped are shown."""
    from lowvram.cli.console import notice
    from lowvram.data.bad_rows import BadRows

    shown = 0

    def tell(row: BadRow) -> None:
        nonlocal shown
        shown += 1
        if shown <= _SHOWN:
            notice(f"Skipped: {row.what}")

    return BadRows(arguments.on_bad_row, tell, _HINT, _FILE_HINT)


def show_skipped(bad_rows: BadRows) -> None:
    """Show how many rows were skipped, if any."""
    from lowvram.cli.console import notice
    from lowvram.units import count_of

    if bad_rows.count:
        notice(f"Skipped {bad_rows.count:,} of {count_of(bad_rows.rows, 'row')}: {bad_rows.describe()}.")


def report(arguments: argparse.Namespace) -> int:
    """Read everything, list every bad row and name the next step; return 1 if there are any.

    The next step is the command that was typed, with another value of --on-bad-row.
    """
    from lowvram.cli.console import bar, literal, result
    from lowvram.cli.next_step import next_step, with_value
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.text import documents_of
    from lowvram.units import count_of

    def tell(row: BadRow) -> None:
        result(f"{row.what} {row.why}" if row.ends_file else row.what)

    bad_rows = BadRows("report", tell)
    files = find(arguments.text)
    with bar("Reading") as line:
        for _ in documents_of(files, arguments.field, line.tell, bad_rows):
            pass
    if not bad_rows.count:
        rows = "The only row" if bad_rows.rows == 1 else f"All {bad_rows.rows:,} rows"
        are = "is" if bad_rows.rows == 1 else "are"
        result(f"{rows} of {count_of(len(files), 'file')} {are} text.")
        literal(next_step(*with_value(arguments.typed, "--on-bad-row", "stop")))
        return 0
    are = "is" if bad_rows.count == 1 else "are"
    result(f"{bad_rows.count:,} of {count_of(bad_rows.rows, 'row')} {are} bad: {bad_rows.describe()}.")
    action, why = (
        ("skip", "or repair them") if bad_rows.can_be_skipped else ("report", "when these are repaired or left out")
    )
    literal(next_step(*with_value(arguments.typed, "--on-bad-row", action), why=why))
    return 1


def reading_words(arguments: argparse.Namespace) -> list[str | Path]:
    """Return the words of another command that reads the same texts in the same way."""
    words: list[str | Path] = [*arguments.text]
    words += [] if arguments.field == "text" else ["--field", arguments.field]
    return words + ([] if arguments.on_bad_row == "stop" else ["--on-bad-row", arguments.on_bad_row])
