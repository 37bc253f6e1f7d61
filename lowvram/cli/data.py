"""`lowvram data`: text into shards of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_texts, count

if TYPE_CHECKING:
    from lowvram.data.shards import ShardSet
    from lowvram.data.tokenizer import Tokenizer


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("data", help="pack text into shards of tokens", description="Training data.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    pack = actions.add_parser(
        "pack",
        help="tokenize text into memory-mapped shards",
        description="Tokenize text into memory-mapped shards.  Documents end at a blank line, or are one field of "
        "a .jsonl or .parquet row.  Interrupted, it goes on where it stopped when typed again.",
    )
    add_texts(pack)
    pack.add_argument("--tokenizer", type=Path, default=Path("tok"), metavar="DIR", help="(default: %(default)s)")
    pack.add_argument("--out", type=Path, default=Path("shards"), metavar="DIR", help="(default: %(default)s)")
    pack.add_argument("--processes", type=count, metavar="N", help="encoders at work at once (default: one a core)")
    pack.set_defaults(run=run_pack)


def run_pack(arguments: argparse.Namespace) -> None:
    """Pack and say what came out."""
    from lowvram.cli.show import result
    from lowvram.data.outside_tokenizer import load_tokenizer
    from lowvram.units import show_bytes, show_count

    tokenizer = load_tokenizer(arguments.tokenizer)
    shards = pack_with_progress(arguments.text, tokenizer, arguments.out, arguments.field, arguments.processes)
    ratio = shards.text_bytes / max(1, shards.tokens - shards.documents)
    result(
        f"{arguments.out}: {show_count(shards.tokens)} tokens of {show_count(shards.documents)} documents, "
        f"{show_bytes(shards.text_bytes)} of text ({ratio:.2f} bytes a token)"
    )


def pack_with_progress(
    paths: Sequence[Path], tokenizer: Tokenizer, out: Path, field: str = "text", processes: int | None = None
) -> ShardSet:
    """Pack files into shards, showing how far it is; returns the ShardSet."""
    from lowvram.cli.show import bar
    from lowvram.data.shards import PackProgress, pack
    from lowvram.units import show_count

    with bar("Packing") as line:

        def tell(progress: PackProgress) -> None:
            line.tell(progress.read_bytes, progress.total_bytes, f"{show_count(progress.tokens)} tokens")

        return pack(paths, tokenizer, out, field, processes, tell)
