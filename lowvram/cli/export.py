"""`lowvram export`: a checkpoint in the format of another program."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig
    from lowvram.convert.gguf.verify import Programs
    from lowvram.convert.model_card import Story
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.generate.weights import CheckpointReader
    from lowvram.storage.checkpoint import Checkpoint

_SAID = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp8": "FP8 (E4M3) in blocks of 128 × 128, the rest in bf16 and fp32; transformers opens them with `accelerate`",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "export",
        help="write a trained model for other programs",
        description="Write a checkpoint's weights, the masters, with its tokenizer and a model card.  hf: a directory "
        "that transformers opens with no code of ours.  fp8: the same with FP8 weights as DeepSeek-V3 has them.  gguf: "
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
    parser.add_argument(
        "--license", metavar="ID", help='for the card, such as "apache-2.0" (default: said to be unknown)'
    )
    parser.add_argument("--language", metavar="TAGS", default="tr", help="for the card (default: %(default)s)")
    parser.add_argument(
        "--verify",
        type=Path,
        metavar="FOLDER",
        help="with gguf: compare ids of 1,000 lines and 64 greedy tokens with llama.cpp's programs in this folder",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write it and say where."""
    from lowvram.cli.console import notice
    from lowvram.cli.load import read_config
    from lowvram.convert.hf.writer import refuse_existing
    from lowvram.data.hf_tokenizer import load_tokenizer
    from lowvram.generate.weights import CheckpointReader
    from lowvram.storage.checkpoint import find_checkpoint
    from lowvram.train.start import check_readable

    _check_options(arguments)
    refuse_existing(arguments.out)
    checkpoint, passed_over = find_checkpoint(arguments.checkpoint, needs_state=False, check=check_readable)
    for problem in passed_over:
        notice(f"Passed over a corrupt checkpoint: {problem}", "yellow")
    if checkpoint.notice:
        notice(checkpoint.notice)
    what = read_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint.directory)
    source = CheckpointReader(checkpoint, what.model)
    if arguments.to == "gguf":
        _write_gguf(arguments, source, tokenizer, what)
    else:
        _write_directory(arguments, source, tokenizer, checkpoint, what)


def _check_options(arguments: argparse.Namespace) -> None:
    from lowvram.errors import ConfigError

    known = {"hf": ("fp32", "bf16"), "fp8": (), "gguf": ("fp32", "bf16", "f16", "q8_0")}[arguments.to]
    if arguments.dtype is not None and arguments.dtype not in known:
        fix = f"Take one of {', '.join(known)}, or leave --dtype out." if known else "Leave --dtype out."
        raise ConfigError(f"--dtype {arguments.dtype} does not go with --to {arguments.to}.", "", fix)
    if arguments.verify is not None and arguments.to != "gguf":
        raise ConfigError("--verify is given without --to gguf.", "It asks llama.cpp.", "Leave it out, or add that.")
    # They stand in the card's YAML: what could end a line there has no place in them.
    if arguments.license is not None and not re.fullmatch(r"[A-Za-z0-9.+-]+", arguments.license):
        why = "The card names a licence by its identifier: letters, digits, dots and hyphens."
        raise ConfigError(f"--license {arguments.license} is no identifier.", why, "Write --license apache-2.0.")
    if not re.fullmatch(r"([A-Za-z-]{2,12}(,[A-Za-z-]{2,12})*)?", arguments.language):
        why = "The card lists tags such as tr, en or tr,en."
        raise ConfigError(f"--language {arguments.language} names no languages.", why, "Write --language tr.")


def _write_directory(
    arguments: argparse.Namespace,
    source: CheckpointReader,
    tokenizer: Tokenizer,
    checkpoint: Checkpoint,
    what: RunConfig,
) -> None:
    from lowvram.cli.console import bar, literal, result
    from lowvram.cli.next_step import next_step
    from lowvram.convert.hf.writer import ExportOptions, estimate_bytes, write_directory
    from lowvram.convert.model_card import write_card
    from lowvram.data.hf_tokenizer import HfTokenizer
    from lowvram.units import show_bytes

    numbers = "fp8" if arguments.to == "fp8" else arguments.dtype
    needs_bos = not isinstance(tokenizer, HfTokenizer)
    story = _tell_story(arguments, checkpoint, what, numbers, estimate_bytes(source, numbers), needs_bos)
    with bar("Writing") as line:
        wish = ExportOptions(what.train.seq_len, numbers)
        size = write_directory(
            source, tokenizer, arguments.out, wish, write_card(story), lambda done, total: line.tell(done, total)
        )
    result(f"{arguments.out}: step {checkpoint.step}, {show_bytes(size)} of weights")
    literal(next_step("chat", arguments.out, why="what is written, read back"))


def _tell_story(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    what: RunConfig,
    numbers: str | None,
    size: int,
    needs_bos: bool,
) -> Story:
    from lowvram.convert.model_card import Story, read_curve

    return Story(
        name=arguments.out.resolve().name,
        checkpoint=checkpoint,
        what=what,
        numbers=_SAID[numbers or what.train.weights],
        weight_bytes=size,
        licence=arguments.license,
        languages=tuple(filter(None, arguments.language.split(","))),
        needs_bos=needs_bos,
        points=read_curve(checkpoint.directory.parent / "log.jsonl", checkpoint.step),
    )


def _write_gguf(arguments: argparse.Namespace, source: CheckpointReader, tokenizer: Tokenizer, what: RunConfig) -> None:
    from lowvram.cli.console import bar, literal, notice, result
    from lowvram.cli.next_step import quote_command
    from lowvram.convert.gguf.verify import find_programs
    from lowvram.convert.gguf.writer import LEAST_BUILD, LEAST_PYTHON, write_gguf
    from lowvram.data.hf_tokenizer import HfTokenizer
    from lowvram.errors import TokenizerError
    from lowvram.generate.chat_template import is_dialogue
    from lowvram.units import show_bytes

    if isinstance(tokenizer, HfTokenizer):
        why = "llama.cpp knows pre-tokenizers by name, and lowvram knows the name of its own only."
        raise TokenizerError("This model's tokenizer is another program's.", why, "Export it with --to hf.")
    # Before anything is written: a wrong folder is said at once.
    programs = None if arguments.verify is None else find_programs(arguments.verify)
    numbers = {"fp32": "f32"}.get(arguments.dtype, arguments.dtype) or "bf16"
    said = {"name": arguments.out.stem, "license": arguments.license or "unknown"}
    with bar("Writing"):
        written = write_gguf(source, tokenizer, arguments.out, what.train.seq_len, numbers, said)
    if written.kept_wider:
        notice(f"{len(written.kept_wider)} matrices are in f16: blocks of 32 do not cut their rows.")
    result(f"{written.path}: {written.tensors} tensors, {show_bytes(written.size_bytes)}")
    result(
        f"It needs llama.cpp {LEAST_BUILD} or llama-cpp-python {LEAST_PYTHON}, or newer: older ones do not know its "
        "pre-tokenizer (ufakzeka)."
    )
    if programs is not None:
        _verify(programs, arguments.out, numbers, source, tokenizer, what.train.seq_len)
    if is_dialogue(tokenizer):
        literal(f"Next: {quote_command('llama-server', '-m', arguments.out)}  (llama.cpp's own page to talk in)")
    else:
        command = quote_command("llama-completion", "-m", arguments.out, "-no-cnv", "-p", "Ankara'nın en")
        literal(f"Next: {command}  (it goes on with the text)")


def _verify(
    programs: Programs, file: Path, numbers: str, source: CheckpointReader, tokenizer: Tokenizer, max_context: int
) -> None:
    import torch

    from lowvram.cli.console import bar, result
    from lowvram.convert.gguf.verify import verify
    from lowvram.errors import ExportError
    from lowvram.generate.decoder import Decoder
    from lowvram.generate.weights import load_for_inference

    with bar("Comparing with llama.cpp"):
        model = load_for_inference(source, "fp32", flow=torch.float32)
        found = verify(programs, file, numbers, tokenizer, Decoder(model, max_context, dtype=torch.float32))
    if found.gap is not None and not found.is_tie:
        raise ExportError(
            f"llama.cpp writes another text after {found.tokens} of {found.of} greedy tokens.",
            f"There our logits differ by {found.gap:.3f}, which rounding to {numbers} does not explain.",
            "Export with --dtype fp32 and verify again; if it differs there, too, please report it.",
        )
    rest = "" if found.gap is None else f", then two logits only {abs(found.gap):.3f} apart"
    result(f"Verified: {found.ids:,} ids are equal, and {found.tokens} of {found.of} greedy tokens{rest}.")
