"""`lowvram data mix`: domains or languages packed side by side, with the share that a run reads of each."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.mix_options import DEFAULT_MIX
from lowvram.api.packing import DEFAULT_TOKENIZER
from lowvram.cli.options import SOURCES, add_holdout, add_packing, add_shares, count, named_value, share
from lowvram.cli.texts import add_reading, read_options, report

if TYPE_CHECKING:
    from lowvram.api.mixing import Mixed


def add_mix(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    mix = actions.add_parser(
        "mix",
        help="pack domains or languages with the share of each",
        description="Pack several sources of text, such as domains or languages, each into shards of its own, and note "
        "in DIR/mix.json which share of a run each is. `lowvram fit --data DIR` and data.train in a run file take the "
        "folder, and validations then show every source. If it is interrupted, the same command continues where it "
        "stopped; with other weights it packs nothing again. More: docs/mixing.md.",
    )
    add_reading(mix, what=SOURCES)
    mix.add_argument("--tokenizer", type=Path, default=DEFAULT_TOKENIZER, metavar="DIR", help="(default: %(default)s)")
    mix.add_argument("--out", type=Path, default=DEFAULT_MIX, metavar="DIR", help="(default: %(default)s)")
    add_shares(mix, "tokens", 1.0)
    mix.add_argument(
        "--cap",
        type=named_value,
        action="append",
        default=[],
        metavar="NAME=SIZE",
        help="law=200MB: at most so much of its text, documents taken by a hash of their words; NAME as above, and "
        "then all together",
    )
    mix.add_argument("--tokens", type=count, metavar="N", help="count epochs for a run of N tokens (default: all once)")
    mix.add_argument("--demo", type=share, metavar="SHARE", help="add the demo's generated Turkish with this share")
    add_holdout(mix, "hold out this share of every source's documents, as 0.5%%, chosen by their hash")
    add_packing(mix)
    mix.set_defaults(run=run_mix, goes_on=True)


def run_mix(arguments: argparse.Namespace) -> int:
    """Mix, and show what each source is in a run and what comes next."""
    from lowvram.api.mix_options import MixOptions, name_once, read_caps, read_weights
    from lowvram.api.mixing import mix_task
    from lowvram.cli.console import literal, notice
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task

    if arguments.on_bad_row == "report":
        return report(arguments)
    wanted = MixOptions(
        arguments.tokenizer,
        arguments.out,
        read_weights(name_once("weights", arguments.weight)),
        arguments.temperature,
        read_caps(name_once("caps", arguments.cap)),
        arguments.demo,
        arguments.tokens,
        arguments.levels,
        arguments.replace,
        arguments.exclude,
    )
    mixed = run_task(mix_task(read_options(arguments), wanted, arguments.processes))
    _show(mixed)
    if not any(source.held_out_tokens for source in mixed.sources):
        notice("Nothing is held out for validation. --holdout 0.5% packs that share of the documents apart.")
    data = ("--data", mixed.data) if mixed.data is not None else ()
    literal(next_step("fit", *data, "--out", "run.toml", why="which model fits, and a run file for it"))
    return 0


def _show(mixed: Mixed) -> None:
    """Print a table of the sources, and up to how many tokens they suffice."""
    from lowvram.cli.console import lay_out, result, tabulate
    from lowvram.units import show_bytes, show_count

    has_caps = any(source.left_out_bytes for source in mixed.sources)
    names = ["source", "text", "tokens", "held out", "share", "epochs", *(["left out"] if has_caps else [])]
    rows = []
    for source, epochs in zip(mixed.sources, mixed.epochs, strict=True):
        held_out = show_count(source.held_out_tokens) if source.held_out_tokens else "–"
        cells = [show_bytes(source.text_bytes), show_count(source.tokens), held_out, f"{source.share:.2%}"]
        left_out = [show_bytes(source.left_out_bytes) if source.left_out_bytes else "–"] if has_caps else []
        rows.append((source.name, *cells, f"{epochs:,.2f}", *left_out))
    lay_out(tabulate(names, rows), is_folded=True)
    text_bytes, tokens = (sum(getattr(each, key) for each in mixed.sources) for key in ("text_bytes", "tokens"))
    result(
        f"{mixed.path}: {show_count(tokens)} tokens, {show_bytes(text_bytes)} of text in {len(mixed.sources)} sources."
    )
    most = show_count(mixed.most_tokens)
    result(
        f"Epochs are those of a run of {show_count(mixed.read_tokens)} tokens; up to {most} no source is read more "
        "than four times."
    )
    if has_caps:
        result("left out: text above a cap; which documents that is follows from a hash of their words.")
