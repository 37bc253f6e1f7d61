"""`lowvram data exclude`: shards without documents that a list names."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from lowvram.cli.options import count

_DESCRIPTION = (
    "Write a new folder of shards without some documents, which are named by the SHA-256 of their text. The shards "
    "that are read stay as they are, with the runs that were trained on them; those that lose nothing are linked and "
    "take no space. Every copy of a listed text is left out. Of a split folder the training data loses documents, "
    "and held-out text stays, so that runs can be compared on it. The new folder keeps a list of what was left out, "
    "and why, in excluded.json. If it is interrupted, the same command continues where it stopped."
)


def add_exclude(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    exclude = actions.add_parser("exclude", help="leave documents out of shards", description=_DESCRIPTION)
    exclude.add_argument("shards", type=Path, metavar="SHARDS", help="a folder of shards, or of train and valid")
    what = "the list that `lowvram data look` wrote; the next four options choose from it, and may stand together"
    exclude.add_argument("--listed", type=Path, metavar="FILE", help=what)
    exclude.add_argument("--strangest", type=count, metavar="N", help="its N documents with the most bits per byte")
    exclude.add_argument("--above", type=_bits, metavar="BITS", help="its documents with more bits per byte")
    exclude.add_argument("--boring", type=count, metavar="N", help="its N documents with the fewest bits per byte")
    exclude.add_argument("--below", type=_bits, metavar="BITS", help="its documents with fewer bits per byte")
    what = "hashes of documents, or files all of whose documents are meant: part of a list, an excluded.json, hashes"
    exclude.add_argument("--hash", nargs="+", default=[], action="extend", metavar="HASH", help=what)
    exclude.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder of shards")
    what = "the tokenizer that the shards were packed with (default: tok in or beside SHARDS, or here)"
    exclude.add_argument("--tokenizer", type=Path, metavar="DIR", help=what)
    exclude.add_argument("--replace", action="store_true", help="replace other shards that DIR holds")
    exclude.set_defaults(run=run_exclude, goes_on=True)


def _bits(text: str) -> float:
    number = float(text)
    if not math.isfinite(number) or number < 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of bits")
    return number


_bits.__name__ = "number"  # argparse's error shows this name


def run_exclude(arguments: argparse.Namespace) -> None:
    """Write the rest, and show what was left out and what comes next."""
    from lowvram.api.excluding import ExcludeOptions, exclude_task
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task
    from lowvram.data.exclusion_list import EXCLUDED
    from lowvram.shell import quote_command
    from lowvram.units import count_of, show_bytes, show_count

    given = (arguments.strangest, arguments.above, arguments.boring, arguments.below)
    options = ExcludeOptions(arguments.listed, *given, tuple(arguments.hash))
    words = (arguments.shards, arguments.out, options, arguments.tokenizer, arguments.replace)
    found = run_task(exclude_task(*words))
    size = f"{show_count(found.tokens)} tokens, {show_bytes(found.text_bytes)} of text"
    result(f"Left out: {count_of(found.documents, 'document')}, {size}")
    for shards in found.shards:
        documents = count_of(shards.documents, "document")
        result(f"{shards.path}: {show_count(shards.tokens)} tokens of {documents} are left")
    mix = _find_mix(arguments.shards)
    if mix is not None:
        option = quote_command("--exclude", found.shards[0].path / EXCLUDED)
        literal(f"Next: the `lowvram data mix` that made {mix}, with {option} and another --out  (shares without them)")
        return
    data = found.data if found.data is not None else found.path
    literal(next_step("fit", "--data", data, "--out", "run.toml", why="a run file for what is left"))


def _find_mix(shards: Path) -> Path | None:
    """Return the mix that a folder of shards is a source of, None where it is of none."""
    from lowvram.config.mix import is_mix

    return next((folder for folder in shards.resolve().parents if is_mix(folder)), None)
