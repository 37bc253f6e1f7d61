"""`lowvram data look`: which documents a trained model finds strangest and most boring, by file and line."""

from __future__ import annotations

import argparse
import json
import os
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.looking import DEFAULT_LEAST, DEFAULT_LOOK_OUT, DEFAULT_MOST, DEFAULT_TOKENS
from lowvram.cli.options import add_device, add_precision, count, size_of_file

if TYPE_CHECKING:
    from lowvram.api.looking import Looked, SeenDocument

# How wide lines are where there is no window, and how much of a document is shown in the narrowest one.
_PIPE_WIDTH, _LEAST_EXCERPT = 120, 20
# Places up to this width are a column; longer ones push the text behind them aside.
_WIDEST_PLACE = 30
_DESCRIPTION = (
    "Let a trained model name the documents that it finds strangest and most boring: those that cost it the most and "
    "the fewest bits per byte. Strange are damaged text, other languages, tables of numbers; boring are text that "
    "repeats itself, and what a site prints on every page. A model that was trained on part of the text for an hour "
    "is good enough. Every document that was scored goes to a list, for `lowvram data exclude`; if it is interrupted, "
    "the same command continues where it stopped."
)


def add_look(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    look = actions.add_parser("look", help="find strange and boring documents with a model", description=_DESCRIPTION)
    look.add_argument("shards", type=Path, metavar="SHARDS", help="a folder of shards; of a split one its train")
    what = "the model: a run directory, or one of its step-… folders"
    look.add_argument("--with", type=Path, required=True, dest="model", metavar="RUN", help=what)
    amount = look.add_mutually_exclusive_group()
    what = "read about N tokens, in documents drawn by lot, the same each time (default: 1M)"
    amount.add_argument("--tokens", type=count, default=DEFAULT_TOKENS, metavar="N", help=what)
    amount.add_argument("--all", action="store_true", help="read every document")
    what = "leave out documents of fewer bytes, which say little (default: %(default)s)"
    look.add_argument("--least", type=size_of_file, default=DEFAULT_LEAST, metavar="BYTES", help=what)
    what = "show N documents of each end (default: %(default)s)"
    look.add_argument("--most", type=count, default=DEFAULT_MOST, metavar="N", help=what)
    what = "the list of all documents that were scored (default: %(default)s)"
    look.add_argument("--out", type=Path, default=DEFAULT_LOOK_OUT, metavar="FILE", help=what)
    what = "replace the list of another model, of other shards or by other options"
    look.add_argument("--replace", action="store_true", help=what)
    look.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    add_precision(look, "what the run validates in")
    add_device(look)
    look.set_defaults(run=run_look, goes_on=True)


def run_look(arguments: argparse.Namespace) -> None:
    """Score, and show both ends and what comes next."""
    from lowvram.api.looking import LookOptions, look_task
    from lowvram.cli.console import literal
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task

    tokens = None if arguments.all else arguments.tokens
    options = LookOptions(tokens, arguments.least, arguments.most, arguments.out, arguments.replace)
    found = run_task(look_task(arguments.shards, arguments.model, options, arguments.precision, arguments.device))
    if arguments.json:
        literal(json.dumps(found.as_dict()))
        return
    _show(found)
    words = ("data", "exclude", arguments.shards, "--listed", found.out, "--strangest", str(arguments.most))
    literal(next_step(*words, "--out", _name_rest(arguments.shards), why="when you have read them"))


def _name_rest(shards: Path) -> Path:
    """Return the name of a folder beside that of the shards, also where that is `.` or a drive."""
    named = shards if shards.name not in ("", "..") else Path(os.path.abspath(shards))
    return named.parent / f"{named.name or 'shards'}-rest"


def _show(found: Looked) -> None:
    from lowvram.cli.console import result
    from lowvram.units import count_of, show_bytes

    read = f"{found.scored:,} of {count_of(found.documents, 'document')}, {show_bytes(found.text_bytes)}"
    result(f"{found.checkpoint} on {found.shards}: {read}, {found.bits_per_byte:.3f} bits per byte")
    _show_sources(found)
    for name, documents in (("Strangest", found.strangest), ("Most boring", found.boring)):
        if documents:
            result()
            result(f"{name}, in bits per byte", "bold")
            _show_documents(found, documents)
    result()
    result(f"All {count_of(found.scored, 'document')}, strangest first: {found.out}")


def _show_sources(found: Looked) -> None:
    from lowvram.cli.console import lay_out, result, tabulate
    from lowvram.units import show_bytes

    cells = [
        (row.source, f"{row.documents:,}", show_bytes(row.text_bytes), f"{row.bits_per_byte:.3f}")
        for row in found.sources
    ]
    result()
    lay_out(tabulate(("source", "documents", "text", "bits per byte"), cells), is_folded=True)


def _show_documents(found: Looked, documents: tuple[SeenDocument, ...]) -> None:
    """Show documents by source; the source with the first of them comes first."""
    from rich.cells import cell_len

    from lowvram.api.looking import find_source
    from lowvram.cli.console import clean, literal, out, result
    from lowvram.units import show_bytes

    sources = [find_source(document, found.sources) for document in documents]
    ordered = sorted(zip(sources, documents, strict=True), key=lambda pair: sources.index(pair[0]))
    width = out.width if out.is_terminal else _PIPE_WIDTH
    for source, pairs in groupby(ordered, lambda pair: pair[0]):
        result(f"  {source}")
        shown = [(document, clean(_place_in(source, document))) for _, document in pairs]
        widest = min(max(cell_len(place) for _, place in shown), _WIDEST_PLACE)
        for document, place in shown:
            blanks = " " * (widest - cell_len(place))
            head = f"  {document.bits_per_byte:6.3f} {show_bytes(document.text_bytes):>9}  {place}{blanks}  "
            literal(head + _cut(clean(document.excerpt), max(width - cell_len(head), _LEAST_EXCERPT)))


def _place_in(source: str, document: SeenDocument) -> str:
    """Return where a document is, without the source under which it is shown."""
    if document.file is None or document.line is None:
        return document.place
    words = document.place.removeprefix(document.file).lstrip(":, ")
    if document.file == source:
        return f"line {words}" if words.isdigit() else words
    return f"{Path(document.file).name}{document.place.removeprefix(document.file)}"


def _cut(text: str, width: int) -> str:
    """Return as much of a text as is so many cells wide."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
