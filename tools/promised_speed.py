"""Holds the speeds that `fit` predicts against those that others, and we, have measured: one table.

python tools/promised_speed.py [--write]

Shapes of other projects' models are evaluated by `fit` as a run file would be, on the card that they were timed on;
biases are left out.  --write puts the table into profiles/measured/promised.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.api.rehearsals import rehearse_fit
from lowvram.api.target import describe_target
from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset
from lowvram.config.train import TrainConfig

PAGE = ROOT / "profiles/measured/promised.md"
BEGIN, END = "<!-- written by tools/promised_speed.py -->", "<!-- end -->"
# Layers, width, heads, key/value heads, hidden width, vocabulary, tied: the models' published configurations.
QWEN = {
    "Qwen2.5-0.5B": (24, 896, 14, 2, 4864, 151_936, True),
    "Qwen2.5-1.5B": (28, 1536, 12, 2, 8960, 151_936, True),
    "Qwen2.5-3B": (36, 2048, 16, 2, 11_008, 151_936, True),
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


def main() -> None:
    """Print the table, row by row, and write it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    titles = ("model", "card", "precision", "predicted tokens/s", "plan", "measured", "predicted / measured", "source")
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    print("\n".join(lines), flush=True)
    for row in ROWS:
        lines.append(predict(row))
        print(lines[-1], flush=True)
    if options.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        text = "\n".join(lines)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
