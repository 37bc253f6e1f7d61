"""`lowvram chat`: text in, the model's continuation out, as it is written."""

from __future__ import annotations

import argparse
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_device, count

if TYPE_CHECKING:
    from lowvram.generate.engine import Engine
    from lowvram.generate.sampling import Sampler


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "chat",
        help="talk to a trained model",
        description="Give the model text and read how it goes on.  Each line that you type joins the text so far; "
        "Ctrl-C stops an answer, Ctrl-D or an empty line ends.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run directory or one of its step-… folders")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and exit")
    parser.add_argument("--tokens", type=count, default=128, metavar="N", help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, metavar="K", help="0 is all (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--repetition-penalty", type=float, default=1.1, metavar="R", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Answer one prompt, or turn after turn."""
    from lowvram.cli.load import load_model
    from lowvram.cli.show import notice, show_error
    from lowvram.errors import PromptError
    from lowvram.generate.decoder import Decoder
    from lowvram.generate.engine import Engine

    sampler = build_sampler(arguments)
    loaded = load_model(arguments.checkpoint, arguments.device)
    engine = Engine(Decoder(loaded.model, loaded.trained_len, dtype=loaded.dtype), loaded.tokenizer)
    if arguments.prompt is not None:
        answer(engine, arguments.prompt, sampler, arguments.tokens)
        return
    place = loaded.checkpoint.directory if loaded.checkpoint else arguments.checkpoint
    notice(f"{place}, context of {engine.max_context} tokens.  Ctrl-D ends.", "dim")
    while text := _ask():
        try:
            # A line of its own for each turn: a base model knows texts, not speakers.
            answer(engine, f"\n{text}" if engine.ids else text, sampler, arguments.tokens, shown="")
        except PromptError as error:
            show_error(str(error))


def build_sampler(arguments: argparse.Namespace) -> Sampler:
    """Return the sampler that the options describe; raises ConfigError naming the one that is out of range."""
    from pydantic import ValidationError

    from lowvram.errors import ConfigError
    from lowvram.generate.sampling import Sampler

    try:
        return Sampler(**{name: getattr(arguments, name) for name in Sampler.model_fields})
    except ValidationError as error:
        problem = error.errors()[0]
        option = f"--{str(problem['loc'][0]).replace('_', '-')}"
        raise ConfigError(f"{option} is {problem['input']}: {problem['msg'].lower()}.") from error


def answer(engine: Engine, text: str, sampler: Sampler, tokens: int, shown: str | None = None) -> None:
    """Stream the continuation of `text`, the text itself first; Ctrl-C ends the answer only."""
    from lowvram.cli.show import notice, result, stream

    pieces = engine.generate(_lengthen(engine, unicodedata.normalize("NFC", text)), sampler, tokens)
    stream(text if shown is None else shown)
    try:
        for piece in pieces:
            stream(piece)
    except KeyboardInterrupt:
        pass
    result()
    if engine.ended == "context":
        notice(f"(The context of {engine.max_context} tokens is full; a next turn keeps its newest half.)", "dim")
    elif engine.ended == "text":
        notice("(The model ended the text here.)", "dim")


def _lengthen(engine: Engine, text: str) -> list[int]:
    """Return the ids of all that was said and of `text`; what has outgrown the context keeps its newest half."""
    new = engine.tokenizer.encode(text)
    if not engine.ids:
        return [engine.tokenizer.bos_id, *new]
    kept = len(engine.ids)
    if kept + len(new) >= engine.max_context:
        kept = max(0, min(engine.max_context // 2, engine.max_context - 1 - len(new)))
    return [*engine.ids[len(engine.ids) - kept :], *new]


def _ask() -> str:
    from lowvram.cli.show import notice

    try:
        return input("› ").strip()
    except (EOFError, KeyboardInterrupt):
        notice("")  # the prompt's line is still open
        return ""
