"""Writes what commands print between the markers of the documents that show it, or checks that it stands there.

python tools/write_help.py [--check]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["COLUMNS"] = "100"
os.environ["NO_COLOR"] = "1"  # argparse colours its help from Python 3.14 on

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.cli import app
from lowvram.config.cleaning import CleaningRules
from lowvram.config.model import ModelConfig
from lowvram.config.run_file import load_preset, preset_names
from lowvram.config.train import TrainConfig
from lowvram.data.clean.report import DESCRIPTIONS
from lowvram.units import show_bytes, show_count, show_duration_range

# Of commands that only have others below them, those that are shown.
_SHOWN = {
    "tokenizer": ("tokenizer train", "tokenizer compare", "tokenizer show"),
    "data": ("data clean", "data pack", "data mix", "data look", "data exclude"),
    "service": ("service", "service install"),
}
COMMANDS = tuple(command for name in app.COMMANDS for command in _SHOWN.get(name, (name,)))
CARD = "lowvram fit --gpu rtx5070"
# The README's table: five presets on cards of 8 and 12 GB.
CARDS = ("rtx4060", "rtx3060-12gb", "rtx5060", "rtx5070")
PRESETS = ("tr-25m", "tr-60m", "tr-125m", "tr-350m", "tr-1b")


def printed_by(*words: str) -> str:
    """Return what a command prints, on Linux and without this machine's own measurements."""
    script = "from lowvram.cli.app import main; raise SystemExit(main())"
    with tempfile.TemporaryDirectory() as home:
        places = dict.fromkeys(("XDG_DATA_HOME", "LOCALAPPDATA", "HOME"), home)
        paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
        environment = os.environ | places | {"PYTHONPATH": paths, "PYTHONUTF8": "1"}
        run = subprocess.run(
            [sys.executable, "-c", script, *words], env=environment, check=True, capture_output=True, encoding="utf-8"
        )
    return "\n".join(line.rstrip() for line in run.stdout.splitlines()).rstrip()


def blocks() -> dict[tuple[str, str], str]:
    """Return what stands between each pair of markers, by document and name."""
    helps = [
        f"```text\n$ lowvram {command} --help\n{printed_by(*command.split(), '--help')}\n```\n" for command in COMMANDS
    ]
    # As it is printed on Linux, where the option is not typed: it is the default there.
    card = printed_by(*CARD.split()[1:], "--desktop", "linux").replace(" --desktop linux", "")
    fit = f"```text\n$ {CARD}\n{card}\n```\n"
    return {
        ("docs/commands.md", "help"): "\n".join(helps),
        ("docs/fit.md", "fit"): fit,
        ("README.md", "fit"): table_of_cards(),
        ("docs/presets.md", "presets"): table_of_presets(),
        ("docs/cleaning.md", "rules"): table_of_rules(),
        ("docs/cleaning.md", "thresholds"): table_of_thresholds(),
    }


def table_of_cards() -> str:
    """Return the memory and the time that five presets take on four cards."""
    asked = [json.loads(printed_by("fit", "--gpu", card, "--desktop", "linux", "--json")) for card in CARDS]
    names = [answer["gpu_name"].removeprefix("GeForce ").removesuffix(" 12GB") for answer in asked]
    limits = [f"{name}, {show_bytes(answer['limit_bytes'])}" for name, answer in zip(names, asked, strict=True)]
    lines = [f"| preset | parameters | tokens | {' | '.join(limits)} |", f"| --- | --- | --- |{' --- |' * len(CARDS)}"]
    by_name = [{model["name"]: model for model in answer["models"]} for answer in asked]
    for preset in PRESETS:
        model, train = load_preset(preset)
        cells = [fit_cell(models[preset]) for models in by_name]
        size = f"{show_count(model.num_parameters())} | {show_count(train.tokens)}"
        lines.append(f"| `{preset}` | {size} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def fit_cell(found: dict[str, Any]) -> str:
    """Return what one preset takes on one card: `3.5 GiB, 13–32 h`."""
    if not found["fits"]:
        return "does not fit"
    low, high = (days * 86_400 for days in found["days_range"])
    return f"{show_bytes(found['peak_bytes'])}, {show_duration_range(low, high)}"


def table_of_presets() -> str:
    """Return what every preset is."""
    heads = ("preset", "attention, positions", "feed-forward", "layers × width", "vocabulary", "active parameters")
    lines = [f"| {' | '.join(heads)} | parameters | tokens |", "| --- " * (len(heads) + 2) + "|"]
    order = ("tr-", "mul-")
    for name in sorted(
        preset_names(), key=lambda name: (*(not name.startswith(ours) for ours in order), load_preset(name)[1].tokens)
    ):
        model, train = load_preset(name)
        kind, sizes = model.attention.kind.upper(), f"{model.num_parameters():,} | {show_count(train.tokens)}"
        cells = (
            f"{kind}, {describe_positions(model)}",
            describe_feed_forward(model, train),
            f"{model.layers} × {model.dim}",
            f"{model.vocabulary:,}",
            f"{model.active_parameters():,}",
        )
        lines.append(f"| `{name}` | {' | '.join(cells)} | {sizes} |")
    return "\n".join(lines) + "\n"


def table_of_rules() -> str:
    """Return what each rule of `data clean` does, and its thresholds."""
    lines = ["| rule | what it does | thresholds |", "| --- | --- | --- |"]
    for name, rule in CleaningRules():
        values = rule.model_dump(mode="json", exclude={"on"})
        shown = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in values.items() if value is not None)
        unset = ", ".join(f"`{key}` (none)" for key, value in values.items() if value is None)
        lines.append(f"| `{name}` | {DESCRIPTIONS[name]} | {', '.join(filter(None, (shown, unset)))} |")
    return "\n".join(lines) + "\n"


def table_of_thresholds() -> str:
    """Return what each threshold of the rules of `data clean` means."""
    lines = ["| key | meaning |", "| --- | --- |"]
    for name, rule in CleaningRules():
        for key, field in type(rule).model_fields.items():
            if key != "on":
                assert field.description, f"{name}.{key} has no description"
                lines.append(f"| `{name}.{key}` | {field.description} |")
    return "\n".join(lines) + "\n"


def describe_positions(model: ModelConfig) -> str:
    """Return how positions enter: `RoPE + YaRN`."""
    name = {"rope": "RoPE", "alibi": "ALiBi"}[model.positions.kind]
    return f"{name} + YaRN" if getattr(model.positions, "yarn", None) is not None else name


def describe_feed_forward(model: ModelConfig, train: TrainConfig) -> str:
    """Return the kind of feed-forward layer: `MoE, 2 of 8 experts + 1 shared`."""
    ffn = model.ffn
    if ffn.kind != "moe":
        return "SwiGLU"
    learning = f", {train.rotation.window} learn at a time" if train.rotation is not None else ""
    return f"MoE, {ffn.top_k} of {ffn.experts} experts + {ffn.shared} shared{learning}"


def put_between(block: str, markers: re.Match[str]) -> str:
    """Return a block between the two markers that were found, in place of what stood there."""
    return f"{markers[1]}{block}{markers[2]}"


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a document differs; write nothing")
    check = parser.parse_args().check
    for (document, name), block in blocks().items():
        text = (ROOT / document).read_text(encoding="utf-8")
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{document} has no markers for {name}")
        written = pattern.sub(functools.partial(put_between, block), text)
        if not check:
            (ROOT / document).write_text(written, encoding="utf-8")
        elif written != text:
            sys.exit(f"{document} shows something else than the commands print; run: python tools/write_help.py")


if __name__ == "__main__":
    main()
