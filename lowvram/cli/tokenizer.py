"""`lowvram tokenizer`: train one on text; comparing and showing have files of their own."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowvram.api.merge_text import DEFAULT_SAMPLE, SampleOptions
from lowvram.api.tokenizer_training import (
    DEFAULT_MORPHOLOGY,
    DEFAULT_OUT,
    DEFAULT_VOCABULARY,
    MORPHOLOGIES,
    MergeOptions,
)
from lowvram.cli import tokenizer_compare, tokenizer_show
from lowvram.cli.options import add_holdout, add_shares, count, share_words, size_of_file
from lowvram.cli.texts import add_reading, read_options, reading_words, report

# The share that the next step names where the user named none.
SHARE = 0.005


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "tokenizer", help="train tokenizers, compare them, show how they cut", description="Tokenizers."
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    train = actions.add_parser(
        "train",
        help="learn a byte-level BPE vocabulary",
        description="Learn a byte-level BPE vocabulary from text. The result is a plain tokenizer.json that "
        "transformers and tokenizers load too; every string survives encoding and decoding unchanged. For several "
        "languages, put each into a file or folder of one folder and add --temperature or --weight; more: "
        "docs/languages.md.",
    )
    add_reading(train)
    train.add_argument(
        "--vocab", type=count, default=DEFAULT_VOCABULARY, metavar="N", help="number of ids (default: %(default)s)"
    )
    train.add_argument(
        "--morphology",
        choices=MORPHOLOGIES,
        help="strict: no token reaches over the end of a stem or suffix; soft: merges inside them count twice "
        f"(default: {DEFAULT_MORPHOLOGY}; none for standard input and several sources)",
    )
    train.add_argument(
        "--language", default="tr", metavar="tr|kk|FILE", help="whose rules cut words (default: %(default)s)"
    )
    train.add_argument(
        "--sample",
        type=size_of_file,
        default=DEFAULT_SAMPLE,
        metavar="SIZE",
        help="learn from at most so much text, pieces of documents chosen by a hash of their words (default: 1GB)",
    )
    add_shares(train, "characters", None)
    train.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where to write (default: %(default)s)"
    )
    add_holdout(train, "leave out the documents that `data pack --holdout SHARE` holds out, as 0.5%%")
    train.add_argument("--replace", action="store_true", help="overwrite another tokenizer that DIR holds")
    train.set_defaults(run=run_train)
    tokenizer_compare.add_parser(actions)
    tokenizer_show.add_parser(actions)


def run_train(arguments: argparse.Namespace) -> int:
    """Train, and show what was written and what comes next."""
    from lowvram.api.mix_options import DEFAULT_MIX, name_once, read_weights
    from lowvram.api.tokenizer_training import train_tokenizer_task
    from lowvram.cli.console import literal, notice, result
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task
    from lowvram.data.holdout import show_share

    if arguments.on_bad_row == "report":
        return report(arguments)
    options = read_options(arguments)
    weights = read_weights(name_once("weights", arguments.weight))
    sample = SampleOptions(arguments.sample, weights, arguments.temperature, arguments.levels)
    merges = MergeOptions(arguments.vocab, arguments.morphology, arguments.language, sample)
    trained = run_task(train_tokenizer_task(options, arguments.out, merges, arguments.replace))
    result(f"{trained.path}: {trained.size} ids" + _explain_size(trained.size, arguments.vocab))
    if options.holdout is None:
        notice("Nothing was held out. --holdout 0.5% leaves out what `data pack --holdout 0.5%` holds out.")
    words = reading_words(arguments)
    split = ("--holdout", show_share(options.holdout or SHARE))
    if sample.has_sources:
        words = [*words, *share_words(arguments)]
    to = ("mix", DEFAULT_MIX) if sample.has_sources else ("pack", "shards")
    literal(next_step("data", to[0], *words, *split, "--tokenizer", trained.path, "--out", to[1]))
    return 0


def _explain_size(size: int, asked: int) -> str:
    return f" (the text has no more pairs to merge; {asked} ids were asked for)" if size < asked else ""
