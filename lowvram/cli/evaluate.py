"""`lowvram evaluate`: bits per byte of held-out text, beside a bigram baseline."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from lowvram.cli.next_step import next_step
from lowvram.cli.options import add_device, add_precision, count


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
    from lowvram.cli.bigrams import find_baseline
    from lowvram.cli.console import bar, literal, result
    from lowvram.cli.load import load_model
    from lowvram.data.shards import ShardSet
    from lowvram.errors import DataError
    from lowvram.evaluate.bits_per_byte import score
    from lowvram.evaluate.verdict import compare_with_bigrams

    loaded = load_model(arguments.checkpoint, arguments.device, arguments.precision, as_trained=True)
    place = arguments.data or (loaded.what.data.valid if loaded.what is not None else None)
    if place is None:
        raise DataError("The run names no data.valid.", "Bits per byte need held-out text.", "Give --data SHARDS.")
    directory = loaded.checkpoint.directory if loaded.checkpoint is not None else arguments.checkpoint
    tokenizer, seq_len = loaded.tokenizer, loaded.trained_len
    shards = ShardSet.open(place, tokenizer.hash, tokenizer.size)
    with bar("Reading held-out text") as line:
        found = score(
            loaded.model,
            shards,
            tokenizer.bos_id,
            tokenizer.byte_count_V,
            seq_len,
            loaded.dtype,
            arguments.tokens,
            progress=line.tell,
        )
    what = loaded.what
    baseline = find_baseline(what, tokenizer, shards, arguments.tokens) if what is not None else None
    if arguments.json:
        values = {
            "checkpoint": str(directory),
            "step": loaded.checkpoint.step if loaded.checkpoint is not None else None,
            "precision": loaded.precision,
            "data": str(place),
            "bits_per_byte": found.bits_per_byte if math.isfinite(found.nats) else None,
            "loss": found.loss if math.isfinite(found.nats) else None,
            "targets": found.targets,
            "bigram_bits_per_byte": baseline[0].bits_per_byte if baseline else None,
        }
        literal(json.dumps(values))
        return
    result(f"{directory} on {place}: {found.targets:,} tokens in windows of {seq_len}, weights in {loaded.precision}")
    result(f"  bits per byte  {found.bits_per_byte:.4f}   (loss {found.loss:.4f} nats per token)")
    if baseline is not None:
        bigram, counted = baseline
        result(f"  bigram model   {bigram.bits_per_byte:.4f}   (counted on {counted})")
        result(compare_with_bigrams(found.bits_per_byte, bigram.bits_per_byte))
    literal(next_step("chat", arguments.checkpoint, why="talk to it"))
