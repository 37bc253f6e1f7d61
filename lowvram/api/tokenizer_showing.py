"""How a tokenizer cuts a text, and how its words are built of stem and suffixes; prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowvram.api.tasks import Notice, Progress, Task
from lowvram.api.texts import TextOptions, find_texts, read_beside
from lowvram.api.tokenizer_training import STEMS

if TYPE_CHECKING:
    from lowvram.data.any_tokenizer import TokenPiece
    from lowvram.data.morphology.segmenter import Morpheme, Segmenter

# Some hundred screens; whoever wants more has `data pack`.
MOST_SHOWN = 100_000


@dataclass(frozen=True)
class ShownText:
    """A text as tokens, and as words where that was asked for; None where it was not.  kind: of the tokenizer."""

    text: str
    kind: str | None = None
    pieces: tuple[TokenPiece, ...] | None = None
    words: tuple[tuple[Morpheme, ...], ...] | None = None


def read_shown_text(options: TextOptions) -> Task[str]:
    """Return the beginning of some files, documents with a blank line between them, at most MOST_SHOWN characters."""
    from lowvram.data.text import documents_of

    files = yield from find_texts(options)
    found, left = [], MOST_SHOWN
    for text in documents_of(files, options.field):
        if left <= 0:
            break
        found.append(text[:left])
        left -= len(text)
    if left < 0:
        yield Notice(f"Only the first {MOST_SHOWN:,} characters are shown.")
    return "\n\n".join(found)


def show_tokens_task(text: str, tokenizer: str | Path) -> Task[ShownText]:
    """Split a text into tokens of any tokenizer that `compare_tokenizers` opens; raises DataError for an empty one."""
    from lowvram.data.any_tokenizer import check_text, open_tokenizer

    _refuse_empty(text)
    check_text(text)
    yield Progress(f"Opening {tokenizer}")
    opened = open_tokenizer(tokenizer)
    pieces = opened.split(text)
    if b"".join(piece.data for piece in pieces) != text.encode() or opened.decode(opened.encode(text)) != text:
        yield Notice(f"This tokenizer ({opened.kind}) does not give the text back as it was.", "warning")
    return ShownText(text, opened.kind, tuple(pieces))


def show_morphology_task(
    text: str, tokenizer: str | Path, language: str | Path | None, learn_from: Sequence[Path], field: str = "text"
) -> Task[ShownText]:
    """Split the words of a text into stem and suffixes, in order.

    The stems are those that the tokenizer's folder has in morphology.json, else they are learnt from `learn_from`.
    language: whose rules, None for those of morphology.json, or Turkish ones where stems are learnt.
    Raises DataError for an empty text, and where there are no stems.
    """
    from lowvram.data.any_tokenizer import check_text
    from lowvram.data.morphology.marking import find_words

    _refuse_empty(text)
    check_text(text)
    segmenter = yield from _open_segmenter(Path(tokenizer), language, learn_from, field)
    return ShownText(text, words=tuple(tuple(segmenter.name_parts(word)) for word in find_words(text)))


def _refuse_empty(text: str) -> None:
    from lowvram.errors import DataError

    if not text.strip():
        raise DataError("The text is empty.", "There is nothing to show.", "Give a text with letters.")


def _open_segmenter(
    tokenizer: Path, language: str | Path | None, learn_from: Sequence[Path], field: str
) -> Task[Segmenter]:
    from lowvram.data.morphology.rules import read_rules
    from lowvram.data.morphology.segmenter import Segmenter
    from lowvram.errors import DataError, argument

    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    file = folder / STEMS
    if learn_from:
        return (yield from _learn(TextOptions(tuple(learn_from), field), language or "tr"))
    if not file.is_file():
        why = f"Stems are learnt from text, and {folder} has no {STEMS}."
        fix = (
            f"Name some megabytes of text with {argument('text', 'FILE')}, or train a tokenizer with "
            "`lowvram tokenizer train --morphology soft`, which writes that file."
        )
        raise DataError("There are no stems to split words with.", why, fix)
    segmenter = Segmenter.load(file)
    own = segmenter.rules.file.language
    if language is not None and read_rules(language).file.language != own:
        what = f"{file} holds stems of {own!r}, not of {str(language)!r}."
        raise DataError(what, "", f"Name text of that language with {argument('text', 'FILE')}.")
    return segmenter


def _learn(options: TextOptions, language: str | Path) -> Task[Segmenter]:
    """Count the words of some texts, and learn the language's stems from them."""
    from lowvram.data.bad_rows import BadRows
    from lowvram.data.morphology.marking import find_words
    from lowvram.data.morphology.rules import read_rules
    from lowvram.data.morphology.segmenter import learn_segmenter

    rules = read_rules(language)  # before minutes of reading
    files = yield from find_texts(options)
    counts: Counter[str] = Counter()
    for text, progress in read_beside(files, options.field, BadRows(), "Counting words"):
        counts.update(find_words(text))
        yield progress
    work = learn_segmenter(counts, rules)
    while True:
        try:
            doing, done, total = next(work)
        except StopIteration as end:
            return end.value
        yield Progress(doing, done, total)
