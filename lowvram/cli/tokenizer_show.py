"""`lowvram tokenizer show`: the tokens of a text in alternating colours, or its words as stem and suffixes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.cli.options import TEXTS, add_field

if TYPE_CHECKING:
    from rich.text import Text

    from lowvram.api.tokenizer_showing import ShownText
    from lowvram.data.any_tokenizer import TokenPiece
    from lowvram.data.morphology.segmenter import Morpheme

_STYLES = ("black on bright_cyan", "black on bright_yellow", "black on bright_green", "black on bright_magenta")
# Between tokens where no colour parts them; not the bar on keyboards, which texts hold.
_SEPARATOR = "│"
_DEFAULT = Path("tok")


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its options."""
    parser = actions.add_parser(
        "show",
        help="show the tokens of a text, or its stems and suffixes",
        description="Show where a tokenizer cuts a text: each token in another colour, or with a bar between them "
        "where there is no terminal. With --morphology: the stem and the suffixes of each word, by the language's "
        "rules, and what the stem is without suffixes where that is spelt otherwise (gid of gidiyor: git).",
    )
    parser.add_argument("words", nargs="*", metavar="TEXT", help="the text (or --file)")
    parser.add_argument("--file", type=Path, metavar="FILE", help=f"show the text of a file: {TEXTS}")
    what = "its folder or file, of any kind that `tokenizer compare` takes (default: %(default)s)"
    parser.add_argument("--tokenizer", type=Path, default=_DEFAULT, metavar="DIR", help=what)
    parser.add_argument("--ids", action="store_true", help="show the id behind each token")
    what = "name the stem and the suffixes of each word, with the stems of DIR/morphology.json or of --text"
    parser.add_argument("--morphology", action="store_true", help=what)
    what = "whose rules split words (default: those of DIR/morphology.json; with --text: tr)"
    parser.add_argument("--language", metavar="tr|kk|FILE", help=what)
    what = "learn the stems for --morphology from this text, about a minute for 10 MB"
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", action="extend", default=[], help=what)
    add_field(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Split and print."""
    from lowvram.api.tokenizer_showing import show_morphology_task, show_tokens_task
    from lowvram.cli.console import literal, out
    from lowvram.cli.tasks import run_task
    from lowvram.errors import ConfigError

    if not arguments.morphology and (arguments.language or arguments.text):
        what = "--language and --text are about stems and suffixes."
        raise ConfigError(what, "Tokens need neither.", "Add --morphology.")
    if arguments.morphology and arguments.ids:
        raise ConfigError("--ids are of tokens, not of stems and suffixes.", "", "Leave out --ids or --morphology.")
    text = _read_text(arguments)
    if arguments.morphology:
        given = (arguments.tokenizer, arguments.language, arguments.text, arguments.field)
        found = run_task(show_morphology_task(text, *given))
    else:
        found = run_task(show_tokens_task(text, arguments.tokenizer))
    if arguments.json:
        literal(json.dumps(as_dict(found), ensure_ascii=True))
    elif found.words is not None:
        _show_words(found.words)
    else:
        out.print(_lay_out_tokens(found.pieces or (), arguments.ids, out.is_terminal and not out.no_color))


def _read_text(arguments: argparse.Namespace) -> str:
    from lowvram.api.texts import TextOptions
    from lowvram.api.tokenizer_showing import read_shown_text
    from lowvram.cli.tasks import run_task
    from lowvram.errors import ConfigError

    if bool(arguments.words) == (arguments.file is not None):
        what = "There is no text." if arguments.file is None else "There are a text and a file."
        raise ConfigError(what, "One of them is shown.", "Type lowvram tokenizer show 'TEXT', or name --file FILE.")
    if arguments.file is None:
        return " ".join(arguments.words)
    return run_task(read_shown_text(TextOptions((arguments.file,), arguments.field)))


def as_dict(found: ShownText) -> dict[str, object]:
    """Return what is shown, for JSON: of a token its id and its text, with \\x numbers for half characters."""
    if found.words is not None:
        return {"words": [[part._asdict() for part in word] for word in found.words]}
    pieces = found.pieces or ()
    tokens = [{"id": int(piece.id), "text": piece.data.decode(errors="backslashreplace")} for piece in pieces]
    return {"kind": found.kind, "tokens": tokens}


def show_piece(data: bytes) -> str:
    """Return the text of a token, with numbers for control characters and for bytes that are half a character."""
    from lowvram.cli.console import escape

    text = data.decode(errors="backslashreplace").replace("\r", "\\r").replace("\t", "\\t").replace("\n", "\\n")
    return escape(text)


def _lay_out_tokens(pieces: Sequence[TokenPiece], has_ids: bool, has_colours: bool) -> Text:
    """Return the tokens one behind the other; a line ends behind a token that ends with a line end."""
    from rich.text import Text

    text = Text(no_wrap=not has_colours)
    for number, piece in enumerate(pieces):
        text.append(show_piece(piece.data), _STYLES[number % len(_STYLES)] if has_colours else "")
        if has_ids:
            text.append(f"[{piece.id}]", "dim" if has_colours else "")
        ends_line = piece.data.endswith(b"\n")
        if number + 1 < len(pieces):
            text.append(("" if has_colours else _SEPARATOR) + ("\n" if ends_line else ""))
    return text


def _show_words(words: Sequence[Sequence[Morpheme]]) -> None:
    from lowvram.cli.console import result

    if not words:
        result("The text has no words.")
    width = min(30, max((sum(len(part.text) + 1 for part in word) for word in words), default=0))
    for word in words:
        cut = "+".join(part.text for part in word)
        result(f"{cut:<{width}} {'  '.join(_name(word))}".rstrip())


def _name(word: Sequence[Morpheme]) -> Iterator[str]:
    for part in word:
        yield f"{part.text} ({part.name}: {part.lemma})" if part.lemma else f"{part.text} ({part.name})"
