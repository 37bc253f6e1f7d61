"""`lowvram import`: another program's model as a checkpoint to start from or to talk to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "import",
        help="make a checkpoint from a transformers model",
        description="Convert a Hugging Face directory (Llama, Mistral, Qwen3, DeepSeek-V3 and their like; safetensors "
        "in fp32, bf16, fp16 or block-scaled FP8) into a checkpoint, to chat with or to name in train.start_from.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="a directory with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run directory to write; must not exist")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where tokenizer.json lies (default: in the directory itself)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Import it, and say what came out and what comes next."""
    from lowvram.api.importing import import_task
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task

    imported = run_task(import_task(arguments.directory, arguments.out, arguments.tokenizer))
    count, kind = imported.model.num_parameters(), imported.model.attention.kind
    result(f"{imported.checkpoint}: {count:,} parameters, {kind.upper()}")
    why = "--as dialogue: in turns, it has a chat template" if imported.has_foreign_template else ""
    literal(next_step("chat", imported.path, why=why))
    place = json.dumps(imported.path.as_posix(), ensure_ascii=False)  # TOML quotes a text as JSON does
    result(f"To train it further, write start_from = {place} below [train] in a run file.")
