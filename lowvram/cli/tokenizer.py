"""`lowvram tokenizer`: train one on text."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_texts, count

if TYPE_CHECKING:
    from lowvram.data.tokenizer import Tokenizer


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
    add_texts(train)
    train.add_argument("--vocab", type=count, default=32768, metavar="N", help="number of ids (default: %(default)s)")
    train.add_argument("--out", type=Path, default=Path("tok"), metavar="DIR", help="where to (default: %(default)s)")
    train.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> None:
    """Train and say what came out."""
    from lowvram.cli.show import result

    tokenizer = train_with_progress(arguments.text, arguments.vocab, arguments.out, arguments.field)
    result(f"{arguments.out}: {tokenizer.size} ids" + _explain_size(tokenizer.size, arguments.vocab))
    result(f"Next: lowvram data pack {' '.join(map(str, arguments.text))} --tokenizer {arguments.out} --out shards")


def train_with_progress(paths: Sequence[Path], vocabulary: int, out: Path, field: str = "text") -> Tokenizer:
    """Train a tokenizer on files, showing how much was read; returns the Tokenizer."""
    from lowvram.cli.show import bar, notice
    from lowvram.data.long_words import LONGEST_WORD
    from lowvram.data.text import documents, find_files
    from lowvram.data.tokenizer import train_tokenizer
    from lowvram.units import show_bytes

    files = find_files(paths)
    sizes = [file.stat().st_size for file in files]
    left_out: list[int] = []
    with bar("Learning the vocabulary") as line:

        def texts() -> Iterator[str]:
            for number, file in enumerate(files):
                before = sum(sizes[:number])
                yield from documents(file, field, lambda inside, before=before: line.tell(before + inside, sum(sizes)))
            line.tell(sum(sizes), sum(sizes), f"{show_bytes(sum(sizes))} read; merging")

        tokenizer = train_tokenizer(texts(), vocabulary, out, tell_left_out=left_out.append)
    for size in left_out:
        notice(
            f"{show_bytes(size)} of the text were left out: runs of more than {LONGEST_WORD:,} letters, or of as many "
            "other signs, are no words, and merges are learnt from words."
        )
    return tokenizer


def _explain_size(size: int, asked: int) -> str:
    return f" (the text has no more than that to merge; {asked} were asked for)" if size < asked else ""
