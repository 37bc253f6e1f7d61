"""Writes the model card (README.md) of an exported model: what it is, how to use it, how it was trained, on what data.

The card states only what is in the checkpoint, its run's log and the shards; everything else is called unknown.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lowvram.config.base import flatten
from lowvram.config.mix import name_folders
from lowvram.config.run import RunConfig
from lowvram.data.shard_set import ShardSet
from lowvram.errors import DataError
from lowvram.storage.checkpoint import Checkpoint
from lowvram.storage.json_files import JsonError, parse_object
from lowvram.units import show_bytes, show_count

CURVE = "training.svg"
_ROWS = 12  # of the table of losses: enough to show the curve's shape
_WIDTH, _HEIGHT, _MARGIN = 640, 260, 44


class Point(NamedTuple):
    """The log's values for a step: nats per token, and bits per byte of held-out text where that was measured."""

    step: int
    loss: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class CardContents:
    """The contents of a model card.

    numbers: the number format of the exported matrices, in words.  licence: None where the user gave none.
    needs_bos: whether users must put BOS before a text themselves.
    """

    name: str
    checkpoint: Checkpoint
    what: RunConfig
    numbers: str
    weight_bytes: int
    licence: str | None = None
    languages: tuple[str, ...] = ("tr",)
    needs_bos: bool = True
    points: Sequence[Point] = field(default_factory=tuple)


def read_curve(log: Path, last_step: int) -> list[Point]:
    """Return a run's log up to a step, one point per step; a step that was repeated after a resume counts once."""
    if not log.is_file():
        return []
    points: dict[int, Point] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_object(line)
        except JsonError:
            continue  # a power cut tore this row; the trainer continued below it
        if not isinstance(row.get("step"), int) or row["step"] > last_step:
            continue
        point = points.get(row["step"], Point(row["step"], None, None))
        if row.get("event") == "StepDone":
            points[row["step"]] = point._replace(loss=row.get("loss"))
        elif row.get("event") == "Evaluated":
            points[row["step"]] = point._replace(bits_per_byte=row.get("bits_per_byte"))
    return [points[step] for step in sorted(points)]


def write_card(contents: CardContents) -> dict[str, bytes]:
    """Return README.md and, where the run has a log, its curve, by file name."""
    curve = draw_curve(contents.points)
    files = {} if curve is None else {CURVE: curve.encode()}
    parts = [
        _front_matter(contents),
        _opening(contents),
        _use(contents),
        _model(contents),
        _training(contents, curve is not None),
    ]
    return {"README.md": "\n".join([*parts, _data(contents)]).encode(), **files}


def _front_matter(contents: CardContents) -> str:
    licence = [f"license: {contents.licence}"] if contents.licence else ["license: other", "license_name: unknown"]
    languages = ["language:", *(f"- {language}" for language in contents.languages)] if contents.languages else []
    tags = ["tags:", "- lowvram", "- text-generation"]
    return "\n".join(
        ["---", *licence, *languages, "library_name: transformers", "pipeline_tag: text-generation", *tags, "---", ""]
    )


def _opening(contents: CardContents) -> str:
    model = contents.what.model
    count, active = model.num_parameters(), model.active_parameters()
    parts = f", of which one token passes through {active:,}" if active != count else ""
    licence = contents.licence or "unknown: none was named when this directory was made, so nothing is permitted by it"
    return (
        f"# {contents.name}\n\n"
        f"A language model of {count:,} parameters{parts}, pretrained with "
        f"lowvram {contents.checkpoint.manifest['versions']['lowvram']} "
        f"and exported after step {contents.checkpoint.step:,}.\n\n"
        f"- Weights: {contents.numbers}, {show_bytes(contents.weight_bytes)}\n"
        f"- Longest text in training: {contents.what.train.seq_len:,} tokens\n"
        f"- Licence: {licence}\n"
        "- It continues texts. It was not taught to follow instructions or to refuse, and may write what is false, "
        "private or hurtful.\n"
    )


def _use(contents: CardContents) -> str:
    opening = 'ids = tokenizer("Bir gün", return_tensors="pt").input_ids\n'
    if contents.needs_bos:
        opening = (
            "# Every text that the model has read begins with this token; the tokenizer does not add it.\n"
            'ids = tokenizer(tokenizer.bos_token + "Bir gün", return_tensors="pt").input_ids\n'
        )
    return (
        "## Use\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{contents.name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{contents.name}")\n'
        f"{opening}"
        "text = tokenizer.decode(model.generate(ids, max_new_tokens=60)[0], skip_special_tokens=True)\n"
        "```\n\n"
        f"or `lowvram chat {shlex.quote(contents.name)}`.\n"
    )


def _model(contents: CardContents) -> str:
    return "## Model\n\n" + _table(flatten(contents.what.model.model_dump(mode="json")))


def _training(contents: CardContents, has_curve: bool) -> str:
    recipe = flatten(contents.what.train.model_dump(mode="json"))
    if recipe.get("start_from"):
        recipe["start_from"] = Path(recipe["start_from"]).name
    seen = contents.checkpoint.numbers().get("tokens")
    lines = ["## Training", "", f"Tokens seen: {show_count(seen) if isinstance(seen, int) else 'unknown'}.", ""]
    lines += [_table(recipe)]
    rows = _thin(contents.points)
    if rows:
        lines += [f"![Loss over the steps]({CURVE})", ""] if has_curve else []
        lines += ["| step | loss (nats per token) | held-out bits per byte |", "| ---: | ---: | ---: |"]
        lines += [f"| {row.step} | {_number(row.loss)} | {_number(row.bits_per_byte)} |" for row in rows]
    else:
        lines += ["The run's log is not beside the checkpoint; its curve is unknown."]
    return "\n".join([*lines, ""])


def _data(contents: CardContents) -> str:
    hashes = contents.checkpoint.manifest.get("hashes", {})
    lines = ["## Data", "", "| shards | share | tokens | documents | text | SHA-256 |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    corpora = [(corpus.path, f"{corpus.weight:g}") for corpus in contents.what.data.train]
    held_out = [(path, "held out") for _, path in contents.what.data.held_out]
    for rows in (corpora, held_out):
        for name, (path, share) in zip(name_folders([path for path, _ in rows]), rows, strict=True):
            lines.append(f"| {name} | {share} | {_describe_shards(path)} |")
    lines += ["", "| what | SHA-256 |", "| --- | --- |"]
    lines += [f"| {name} | `{value}` |" for name, value in sorted(hashes.items())]
    weights = contents.checkpoint.manifest["files"]["weights.safetensors"]["sha256"]
    lines += [f"| the checkpoint's weights | `{weights}` |"]
    return "\n".join([*lines, ""])


def _describe_shards(path: Path) -> str:
    try:
        shards = ShardSet.open(path)
    except DataError:
        return "unknown | unknown | unknown | not on the exporting machine"
    counts = f"{shards.tokens:,} | {shards.documents:,} | {show_bytes(shards.text_bytes)}"
    return f"{counts} | `{shards.hash}`"


def _table(values: dict[str, Any]) -> str:
    shown = {key: value for key, value in values.items() if value is not None}
    return "\n".join(
        ["| key | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in shown.items()), ""]
    )


def _thin(points: Sequence[Point]) -> list[Point]:
    """Return the first and the last point, and evenly spaced ones between; points with a validation are preferred."""
    candidates = [point for point in points if point.bits_per_byte is not None] or list(points)
    ends = [points[0], points[-1]] if points else []
    step = max(1, -(-len(candidates) // (_ROWS - len(ends))))
    return sorted({point.step: point for point in [*candidates[::step], *ends]}.values())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def draw_curve(points: Sequence[Point]) -> str | None:
    """Return the loss over the steps as an SVG, or None where there are fewer than two."""
    known = [(point.step, point.loss) for point in points if point.loss is not None]
    if len(known) < 2:
        return None
    every = max(1, len(known) // _WIDTH)
    shown = known[::every] + ([known[-1]] if (len(known) - 1) % every else [])
    (first, last), losses = (shown[0][0], shown[-1][0]), [loss for _, loss in shown]
    low, high = min(losses), max(losses)

    def coordinates(step: int, loss: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * (step - first) / max(1, last - first)
        y = _MARGIN / 2 + (_HEIGHT - 1.5 * _MARGIN) * (high - loss) / max(1e-9, high - low)
        return f"{x:.1f},{y:.1f}"

    bottom = _HEIGHT - _MARGIN
    line = " ".join(coordinates(step, loss) for step, loss in shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12" fill="#555">\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>\n'
        f'<path d="M{_MARGIN},{_MARGIN / 2:g} V{bottom} H{_WIDTH - _MARGIN}" fill="none" stroke="#999"/>\n'
        f'<polyline points="{line}" fill="none" stroke="#1f77b4" stroke-width="1.5"/>\n'
        f'<text x="4" y="{_MARGIN / 2 + 4:g}">{high:.2f}</text>\n<text x="4" y="{bottom}">{low:.2f}</text>\n'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 24}">step {first}</text>\n'
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 24}" text-anchor="end">step {last}</text>\n'
        f'<text x="{_WIDTH / 2:g}" y="{_HEIGHT - 8}" text-anchor="middle">training loss, nats per token</text>\n'
        "</svg>\n"
    )
