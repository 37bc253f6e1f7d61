"""Holds the speeds that `fit` predicts against those that others, and we, have measured: one table.

python tools/promised_speed.py [--kernels] [--write]

Shapes of other projects' models are evaluated by `fit` as a run file would be, on the card that they were timed on;
biases are left out.  --kernels makes the second table instead: each kernel that was timed on an H200, beside the time
that the efficiencies of `fit` give it.  --write puts a table into profiles/measured/promised.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.api.rehearsals import rehearse_fit
from lowvram.api.target import describe_target
from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset
from lowvram.config.train import TrainConfig
from lowvram.fit.memory_curve import Work
from lowvram.fit.throughput import published_rates, work_seconds
from lowvram.hardware.profile import load_profile

PAGE = ROOT / "profiles/measured/promised.md"
TIMED = ROOT / "profiles/measured/h200.json"
BEGIN, END = "<!-- written by tools/promised_speed.py -->", "<!-- end -->"
BEGIN_KERNELS, END_KERNELS = "<!-- written by tools/promised_speed.py --kernels -->", "<!-- end of kernels -->"
# Layers, width, heads, key/value heads, hidden width, vocabulary, tied: the models' published configurations.
QWEN = {
    "Qwen2.5-0.5B": (24, 896, 14, 2, 4864, 151_936, True),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 8960, 151_936, True),
    "Qwen2.5-3B": (36, 2048, 16, 2, 11_008, 151_936, True),
    "Qwen2.5-7B": (28, 3584, 28, 4, 18_944, 152_064, False),
}


class Row(NamedTuple):
    """A measured speed.  measured: tokens/s; None where nobody has measured it and only a prediction is shown."""

    model: str
    card: str
    precision: str
    measured: float | None
    source: str


_LLMQ = "LLMQ, its benchmark pages"
ROWS = (
    Row("Qwen2.5-0.5B", "rtx5060ti-16gb", "bf16", 13_010, _LLMQ),
    Row("Qwen2.5-0.5B", "rtx5060ti-16gb", "fp8", 16_600, _LLMQ),
    Row("Qwen2.5-1.5B", "rtx5060ti-16gb", "bf16", 3_900, _LLMQ),
    Row("Qwen2.5-1.5B", "rtx5060ti-16gb", "fp8", 5_768, _LLMQ),
    Row("Qwen2.5-3B", "rtx5060ti-16gb", "bf16", 2_012, _LLMQ),
    Row("Qwen2.5-3B", "rtx5060ti-16gb", "fp8", 3_129, _LLMQ),
    Row("Qwen2.5-7B", "rtx5060ti-16gb", "bf16", 889, _LLMQ),
    Row("Qwen2.5-7B", "rtx5060ti-16gb", "fp8", 1_456, _LLMQ),
    Row("Qwen2.5-0.5B", "rtx4090", "bf16", 39_800, _LLMQ),
    Row("Qwen2.5-0.5B", "rtx4090", "fp8", 47_600, _LLMQ),
    Row("Qwen2.5-1.5B", "rtx4090", "bf16", 14_100, _LLMQ),
    Row("Qwen2.5-1.5B", "rtx4090", "fp8", 20_300, _LLMQ),
    Row("tr-125m", "rtx4090", "bf16", 126_078, "a published run of 112.7 M parameters, compiled (ForgeLM)"),
    Row("tr-125m", "rtx5070", "bf16", None, "nobody yet"),
    Row("tr-125m", "rtx5070", "fp8", None, "nobody yet"),
    Row("tr-1b", "rtx5070", "bf16", None, "nobody yet"),
    Row("tr-1b", "rtx5070", "fp8", None, "nobody yet"),
)


def run_of(row: Row) -> tuple[ModelConfig, TrainConfig]:
    """Return the model and recipe of a row: presets as they are, other shapes with AdamW and bf16 weights."""
    if row.model not in QWEN:
        model, train = load_preset(row.model)
        return model, train.model_copy(update={"precision": row.precision})
    layers, dim, heads, kv_heads, hidden, vocabulary, tied = QWEN[row.model]
    given: dict[str, Any] = {
        "layers": layers,
        "dim": dim,
        "vocabulary": vocabulary,
        "attention": {"kind": "gqa", "heads": heads, "kv_heads": kv_heads, "head_dim": dim // heads, "qk_norm": False},
        "positions": {"kind": "rope", "theta": 1e6},
        "ffn": {"kind": "swiglu", "hidden": hidden},
        "tied": tied,
    }
    train = TrainConfig(
        tokens=10**9,
        seq_len=1024,
        batch_tokens=524_288,
        precision=row.precision,
        weights="bf16",
    )
    return ModelConfig.model_validate(given), train


def predict(row: Row) -> str:
    """Return a row's cells: the predicted tokens/s with their range, the plan, and predicted by measured."""
    model, train = run_of(row)
    report = rehearse_fit(row.model, model, train, describe_target(row.card).budget(row.precision))
    if report.speed is None:
        cells = (row.model, row.card, row.precision, "does not fit", "–", _of(row.measured), "–", row.source)
        return f"| {' | '.join(cells)} |"
    speed, plan = report.speed, report.search_result.plan
    how = f"{plan.micro_batch} × {plan.accumulate}, {plan.recompute}"
    predicted = f"{speed.tokens_per_second:,.0f} ({speed.low:,.0f}–{speed.high:,.0f})"
    ratio = "–" if row.measured is None else f"{speed.tokens_per_second / row.measured:.2f}"
    cells = (row.model, row.card, row.precision, predicted, how, _of(row.measured), ratio, row.source)
    return f"| {' | '.join(cells)} |"


def _of(measured: float | None) -> str:
    return "–" if measured is None else f"{measured:,.0f}"


class Timed(NamedTuple):
    """A kernel's time on the H200.  kind: which efficiencies it tests.  precision: whose rates it takes."""

    kind: str
    precision: str
    work: Work
    seconds: float


_CUBLAS, _OURS = "matrix products in bf16, cuBLAS", "matrix products in 8 bits, ours"
_GROUPED, _STREAMS = "experts' products in bf16, ours", "one pass over memory, ours"
_ATTENTION, _UPDATE = "fused attention, forward, torch's", "8-bit AdamW, ours"
_PASSES = ("quantise_rows", "quantise_columns", "quantise_weight", "add_rounded_")


def timed_kernels() -> Iterator[Timed]:
    """Yield what the report of the H200 has timed, of the kinds that a training step consists of."""
    for row in json.loads(TIMED.read_text(encoding="utf-8"))["rows"]:
        if row.get("status") != "ok" or row["kind"] not in ("kernel", "rate"):
            continue
        name, _, shape = row["name"].partition(" ")
        sizes = [int(part) for part in shape.replace(",", "").split() if part.isdigit()]
        form = shape.partition(" ")[0]
        if name in ("scaled_matmul", "grouped_matmul", "grouped_outer"):
            experts, (rows, outputs, inner) = (sizes[0], sizes[1:]) if len(sizes) == 4 else (1, sizes)
            if name == "grouped_outer":  # sums over the rows of each expert
                rows, outputs, inner = outputs, inner, rows
            yield from _times_of_product(row, form, experts, rows, outputs, inner)
        elif name in _PASSES or shape.startswith("copy"):
            moved = row["moved_bytes"] if "moved_bytes" in row else row["per_second"] * row["seconds"]
            yield Timed(_STREAMS, "bf16", Work(0.0, moved, 1.0), row["seconds"])
        elif name == "adamw8_":
            yield Timed(_UPDATE, "bf16", Work(0.0, row["moved_bytes"], 1.0), row["seconds"])
        elif name == "attention":
            work = Work(0.0, 0.0, 1.0, attention_flops=row["operations"])
            yield Timed(_ATTENTION, "bf16", work, row["seconds"])


def _times_of_product(
    row: dict[str, Any], form: str, experts: int, rows: int, outputs: int, inner: int
) -> Iterator[Timed]:
    """Yield a product of ours, and cuBLAS's of the same operations in bf16, one for all experts."""
    flops, written = 2.0 * experts * rows * outputs * inner, 2.0 * experts * rows * outputs
    read = experts * (rows + outputs) * inner
    plain = Work(flops, 2.0 * read + written, 1.0, operand_bytes=2.0 * read)
    low = Work(0.0, read + written, 1.0, low_flops=flops, operand_bytes=read)
    if form == "bf16":
        grouped = plain._replace(flops=0.0, grouped_flops=flops)
        yield Timed(_GROUPED, "bf16", grouped, row["seconds"])
    elif experts == 1:
        yield Timed(_OURS, {"e4m3": "fp8", "int8": "int8"}[form], low, row["seconds"])
    for rival in row.get("rivals", ()):
        if rival["name"] in ("cuBLAS bf16", "one dense cuBLAS bf16 product"):
            yield Timed(_CUBLAS, "bf16", plain, rival["seconds"])


def kernel_table() -> list[str]:
    """Return the second table's lines: predicted by measured, over the kernels of each kind."""
    profile = load_profile("h200")
    ratios: dict[str, list[float]] = {}
    for timed in timed_kernels():
        rates = published_rates(profile, timed.precision)  # type: ignore[arg-type]  # bf16, fp8 or int8
        assert rates is not None, "the H200 has figures"
        predicted = work_seconds(timed.work, rates, profile.platform)
        ratios.setdefault(timed.kind, []).append(predicted / timed.seconds)
    titles = ("what", "timed", "predicted / measured time: median", "least", "most")
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for kind, found in ratios.items():
        cells = (statistics.median(found), min(found), max(found))
        lines.append(f"| {kind} | {len(found)} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")
    return lines


def main() -> None:
    """Print a table, row by row, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", action="store_true", help="the kernels timed on an H200 instead")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    if options.kernels:
        lines = kernel_table()
        print("\n".join(lines))
        if options.write:
            write(lines, BEGIN_KERNELS, END_KERNELS)
        return
    titles = ("model", "card", "precision", "predicted tokens/s", "plan", "measured", "predicted / measured", "source")
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    print("\n".join(lines), flush=True)
    for row in ROWS:
        lines.append(predict(row))
        print(lines[-1], flush=True)
    if options.write:
        write(lines, BEGIN, END)


def write(lines: list[str], begin: str, end: str) -> None:
    """Put a table's lines between its two marks in the page."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    text = "\n".join(lines)
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
