"""What a model pays for stems and for each class of suffix, in bits per byte, by gold analyses of sentences.

A token may hold the end of a stem and a suffix; its cost is spread evenly over its bytes, and each byte belongs to one
class.  The blank before a word belongs to its stem, since tokens hold it too.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lowvram.data.nfc import nfc
from lowvram.data.turkish import lower_case
from lowvram.evaluate.likelihood import Request
from lowvram.evaluate.records import Record, read_records
from lowvram.evaluate.scorer import Scorer
from lowvram.evaluate.turkish_suffixes import CLASSES, Part, cut_word, read_features

_COLUMNS = ("id", "form", "lemma", "upos", "feats")
_CLOSING, _OPENING, _QUOTES = ".,;:!?…)]}%’”»", "([{‘“«", "\"'"


class Word(NamedTuple):
    """A word as it is written, its parts, None where its analysis does not explain it, and what follows it.

    has_blank: whether a blank follows; None where the file does not say.
    """

    text: str
    parts: tuple[Part, ...] | None
    is_punctuation: bool
    has_blank: bool | None = None


class Sentence(NamedTuple):
    """A sentence's text in NFC, and the class of each byte as its place in CLASSES, [bytes] uint8.

    parts: how many stems and suffixes there are of each class, [classes].  words, unexplained: without punctuation.
    """

    text: str
    kind_T: np.ndarray
    parts: np.ndarray
    words: int
    unexplained: int


@dataclass(frozen=True)
class SuffixRow:
    """What a class costs.  count: of its stems or suffixes.  bits_each: what one of them costs as a whole.

    Bits are None where the class does not occur; of "other" no parts are counted.
    """

    name: str
    count: int
    text_bytes: int
    bits_per_byte: float | None
    bits_each: float | None


@dataclass(frozen=True)
class SuffixReport:
    """What a model pays in a file of analysed sentences.

    rows: one for each class.  unexplained: words that the gold analysis does not explain; they count as "other", as
    does punctuation.  cut: sentences longer than the model reads, which were read in parts.
    """

    file: Path
    sentences: int
    words: int
    unexplained: int
    cut: int
    bits_per_byte: float
    rows: tuple[SuffixRow, ...]


def read_sentences(file: Path) -> list[Sentence]:
    """Read analysed sentences from CoNLL-U, or a table with its columns `id`, `form`, `lemma`, `upos` and `feats`.

    An empty line or another `sent_id` ends a sentence.  Blanks are where `misc` says (SpaceAfter), or else where
    Turkish spelling has them.  Raises DataError, naming the line, where a record is of another form.
    """
    return [_lay_out(words) for words in _read_words(file)]


def _read_words(file: Path) -> Iterator[list[Word]]:
    rows: list[Record] = []
    for record in read_records(file):
        if rows and (not record.values or record.values.get("sent_id") != rows[0].values.get("sent_id")):
            yield _join_rows(rows)
            rows = []
        if record.values:
            missing = [name for name in _COLUMNS if not isinstance(record.values.get(name), str)]
            if missing:
                why = f"analysed words need the columns {', '.join(_COLUMNS)}; missing: {', '.join(missing)}"
                raise record.refuse(f"{why}; it has {', '.join(record.values)}")
            rows.append(record)
    if rows:
        yield _join_rows(rows)


def _join_rows(rows: Sequence[Record]) -> list[Word]:
    """Return the words of a sentence; the rows of `6-7` and of its words 6 and 7 are one."""
    words: list[Word] = []
    place = 0
    while place < len(rows):
        row = rows[place]
        place += 1
        first, dash, last = row.text("id").partition("-")
        if not dash:
            if "." not in first:  # 8.1 is a word that is understood and not written
                words.append(_read_word(row))
            continue
        if not (first.isdecimal() and last.isdecimal()):
            raise row.refuse(f"its id is {row.text('id')!r}, neither a number nor a range like 6-7")
        inside = rows[place : place + int(last) - int(first) + 1]
        place += len(inside)
        pieces = [_read_word(part) for part in inside]
        form = nfc(row.text("form"))
        is_whole = lower_case("".join(piece.text for piece in pieces)) == lower_case(form)
        parts = [piece.parts for piece in pieces if piece.parts is not None]
        whole = tuple(part for some in parts for part in some) if is_whole and len(parts) == len(pieces) else None
        words.append(Word(form, whole, False, _has_blank(row)))
    return words


def _read_word(row: Record) -> Word:
    form, category = nfc(row.text("form")), row.text("upos")
    try:
        features = read_features(row.text("feats"))
    except ValueError as error:
        raise row.refuse(str(error)) from error
    if not form:
        raise row.refuse("its form is empty")
    is_punctuation = category in ("PUNCT", "SYM")
    parts = None if is_punctuation else cut_word(form, nfc(row.text("lemma")), category, features)
    return Word(form, tuple(parts) if parts is not None else None, is_punctuation, _has_blank(row))


def _has_blank(row: Record) -> bool | None:
    return "SpaceAfter=No" not in row.text("misc").split("|") if "misc" in row.values else None


def _lay_out(words: Sequence[Word]) -> Sentence:
    """Write the words of a sentence as a line of text, and note the class of each byte."""
    pieces: list[str] = []
    kinds: list[int] = []
    counts = np.zeros(len(CLASSES), np.int64)
    open_quotes: set[str] = set()
    needs_blank = False
    for word in words:
        is_closing = word.is_punctuation and (word.text[0] in _CLOSING or word.text in open_quotes)
        has_blank = needs_blank and (word.has_blank is not None or not is_closing)
        parts = word.parts or (Part(len(word.text), "other"),)
        if has_blank:
            kinds.append(CLASSES.index(parts[0].kind))
        pieces.append(f"{' ' if has_blank else ''}{word.text}")
        begin = 0
        for part in parts:
            letters = word.text[begin : begin + part.letters]
            kinds += [CLASSES.index(part.kind)] * len(letters.encode())
            begin += part.letters
            counts[CLASSES.index(part.kind)] += part.kind != "other"
        is_opening = word.is_punctuation and (word.text[-1] in _OPENING or (word.text in _QUOTES and not is_closing))
        if word.is_punctuation and word.text in _QUOTES:
            open_quotes ^= {word.text}
        needs_blank = not is_opening if word.has_blank is None else word.has_blank
    spoken = [word for word in words if not word.is_punctuation]
    unexplained = sum(word.parts is None for word in spoken)
    return Sentence("".join(pieces), np.array(kinds, np.uint8), counts, len(spoken), unexplained)


def measure_suffixes(
    scorer: Scorer, file: Path, sentences: Sequence[Sentence]
) -> Generator[tuple[int, int], None, SuffixReport]:
    """Read sentences and sum up the cost of each class; yields the sentences that are read and those that there are."""
    tokenizer = scorer.tokenizer
    requests = [Request((tokenizer.bos_id,), tuple(tokenizer.encode(sentence.text))) for sentence in sentences]
    found = yield from scorer.score(requests)
    nat_K, byte_K = np.zeros(len(CLASSES)), np.zeros(len(CLASSES), np.int64)
    for sentence, request, likelihood in zip(sentences, requests, found, strict=True):
        length_T = tokenizer.byte_count_V[list(request.continuation)]
        assert length_T.sum() == len(sentence.kind_T), "a tokenizer loses no byte"
        per_byte = np.repeat(likelihood.nat_T / length_T, length_T)
        nat_K += np.bincount(sentence.kind_T, per_byte, len(CLASSES))
        byte_K += np.bincount(sentence.kind_T, minlength=len(CLASSES))
    counts = np.sum([sentence.parts for sentence in sentences], axis=0)
    rows = tuple(
        _sum_up(name, int(count), int(size), float(nats))
        for name, count, size, nats in zip(CLASSES, counts, byte_K, nat_K, strict=True)
    )
    return SuffixReport(
        file,
        len(sentences),
        sum(sentence.words for sentence in sentences),
        sum(sentence.unexplained for sentence in sentences),
        sum(likelihood.was_cut for likelihood in found),
        float(nat_K.sum()) / math.log(2) / int(byte_K.sum()),
        rows,
    )


def _sum_up(name: str, count: int, size: int, nats: float) -> SuffixRow:
    bits = nats / math.log(2)
    return SuffixRow(name, count, size, bits / size if size else None, bits / count if count else None)
