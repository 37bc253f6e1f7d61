"""`lowvram receipt`: what was predicted for a run on a card, and what was measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.next_step import next_step

if TYPE_CHECKING:
    from lowvram.fit.receipts import Receipt


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "receipt",
        help="what was predicted for a run, and what was measured",
        description="Show the receipt of a run on an NVIDIA card: memory and speed as predicted and as measured. It "
        "names the card and the software, and no person, host, path, run or data. Receipts that are sent in correct "
        "what fit predicts for such a card.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run directory, or a receipt's file (.json)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the receipt to a file that you can send")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read the receipt, show it, and write it where that was asked for."""
    from lowvram.api.receipts import receipt
    from lowvram.cli.console import literal, result
    from lowvram.fit.receipts import write_receipt

    found = receipt(arguments.run_dir)
    if arguments.out is not None:
        write_receipt(found, arguments.out)
    if arguments.json:
        literal(found.model_dump_json())
        return
    _show(found)
    if arguments.out is None:
        name = f"receipt-{found.profile_id}.json"
        literal(next_step("receipt", arguments.run_dir, "--out", name, why="a file to send"))
        return
    result(f"Written to {arguments.out}. profiles/measured/receipts/README.md says how to send it.")
    literal(next_step("fit", "--gpu", found.profile_id, why="what is predicted for this card"))


def _show(found: Receipt) -> None:
    from rich.table import Table

    from lowvram.cli.console import lay_out, result
    from lowvram.units import show_bytes

    versions = f"lowvram {found.lowvram}, torch {found.torch}, Triton {found.triton}, Python {found.python}"
    result(f"{found.card}, driver {found.driver}, {found.system}; {versions}")
    kinds = [word for word, holds in (("compiled", found.compiled), ("CUDA graphs", found.recorded)) if holds]
    plan = f"{found.plan.micro_batch} × {found.plan.accumulate} sequences of {found.seq_len:,}, {found.precision}"
    result(
        f"{found.parameters:,} parameters, {plan}, recompute {found.plan.recompute}, {' and '.join(kinds) or 'eager'}"
    )
    table = Table("", "predicted", "measured", "predicted / measured", box=None)
    table.add_row("peak", *_row(found.predicted_peak_bytes, found.measured_peak_bytes or None, show_bytes))
    table.add_row("tokens/s", *_row(found.predicted_tokens_per_s, found.measured_tokens_per_s, _speed))
    for number, hour in enumerate(found.hours, start=1):
        pace = hour.tokens / hour.seconds if hour.seconds else None
        table.add_row(f"hour {number} ({hour.seconds / 60:.0f} min)", *_row(found.predicted_tokens_per_s, pace, _speed))
    lay_out(table)


def _row(predicted: float | None, measured: float | None, show: Callable[..., str]) -> list[str]:
    words = ["–" if value is None else show(value) for value in (predicted, measured)]
    return [*words, f"{predicted / measured:.2f}" if predicted and measured else "–"]


def _speed(value: float) -> str:
    return f"{value:,.0f}"
