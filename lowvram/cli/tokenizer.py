"""`lowvram tokenizer`: train one on text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_holdout, count
from lowvram.cli.texts import add_reading, find, reading_words, report, show_skipped, start_reading

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.holdout import Holdout
    from lowvram.data.tokenizer import Tokenizer

# The share that the next step names where the user named none.
SHARE = 0.005
VOCABULARY, OUT = 32768, Path("tok")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser("tokenizer", help="train a tokenizer on text", description="Tokenizers.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser(
        "train",
        help="learn a byte-level BPE vocabulary",
        description="Learn a byte-level BPE vocabulary from text.  The result is a plain tokenizer.json that "
        "transformers and tokenizers load too; every string survives encoding and decoding unchanged.",
    )
    add_reading(train)
    train.add_argument(
        "--vocab", type=count, default=VOCABULARY, metavar="N", help="number of ids (default: %(default)s)"
    )
    train.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where to write (default: %(default)s)")
    add_holdout(train, "leave out the documents that `data pack --holdout SHARE` holds out, as 0.5%%")
    train.add_argument("--replace", action="store_true", help="overwrite another tokenizer that DIR holds")
    train.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> int:
    """Train, and show what was written and what comes next."""
    from lowvram.cli.console import literal, notice, result
    from lowvram.cli.next_step import next_step
    from lowvram.data.holdout import Holdout, show_share

    if arguments.on_bad_row == "report":
        return report(arguments)
    holdout = Holdout(arguments.holdout) if arguments.holdout else None
    bad_rows, files = start_reading(arguments), find(arguments.text)
    if not arguments.replace and (arguments.out / "tokenizer.json").exists():
        notice(f"{arguments.out} holds a tokenizer; another one is written there only with --replace.")
    tokenizer = train_with_progress(
        files, arguments.vocab, arguments.out, arguments.field, holdout, bad_rows, arguments.replace
    )
    show_skipped(bad_rows)
    result(f"{arguments.out}: {tokenizer.size} ids" + _explain_size(tokenizer.size, arguments.vocab))
    if holdout is None:
        notice("All of the text was read. --holdout 0.5% leaves out what `data pack --holdout 0.5%` holds out.")
    words = reading_words(arguments)
    split = ("--holdout", show_share(holdout.share if holdout else SHARE))
    literal(next_step("data", "pack", *words, *split, "--tokenizer", arguments.out, "--out", "shards"))
    return 0


def train_with_progress(
    paths: Sequence[Path],
    vocabulary: int,
    out: Path,
    field: str = "text",
    holdout: Holdout | None = None,
    bad_rows: BadRows | None = None,
    replace: bool = False,
) -> Tokenizer:
    """Train a tokenizer on files, showing how much was read; returns the Tokenizer.

    holdout: the documents that it takes are left out.  bad_rows: what is done with rows that are no text.
    replace: overwrite another tokenizer in `out`.
    """
    from lowvram.cli.console import bar, notice
    from lowvram.data.interruptible import run_interruptibly
    from lowvram.data.long_words import LONGEST_WORD
    from lowvram.data.text import documents_of, find_files
    from lowvram.data.text_files import size_of
    from lowvram.data.tokenizer import train_tokenizer
    from lowvram.units import show_bytes

    files = find_files(paths)
    total = sum(map(size_of, files))
    left_out: list[int] = []
    with bar("Learning the vocabulary") as line:

        def texts() -> Iterator[str]:
            yield from documents_of(files, field, line.tell, bad_rows)
            if bad_rows:
                bad_rows.finish()
            line.tell(total, total, f"{show_bytes(total)} read; merging")

        learnt_from = holdout.leave(texts()) if holdout else texts()
        tokenizer = run_interruptibly(
            lambda: train_tokenizer(learnt_from, vocabulary, out, tell_left_out=left_out.append, replace=replace)
        )
    for size in left_out:
        notice(
            f"{show_bytes(size)} of the text were left out: runs of more than {LONGEST_WORD:,} letters, or of as many "
            "other signs, are not words, and merges are learnt from words."
        )
    return tokenizer


def _explain_size(size: int, asked: int) -> str:
    return f" (the text has no more pairs to merge; {asked} ids were asked for)" if size < asked else ""
