"""The README.md that goes with an exported model: what it is, how to use it, how and from what it was made.

Says only what the checkpoint, its run's log and the shards say; what none of them knows is called unknown.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lowvram.config.base import flatten
from lowvram.config.run import RunConfig
from lowvram.data.shard_set import ShardSet
from lowvram.errors import DataError
from lowvram.storage.checkpoint import Checkpoint
from lowvram.storage.json_files import JsonError, parse_object
from lowvram.units import show_bytes, show_count

CURVE = "training.svg"
_ROWS = 12  # of the table: a curve's shape at a glance
_WIDTH, _HEIGHT, _MARGIN = 640, 260, 44


class Point(NamedTuple):
    """What the log says of a step: nats per token, and bits per byte of held-out text where it was measured."""

    step: int
    loss: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class Story:
    """What a card tells.

    numbers: of the matrices in the directory, as words.  licence: None where nobody said.  needs_bos: whether it is the
    user who puts BOS before a text.
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
    """Return a run's log up to a step, one point a step; a step that was made again after a resume counts once."""
    if not log.is_file():
        return []
    found: dict[int, Point] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_object(line)
        except JsonError:
            continue  # torn by a power cut; the trainer goes on below it
        if not isinstance(row.get("step"), int) or row["step"] > last_step:
            continue
        before = found.get(row["step"], Point(row["step"], None, None))
        if row.get("event") == "StepDone":
            found[row["step"]] = before._replace(loss=row.get("loss"))
        elif row.get("event") == "Evaluated":
            found[row["step"]] = before._replace(bits_per_byte=row.get("bits_per_byte"))
    return [found[step] for step in sorted(found)]


def write_card(story: Story) -> dict[str, bytes]:
    """Return README.md and, where the run has a log, its curve, by file name."""
    curve = draw_curve(story.points)
    files = {} if curve is None else {CURVE: curve.encode()}
    parts = [_front_matter(story), _opening(story), _use(story), _model(story), _training(story, curve is not None)]
    return {"README.md": "\n".join([*parts, _data(story)]).encode(), **files}


def _front_matter(story: Story) -> str:
    licence = [f"license: {story.licence}"] if story.licence else ["license: other", "license_name: unknown"]
    languages = ["language:", *(f"- {language}" for language in story.languages)] if story.languages else []
    tags = ["tags:", "- lowvram", "- text-generation"]
    return "\n".join(
        ["---", *licence, *languages, "library_name: transformers", "pipeline_tag: text-generation", *tags, "---", ""]
    )


def _opening(story: Story) -> str:
    model = story.what.model
    count, active = model.num_parameters(), model.active_parameters()
    parts = f", of which one token passes through {active:,}" if active != count else ""
    licence = story.licence or "unknown: whoever made this directory named none, so nothing is permitted by it"
    return (
        f"# {story.name}\n\n"
        f"A language model of {count:,} parameters{parts}, pretrained with "
        f"lowvram {story.checkpoint.manifest['versions']['lowvram']} "
        f"and exported after step {story.checkpoint.step:,}.\n\n"
        f"- Weights: {story.numbers}, {show_bytes(story.weight_bytes)}\n"
        f"- Longest text in training: {story.what.train.seq_len:,} tokens\n"
        f"- Licence: {licence}\n"
        "- It continues texts.  It was not taught to follow instructions or to refuse, and may write what is false, "
        "private or hurtful.\n"
    )


def _use(story: Story) -> str:
    opening = 'ids = tokenizer("Bir gün", return_tensors="pt").input_ids\n'
    if story.needs_bos:
        opening = (
            "# Every text that the model has read begins with this token; the tokenizer does not add it.\n"
            'ids = tokenizer(tokenizer.bos_token + "Bir gün", return_tensors="pt").input_ids\n'
        )
    return (
        "## Use\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{story.name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{story.name}")\n'
        f"{opening}"
        "text = tokenizer.decode(model.generate(ids, max_new_tokens=60)[0], skip_special_tokens=True)\n"
        "```\n\n"
        f"or `lowvram chat {shlex.quote(story.name)}`.\n"
    )


def _model(story: Story) -> str:
    return "## Model\n\n" + _table(flatten(story.what.model.model_dump(mode="json")))


def _training(story: Story, has_curve: bool) -> str:
    recipe = flatten(story.what.train.model_dump(mode="json"))
    if recipe.get("start_from"):
        recipe["start_from"] = Path(recipe["start_from"]).name
    seen = story.checkpoint.numbers().get("tokens")
    lines = ["## Training", "", f"Tokens seen: {show_count(seen) if isinstance(seen, int) else 'unknown'}.", ""]
    lines += [_table(recipe)]
    rows = _thin(story.points)
    if rows:
        lines += [f"![Loss over the steps]({CURVE})", ""] if has_curve else []
        lines += ["| step | loss (nats per token) | held-out bits per byte |", "| ---: | ---: | ---: |"]
        lines += [f"| {row.step} | {_number(row.loss)} | {_number(row.bits_per_byte)} |" for row in rows]
    else:
        lines += ["The run's log is not beside the checkpoint; its curve is unknown."]
    return "\n".join([*lines, ""])


def _data(story: Story) -> str:
    hashes = story.checkpoint.manifest.get("hashes", {})
    lines = ["## Data", "", "| shards | share | tokens | documents | text | SHA-256 |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    corpora = [(corpus.path, f"{corpus.weight:g}") for corpus in story.what.data.train]
    held_out = [(story.what.data.valid, "held out")] if story.what.data.valid is not None else []
    for path, share in [*corpora, *held_out]:
        lines.append(f"| {path.name} | {share} | {_describe_shards(path)} |")
    lines += ["", "| what | SHA-256 |", "| --- | --- |"]
    lines += [f"| {name} | `{value}` |" for name, value in sorted(hashes.items())]
    weights = story.checkpoint.manifest["files"]["weights.safetensors"]["sha256"]
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
    """Return some of the points, evenly, the first, the last and where possible those with a validation."""
    told = [point for point in points if point.bits_per_byte is not None] or list(points)
    ends = [points[0], points[-1]] if points else []
    step = max(1, -(-len(told) // (_ROWS - len(ends))))
    return sorted({point.step: point for point in [*told[::step], *ends]}.values())


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

    def place(step: int, loss: float) -> str:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * (step - first) / max(1, last - first)
        y = _MARGIN / 2 + (_HEIGHT - 1.5 * _MARGIN) * (high - loss) / max(1e-9, high - low)
        return f"{x:.1f},{y:.1f}"

    bottom = _HEIGHT - _MARGIN
    line = " ".join(place(step, loss) for step, loss in shown)
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
