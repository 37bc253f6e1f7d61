"""The same sentences in several languages, from the columns of one file: which are meant, and reading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.api.tasks import Notice, Progress, Task
from lowvram.api.texts import OnBadRow, SkippedRows

if TYPE_CHECKING:
    from lowvram.data.bad_rows import BadRow, BadRows


@dataclass(frozen=True)
class ParallelOptions:
    """Which sentences are read.  languages: the columns or fields of `path`, the one that is compared with first."""

    path: Path
    languages: tuple[str, ...]
    on_bad_row: OnBadRow = "stop"


@dataclass(frozen=True)
class ParallelSentences:
    """Sentences by language, in NFC; of each row one.

    rows: how many were read.  empty: how many of them lack the sentence of each language.  left_out: how many lack one
    of any language, and are in none.  is_whole: whether all of the file was read.
    """

    path: Path
    sentences: Mapping[str, tuple[str, ...]]
    rows: int
    empty: Mapping[str, int]
    left_out: int
    is_whole: bool


def choose_sentences(
    path: Path | None, languages: Collection[str] | None, of_texts: Collection[str], on_bad_row: OnBadRow
) -> ParallelOptions | None:
    """Return what is read of a file of sentences, None for no file.  of_texts: languages where none are named.

    Raises ConfigError for languages without a file, for one that is named twice, and for fewer than two.
    """
    from lowvram.errors import ConfigError, argument

    if path is None:
        if languages:
            what = f"{argument('languages')} names {', '.join(languages)}, and there are no sentences."
            why = "It says which columns of a file are the same sentences."
            raise ConfigError(what, why, f"Name that file with {argument('parallel', 'FILE')}.")
        return None
    chosen = tuple(of_texts if languages is None else languages)
    repeated = next((language for language, count in Counter(chosen).items() if count > 1), None)
    if repeated is not None:
        raise ConfigError(f"{argument('languages')} names {repeated} twice.", "", "Name it once.")
    if len(chosen) < 2:
        named = f"is one language: {chosen[0]}" if chosen else "is no language"
        why = "Parity compares the same sentences in at least two."
        fix = f"Name their columns with {argument('languages')}, first the one that the others are compared with."
        raise ConfigError(f"There {named}.", why, fix)
    return ParallelOptions(path, chosen, on_bad_row)


def read_sentences(options: ParallelOptions, size: int) -> Task[ParallelSentences]:
    """Read rows until the sentences of one language are `size` bytes; yield notices of what was left out.

    Raises DataError where the file cannot be read, lacks a language's column, or has no row with all languages.
    """
    from lowvram.errors import DataError
    from lowvram.units import show_bytes

    skipped = SkippedRows(options.on_bad_row)
    found = yield from skipped.tell_beside(_read(options, size, skipped.bad_rows))
    yield from skipped.summarise()
    if not found.rows:
        why = "It is empty, or holds a header alone."
        raise DataError(f"{options.path} holds no sentences.", why, "Name another file.")
    if found.left_out == found.rows:
        what = f"No row of {options.path} holds a sentence in each of {', '.join(options.languages)}."
        raise DataError(what, f"Empty are {_count_empty(found)}.", "Name another file, or other columns.")
    if found.left_out:
        what = f"Left out: {found.left_out:,} of {found.rows:,} rows of {options.path}"
        yield Notice(f"{what}, where a language is empty ({_count_empty(found)}).")
    if not found.is_whole:
        yield Notice(f"Of {options.path} the first {show_bytes(size)} of a language are read; `size` changes that.")
    return found


def _count_empty(found: ParallelSentences) -> str:
    return ", ".join(f"{language} {count:,}" for language, count in found.empty.items())


def _read(options: ParallelOptions, size: int, bad_rows: BadRows) -> Task[ParallelSentences]:
    from lowvram.data.bad_rows import BadRow
    from lowvram.data.field_records import field_records

    progress = Progress(f"Reading {options.path.name}")
    yield progress

    def keep(done: int, total: int | None) -> None:
        nonlocal progress
        progress = Progress(progress.what, done, total)

    sentences: dict[str, list[str]] = {language: [] for language in options.languages}
    read_bytes, empty = Counter[str](), Counter[str]()
    rows, left_out, is_whole = 0, 0, True
    for where, record in field_records(options.path, partial(bad_rows.note_encoding, options.path), keep):
        yield progress
        texts = record if isinstance(record, BadRow) else _find_texts(where, record, options.languages)
        if isinstance(texts, BadRow):
            bad_rows.take(texts)
            continue
        read_bytes.update({language: len(text.encode()) for language, text in texts.items()})
        if rows and max(read_bytes.values()) > size:
            is_whole = False
            break
        rows += 1
        bad_rows.count_text(sum(map(len, texts.values())))
        lacking = [language for language, text in texts.items() if not text]
        empty.update(lacking)
        left_out += bool(lacking)
        for language, text in texts.items() if not lacking else ():
            sentences[language].append(text)
    if is_whole:
        bad_rows.finish()
    found = {language: tuple(texts) for language, texts in sentences.items()}
    return ParallelSentences(options.path, found, rows, empty, left_out, is_whole)


def _find_texts(where: str, record: Mapping[str, Any], languages: Collection[str]) -> dict[str, str] | BadRow:
    """Return a row's sentence in each language, "" for none; raises DataError where it has no such field."""
    from lowvram.data.fields import NO_FIELD, NULL, find_text
    from lowvram.data.nfc import nfc
    from lowvram.errors import DataError, argument

    texts: dict[str, str] = {}
    for language in languages:
        text = find_text(where, record, language)
        if isinstance(text, str):
            texts[language] = "" if text.isspace() else nfc(text)
        elif text.kind == NULL:
            texts[language] = ""
        elif text.kind == NO_FIELD:
            why = "The sentences of each language are in the column of its name."
            fix = f"Name columns that there are with {argument('languages')}."
            raise DataError(text.what, why, fix)
        else:
            return text
    return texts
