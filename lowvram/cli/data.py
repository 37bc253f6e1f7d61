"""`lowvram data`: text into shards of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_holdout, process_count
from lowvram.cli.texts import add_reading, find, report, show_skipped, start_reading

if TYPE_CHECKING:
    from lowvram.data.shards import PackProgress, ShardSet
    from lowvram.data.tokenizer import Tokenizer

TOKENIZER, OUT = Path("tok"), Path("shards")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("data", help="pack text into shards of tokens", description="Training data.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    pack = actions.add_parser(
        "pack",
        help="tokenize text into memory-mapped shards",
        description="Tokenize text into memory-mapped shards.  Documents end at a blank line, or are one field of "
        "a .jsonl or .parquet row.  If it is interrupted, the same command continues where it stopped.",
    )
    add_reading(pack)
    pack.add_argument("--tokenizer", type=Path, default=TOKENIZER, metavar="DIR", help="(default: %(default)s)")
    pack.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="(default: %(default)s)")
    add_holdout(
        pack, "hold out this share of the documents, as 0.5%%, chosen by their hash: writes DIR/train and DIR/valid"
    )
    pack.add_argument("--replace", action="store_true", help="replace shards of another text that DIR holds")
    pack.add_argument("--processes", type=process_count, metavar="N", help="encoding processes (default: one per core)")
    pack.set_defaults(run=run_pack)


def run_pack(arguments: argparse.Namespace) -> int:
    """Pack, and show what was written and what comes next."""
    from lowvram.cli.console import literal, notice, result
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.data.holdout import Holdout
    from lowvram.data.shards import pack, pack_split
    from lowvram.evaluate.verdict import warn_of_few_tokens

    if arguments.on_bad_row == "report":
        return report(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer)
    out, bad_rows, files = arguments.out, start_reading(arguments), find(arguments.text)

    def work(tell: Callable[[PackProgress], None]) -> dict[Path, ShardSet]:
        wishes = (arguments.field, arguments.processes, tell)
        words = {"replace": arguments.replace, "bad_rows": bad_rows}
        if arguments.holdout is None:
            return {out: pack(files, tokenizer, out, *wishes, **words)}
        train, valid = pack_split(files, tokenizer, out, Holdout(arguments.holdout), *wishes, **words)
        return {out / "train": train, out / "valid": valid}

    packed = _with_progress(work)
    show_skipped(bad_rows)
    for folder, shards in packed.items():
        result(_describe(folder, shards))
    if arguments.holdout is not None and (warning := warn_of_few_tokens(packed[out / "valid"].tokens)):
        notice(f"{warning}  Give --holdout a larger share, or pack more text.", "yellow")
    if arguments.holdout is None and out.name != "valid" and not (out.parent / "valid").is_dir():
        notice("Nothing is held out for validation. --holdout 0.5% packs that share of the documents apart.")
    is_side = arguments.holdout is None and out.name in ("train", "valid")
    literal(_name_next(out.parent if is_side else out, arguments.tokenizer))
    return 0


def _describe(folder: Path, shards: ShardSet) -> str:
    from lowvram.units import show_bytes, show_count

    ratio = shards.text_bytes / max(1, shards.tokens - shards.documents)
    return (
        f"{folder}: {show_count(shards.tokens)} token{'s' * (shards.tokens != 1)} of "
        f"{show_count(shards.documents)} document{'s' * (shards.documents != 1)}, "
        f"{show_bytes(shards.text_bytes)} of text ({ratio:.2f} bytes a token)"
    )


def _name_next(home: Path, tokenizer: Path) -> str:
    """Return the next step: a run file for the packed folders, with --data where `fit` finds them by it."""
    from lowvram.cli.next_step import next_step
    from lowvram.data.shard_set import INDEX

    why = "which model fits, and a run file for it"
    is_packed = (home / "train").is_dir() or (home / INDEX).is_file()
    is_found = is_packed and tokenizer.resolve() in (
        (home / "tok").resolve(),
        home.resolve().parent / "tok",
    )
    data = ("--data", home) if is_found else ()
    return next_step("fit", *data, "--out", "run.toml", why=why)


def pack_with_progress(
    paths: Sequence[Path], tokenizer: Tokenizer, out: Path, field: str = "text", processes: int | None = None
) -> ShardSet:
    """Pack files into shards, showing how far it is; returns the ShardSet."""
    from lowvram.data.shards import pack

    return _with_progress(lambda tell: {out: pack(paths, tokenizer, out, field, processes, tell)})[out]


def _with_progress(work: Callable[[Callable[[PackProgress], None]], dict[Path, ShardSet]]) -> dict[Path, ShardSet]:
    from lowvram.cli.console import bar
    from lowvram.units import show_count

    with bar("Packing") as line:

        def tell(progress: PackProgress) -> None:
            line.tell(progress.read_bytes, progress.total_bytes or None, f"{show_count(progress.tokens)} tokens")

        return work(tell)
