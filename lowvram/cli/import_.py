"""`lowvram import`: another program's model as a checkpoint, to train further or to talk to."""

from __future__ import annotations

import argparse
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
        "--tokenizer", type=Path, metavar="DIR", help="the folder of tokenizer.json (default: the model's)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Import the model, and show what was written and what comes next."""
    from lowvram.api.importing import import_task
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step
    from lowvram.cli.tasks import run_task
    from lowvram.fit.run_file_writer import tables_to_go_on
    from lowvram.shell import quote_command

    imported = run_task(import_task(arguments.directory, arguments.out, arguments.tokenizer))
    count, kind = imported.model.num_parameters(), imported.model.attention.kind
    result(f"{imported.checkpoint}: {count:,} parameters, {kind.upper()}")
    why = "--as dialogue: in turns, it has a chat template" if imported.has_foreign_template else ""
    literal(next_step("chat", imported.path, why=why))
    pack = quote_command("lowvram", "data", "pack", "TEXTS", "--tokenizer", imported.path / "tokenizer")
    result(f"To train it further, pack text with its tokenizer ({pack}), and write a run file with these tables:")
    literal("")
    literal(tables_to_go_on(imported.model, imported.path))
