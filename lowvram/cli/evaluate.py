"""`lowvram evaluate`: bits per byte of held-out text, beside a bigram baseline."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lowvram.cli.next_step import next_step
from lowvram.cli.options import add_device, add_precision, count, device_words


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "evaluate",
        help="bits per byte of a trained model",
        description="Measure bits per byte: how many bits the model needs for one byte of held-out text.  The number "
        "does not depend on the tokenizer, so it compares any two models on the same text; a bigram model counted on "
        "the training shards stands beside it.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run directory or one of its step-… folders")
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="shards to measure on (default: the run's own)")
    parser.add_argument("--tokens", type=count, metavar="N", help="only the first N tokens (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    add_precision(parser, "what the run validates in")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from lowvram.api.evaluation import evaluate_task
    from lowvram.cli.console import literal, result
    from lowvram.cli.tasks import run_task
    from lowvram.evaluate.verdict import compare_with_bigrams

    given = (arguments.data, arguments.tokens, arguments.precision, arguments.device)
    found = run_task(evaluate_task(arguments.checkpoint, *given))
    if arguments.json:
        literal(json.dumps(found.as_dict()))
        return
    where = f"{found.checkpoint} on {found.data}"
    result(f"{where}: {found.targets:,} tokens in windows of {found.seq_len}, weights in {found.precision}")
    result(f"  bits per byte  {found.bits_per_byte:.4f}   (loss {found.loss:.4f} nats per token)")
    if found.bigram_bits_per_byte is not None:
        result(f"  bigram model   {found.bigram_bits_per_byte:.4f}   (counted on {found.bigrams_of})")
        result(compare_with_bigrams(found.bits_per_byte, found.bigram_bits_per_byte))
    literal(next_step("chat", arguments.checkpoint, *device_words(arguments), why="talk to it"))
