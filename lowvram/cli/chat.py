"""`lowvram chat`: talk to a trained model, or let it continue a text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import add_device, add_precision, context_length, count
from lowvram.cli.sampler import add_sampler, sampler_of

if TYPE_CHECKING:
    from lowvram.api.loading import LoadedModel
    from lowvram.data.tokenizer import Tokenizer
    from lowvram.generate.conversation import Conversation
    from lowvram.generate.sampling import Sampler
    from lowvram.model.kv_cache import CacheFormat

_DESCRIPTION = """Talk to a model. One that was trained on dialogues answers in turns; any other continues the
text so far, to which each line that you type is added. Ctrl-C stops an answer, Ctrl-D ends."""
_EXAMPLES = """examples:
  lowvram chat runs/first                                a conversation; /help lists the commands
  lowvram chat runs/first --prompt "Ankara'nın en"       continue this text once, then exit
  lowvram chat runs/first --prompt - < soru.txt          read the prompt from a file
  lowvram chat runs/first --temperature 0 --tokens 400   always the most likely token, and a longer answer
  lowvram chat runs/first --precision bf16               without rounding the weights to 8 bits
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "chat",
        help="talk to a trained model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run directory or one of its step-… folders")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this once and exit; - reads standard input")
    parser.add_argument("--json", action="store_true", help="with --prompt: one object, for programs")
    parser.add_argument("--system", metavar="TEXT", help="instruction for a dialogue model")
    parser.add_argument(
        "--as",
        choices=("base", "dialogue"),
        dest="form",
        help="dialogue: answer in turns; base: continue a text (default: as trained)",
    )
    parser.add_argument(
        "--newest", action="store_true", help="of a prompt that is too long, read only the newest part that fits"
    )
    parser.add_argument(
        "--context",
        type=context_length,
        metavar="N",
        help="tokens of context (default: the length that it was trained on)",
    )
    parser.add_argument(
        "--cache", choices=("plain", "fp8"), default="plain", help="fp8: keep MLA's cache in 8 bits, in half the memory"
    )
    parser.add_argument("--no-history", action="store_true", help="do not keep the lines that you type")
    parser.add_argument(
        "--tokens", type=count, default=128, metavar="N", help="maximum tokens of an answer (default: %(default)s)"
    )
    add_sampler(parser)
    add_precision(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer one prompt, or turn after turn."""
    from lowvram.api.context import find_max_context
    from lowvram.api.loading import load_model
    from lowvram.api.models import choose_cache
    from lowvram.cli.repl import Repl
    from lowvram.cli.tasks import run_task
    from lowvram.errors import ConfigError

    sampler = sampler_of(arguments)
    if arguments.json and arguments.prompt is None:
        raise ConfigError(
            "--json is given without --prompt.",
            "It prints one object, which a conversation is not.",
            "Add --prompt TEXT.",
        )
    text = _read_prompt(arguments.prompt)
    loaded = run_task(load_model(arguments.checkpoint, arguments.device, arguments.precision))
    cache = choose_cache(loaded, arguments.cache)
    context = run_task(find_max_context(loaded, 1, arguments.context, cache))
    conversation = open_conversation(loaded, context.max_context, arguments, cache)
    if text is not None:
        _answer_once(conversation, text, sampler, arguments)
        return 0
    notes = [
        f"Weights in {loaded.precision}: {loaded.reason}. Context of {context.reason}",
        _describe_form(loaded.tokenizer, in_turns=conversation.template is not None),
    ]
    repl = Repl(conversation, sampler, arguments.tokens, notes, context.warning, context.trained_len, arguments.newest)
    return repl.run(keeps_history=not arguments.no_history)


def _describe_form(tokenizer: Tokenizer, in_turns: bool) -> str:
    """Return how the model is prompted, and whether it was trained like that."""
    from lowvram.data.hf_tokenizer import HfTokenizer
    from lowvram.generate.chat_template import is_dialogue

    if in_turns and not is_dialogue(tokenizer):
        if isinstance(tokenizer, HfTokenizer):
            return "The model is prompted in turns, with its chat template; no file says if it was trained so."
        return "The model was trained on plain text and is prompted in turns (--as dialogue), which it has not learnt."
    if not in_turns and is_dialogue(tokenizer):
        return "The model was trained to answer in turns and is used to continue a text (--as base)."
    return "The model answers in turns." if in_turns else "The model continues a text."


def open_conversation(
    loaded: LoadedModel, max_context: int, arguments: argparse.Namespace, cache: CacheFormat
) -> Conversation:
    """Return a conversation with the model, in turns or as one text; raises where the options and it disagree."""
    from lowvram.api.typed_text import read_typed
    from lowvram.errors import ConfigError
    from lowvram.generate.chat_template import choose_template
    from lowvram.generate.conversation import Conversation
    from lowvram.generate.decoder import Decoder
    from lowvram.generate.engine import Engine

    template = choose_template(loaded.tokenizer, arguments.form)
    if arguments.system and template is None:
        raise ConfigError(
            "--system is given, and this model continues a text.",
            "A plain text has no turns, so it has no place for a system message.",
            "Leave it out, or try --as dialogue.",
        )
    decoder = Decoder(loaded.model, max_context, dtype=loaded.dtype, cache=cache)
    system = read_typed(arguments.system) if arguments.system else None
    return Conversation(Engine(decoder, loaded.tokenizer), template, system)


def _read_prompt(given: str | None) -> str | None:
    if given is None:
        return None
    from lowvram.api.typed_text import read_typed

    return read_typed(sys.stdin.read().removesuffix("\n") if given == "-" else given)


def _answer_once(conversation: Conversation, text: str, sampler: Sampler, arguments: argparse.Namespace) -> None:
    """Stream the answer to one prompt (of a base model, after the prompt itself); Ctrl-C ends it early."""
    from lowvram.cli.console import AnswerStream

    pieces = conversation.ask(text, sampler, arguments.tokens, arguments.newest)
    if arguments.json:
        answer = "".join(pieces)
        counts = conversation.counts
        found = {"text": answer, "ended": conversation.engine.ended, "tokens_read": counts.read}
        found |= {"tokens_written": counts.written, "seconds": counts.read_s + counts.written_s}
        sys.stdout.write(json.dumps(found) + "\n")
        return
    answer_stream = AnswerStream()
    if conversation.template is None:
        answer_stream.write(text)
    try:
        for piece in pieces:
            answer_stream.write(piece)
    except KeyboardInterrupt:
        pass
    answer_stream.end()
