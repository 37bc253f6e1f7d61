"""`lowvram data`: text cleaned, packed into shards of tokens, and mixed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.packing import DEFAULT_OUT, DEFAULT_TOKENIZER
from lowvram.cli.data_clean import add_clean
from lowvram.cli.data_exclude import add_exclude
from lowvram.cli.data_look import add_look
from lowvram.cli.data_mix import add_mix
from lowvram.cli.options import add_holdout, add_packing
from lowvram.cli.texts import add_reading, read_options, report

if TYPE_CHECKING:
    from lowvram.api.packing import PackedShards


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "data", help="clean text, pack it into shards of tokens, mix sources", description="Training data."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_clean(actions)
    pack = actions.add_parser(
        "pack",
        help="tokenize text into memory-mapped shards",
        description="Tokenize text into memory-mapped shards. Documents end at a blank line, or are one field of "
        "a row of JSON lines, a table or Parquet. If it is interrupted, the same command continues where it stopped.",
    )
    add_reading(pack)
    pack.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER, metavar="DIR", help="(default: %(default)s)")
    pack.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="(default: %(default)s)")
    add_holdout(
        pack, "hold out this share of the documents, as 0.5%%, chosen by their hash: writes DIR/train and DIR/valid"
    )
    add_packing(pack)
    pack.set_defaults(run=run_pack, goes_on=True)
    add_mix(actions)
    add_look(actions)
    add_exclude(actions)


def run_pack(arguments: argparse.Namespace) -> int:
    """Pack, and show what was written and what comes next."""
    from lowvram.api.packing import pack_task
    from lowvram.cli.console import literal, notice, result
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task

    if arguments.on_bad_row == "report":
        return report(arguments)
    options = read_options(arguments)
    given = (arguments.tokenizer, arguments.out, arguments.replace, arguments.processes, arguments.exclude)
    packed = run_task(pack_task(options, *given))
    for shards in packed.shards:
        result(_describe(shards))
    if not packed.has_validation:
        notice("Nothing is held out for validation. --holdout 0.5% packs that share of the documents apart.")
    data = ("--data", packed.data) if packed.data is not None else ()
    literal(next_step("fit", *data, "--out", "run.toml", why="which model fits, and a run file for it"))
    return 0


def _describe(shards: PackedShards) -> str:
    from lowvram.units import show_bytes, show_count

    return (
        f"{shards.path}: {show_count(shards.tokens)} token{'s' * (shards.tokens != 1)} of "
        f"{show_count(shards.documents)} document{'s' * (shards.documents != 1)}, "
        f"{show_bytes(shards.text_bytes)} of text ({shards.bytes_per_token:.2f} bytes a token)"
    )
