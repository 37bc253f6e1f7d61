"""`lowvram export`: a checkpoint in the format of another program."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.api.exporting import Exported


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "export",
        help="write a trained model for other programs",
        description="Write a checkpoint's weights (the masters), its tokenizer and a model card. hf: a directory "
        "that transformers opens with no code of ours. fp8: the same with FP8 weights as DeepSeek-V3 has them. gguf: "
        "one file for llama.cpp and what is built on it.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run directory or one of its step-… folders")
    parser.add_argument("--to", choices=("hf", "fp8", "gguf"), required=True, help="the format")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="a directory, for gguf a file; must not exist"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "f16", "q8_0"),
        help="of the matrices: fp32 or bf16 for hf (default: as they are kept); any for gguf (default: bf16)",
    )
    parser.add_argument("--license", metavar="ID", help='for the card, such as "apache-2.0" (default: unknown)')
    parser.add_argument("--language", metavar="TAGS", default="tr", help="for the card (default: %(default)s)")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="FOLDER",
        help="with gguf: compare ids of 1,000 lines and 64 greedy tokens with llama.cpp's programs in this folder",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the export, and show where it is."""
    from lowvram.api.exporting import ExportSettings, export_task
    from lowvram.cli.tasks import run_task

    options = ExportSettings(arguments.to, arguments.dtype, arguments.license, arguments.language, arguments.verify)
    exported = run_task(export_task(arguments.checkpoint, arguments.out, options))
    if arguments.to == "gguf":
        _show_file(exported)
    else:
        _show_directory(exported)


def _show_directory(exported: Exported) -> None:
    from lowvram.cli.console import literal, result
    from lowvram.cli.next_step import next_step
    from lowvram.units import show_bytes

    result(f"{exported.path}: step {exported.step}, {show_bytes(exported.size_bytes)} of weights")
    literal(next_step("chat", exported.path, why="opens what was written"))


def _show_file(exported: Exported) -> None:
    from lowvram.api.exporting import compare_with_llama_cpp
    from lowvram.cli.console import literal, result
    from lowvram.cli.tasks import run_task
    from lowvram.convert.gguf.writer import LEAST_BUILD, LEAST_PYTHON
    from lowvram.generate.chat_template import is_dialogue
    from lowvram.shell import quote_command
    from lowvram.units import show_bytes

    result(f"{exported.path}: {exported.tensors} tensors, {show_bytes(exported.size_bytes)}")
    result(
        f"It needs llama.cpp {LEAST_BUILD} or llama-cpp-python {LEAST_PYTHON}, or newer: older ones do not know its "
        "pre-tokenizer (ufakzeka)."
    )
    if exported.comparison is not None:
        found = run_task(compare_with_llama_cpp(exported.comparison))
        rest = "" if found.gap is None else f", then two logits only {abs(found.gap):.3f} apart"
        result(f"Verified: {found.ids:,} ids are equal, and {found.tokens} of {found.of} greedy tokens{rest}.")
    if is_dialogue(exported.tokenizer):
        literal(f"Next: {quote_command('llama-server', '-m', exported.path)}  (llama.cpp's own chat page)")
    else:
        command = quote_command("llama-completion", "-m", exported.path, "-no-cnv", "-p", "Ankara'nın en")
        literal(f"Next: {command}  (it continues the text)")
