"""`lowvram evaluate`: bits per byte of held-out text beside a bigram baseline, and what files ask of a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.next_step import next_step
from lowvram.cli.options import TEXTS, add_device, add_field, add_precision, count, device_words

if TYPE_CHECKING:
    from lowvram.api.evaluation import Evaluation
    from lowvram.api.measures import Measures

_DESCRIPTION = (
    "Measure a trained model. Without further options: bits per byte, how many bits the model needs for one byte of "
    "held-out text. The number does not depend on the tokenizer, so it compares any two models on the same text; a "
    "bigram model counted on the training shards stands beside it. With files: bits per byte of any text, minimal "
    "pairs, multiple choice, and what each class of Turkish suffix costs. Below some billion parameters, bits per "
    "byte and minimal pairs say most; multiple choice is near chance, which is printed."
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "evaluate", help="bits per byte, minimal pairs, multiple choice, suffixes", description=_DESCRIPTION
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run directory or one of its step-… folders")
    parser.add_argument("--data", type=Path, metavar="SHARDS", help="shards to measure on (default: the run's own)")
    parser.add_argument("--tokens", type=count, metavar="N", help="only the first N tokens of a text (default: all)")
    _add_files(parser, "text", f"bits per byte of each: {TEXTS}; or folders of shards")
    _add_files(parser, "pairs", "minimal pairs: JSON lines with sentence_good and sentence_bad, as TurBLiMP has them")
    what = "question, choices and answer, or as XCOPA, ARC, TruthfulQA and SIB-200 have them"
    _add_files(parser, "choices", f"multiple choice: JSON lines or a table with tabs, with {what}")
    what = "CoNLL-U, or a table with its columns id, form, lemma, upos and feats"
    _add_files(
        parser, "suffixes", f"analysed sentences, for bits per byte of stems and of each class of suffix: {what}"
    )
    what = "stems that `tokenizer train --morphology` has learnt: --suffixes then takes plain .txt files too"
    parser.add_argument("--stems", type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--samples", type=count, metavar="N", help="let the model write N texts, behind the run's prompts"
    )
    what = "tasks of lm-evaluation-harness, by its names or as paths of YAML files (pip install -e '.[eval]')"
    parser.add_argument("--harness", nargs="+", metavar="TASK", action="extend", help=what)
    what = "only N of each file's pairs, questions and sentences, evenly spread (default: all)"
    parser.add_argument("--items", type=count, metavar="N", help=what)
    add_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    add_precision(parser, "what the run validates in")
    add_device(parser)
    parser.set_defaults(run=run)


def _add_files(parser: argparse.ArgumentParser, name: str, help: str) -> None:
    parser.add_argument(f"--{name}", type=Path, nargs="+", metavar="FILE", action="extend", help=help)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from lowvram.api.evaluation import evaluate_task
    from lowvram.cli.console import literal
    from lowvram.cli.evaluate_tables import show_measured
    from lowvram.cli.tasks import run_task

    wanted = _read_wanted(arguments)
    given = (arguments.data, arguments.tokens, arguments.precision, arguments.device)
    found = run_task(evaluate_task(arguments.checkpoint, *given, wanted))
    if arguments.json:
        literal(json.dumps(found.as_dict()))
        return
    _show_shards(found)
    show_measured(found)
    if wanted.any_asked and not wanted.samples:
        words = next_step(
            "evaluate", arguments.checkpoint, "--samples", "3", *device_words(arguments), why="read what it writes"
        )
    else:
        words = next_step("chat", arguments.checkpoint, *device_words(arguments), why="talk to it")
    literal(words)


def show_held_out(run_dir: Path, device: str) -> None:
    """Do what `lowvram evaluate RUN --device DEVICE` does."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    run(parser.parse_args(["evaluate", str(run_dir), "--device", device]))


def _read_wanted(arguments: argparse.Namespace) -> Measures:
    from lowvram.api.measures import Measures

    return Measures(
        text=tuple(arguments.text or ()),
        pairs=tuple(arguments.pairs or ()),
        choices=tuple(arguments.choices or ()),
        suffixes=tuple(arguments.suffixes or ()),
        samples=arguments.samples or 0,
        harness=tuple(name for names in arguments.harness or () for name in names.split(",") if name),
        field=arguments.field,
        items=arguments.items,
        stems=arguments.stems,
    )


def _show_shards(found: Evaluation) -> None:
    """Print what the model scores on shards, if it was measured."""
    from lowvram.cli.console import result
    from lowvram.evaluate.verdict import compare_with_bigrams
    from lowvram.units import show_bytes

    if found.data is None:
        return
    tokens = f"{found.targets:,} tokens (BOS not counted) in windows of {found.seq_len}"
    result(f"{found.checkpoint} on {found.data}: {tokens}, weights in {found.precision}")
    result(f"  bits per byte  {found.bits_per_byte:.4f}   (loss {found.loss:.4f} nats per token)")
    for name, score in found.by_source.items():
        result(f"    {name}  {score.bits_per_byte:.4f}   ({score.targets:,} tokens, {show_bytes(score.text_bytes)})")
    if found.bigram_bits_per_byte is not None:
        result(f"  bigram model   {found.bigram_bits_per_byte:.4f}   (counted on {found.bigrams_of})")
        result(compare_with_bigrams(found.bits_per_byte, found.bigram_bits_per_byte))
