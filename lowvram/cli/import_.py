"""`lowvram import`: another program's model as a checkpoint, to train further or to talk to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.data.tokenizer import Tokenizer


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
    """Read, check and write the model, and show what was written."""
    from lowvram.cli.console import bar, literal, notice, result
    from lowvram.cli.next_step import next_step
    from lowvram.convert.hf.importer import import_weights
    from lowvram.convert.hf.reader import open_hf
    from lowvram.convert.hf.writer import refuse_existing
    from lowvram.data.hf_tokenizer import HfTokenizer, load_tokenizer
    from lowvram.fit.run_file_writer import tables_to_go_on
    from lowvram.shell import quote_command

    refuse_existing(arguments.out)
    outside = open_hf(arguments.directory)
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.directory, outside.config.vocabulary)
    for said in outside.notices:
        notice(said, "yellow")
    with bar("Reading") as line:
        checkpoint = import_weights(outside, tokenizer, arguments.out, lambda done, total: line.tell(done, total))
    count = outside.config.num_parameters()
    result(f"{checkpoint.directory}: {count:,} parameters, {outside.config.attention.kind.upper()}")
    # No file says whether another program's model was trained on dialogues; a template may lie beside any model.
    has_template = isinstance(tokenizer, HfTokenizer) and _has_template(tokenizer)
    literal(
        next_step("chat", arguments.out, why="--as dialogue: in turns, it has a chat template" if has_template else "")
    )
    pack = quote_command("lowvram", "data", "pack", "TEXTS", "--tokenizer", arguments.out / "tokenizer")
    result(f"To train it further, pack text with its tokenizer ({pack}), and write a run file with these tables:")
    literal("")
    literal(tables_to_go_on(outside.config, arguments.out))


def _has_template(tokenizer: Tokenizer) -> bool:
    """Say whether a model can be prompted in turns; a notice says so once if its template cannot be used."""
    from lowvram.cli.console import notice
    from lowvram.cli.spelling import as_options
    from lowvram.errors import LowvramError
    from lowvram.generate.chat_template import Message, load_chat_template

    try:
        template = load_chat_template(tokenizer)
        if template is not None:
            template.render([Message("user", "Merhaba")])
    except LowvramError as error:
        notice(as_options(f"The model is imported; its chat template cannot be used: {error}"), "yellow")
        return False
    return template is not None
