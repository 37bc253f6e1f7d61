"""Gives each byte of a plain text the class of the stem or suffix that it belongs to, where no gold analysis exists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lowvram.data.morphology.marking import WORD
from lowvram.data.morphology.segmenter import Segmenter
from lowvram.data.nfc import nfc
from lowvram.data.text import documents
from lowvram.errors import DataError
from lowvram.evaluate.suffix_loss import Sentence
from lowvram.evaluate.turkish_suffixes import CLASSES

# Gold analyses name voice among the derivations, and take a particle for a stem.
_CLASS_OF = {name: CLASSES.index(name) for name in CLASSES}
_CLASS_OF |= {"voice": CLASSES.index("derivation"), "particle": CLASSES.index("stem")}
_OTHER = CLASSES.index("other")
# Longer lines are not sentences of which a model reads the beginning.
_LONGEST_LINE = 2_000


def read_plain_sentences(file: Path, segmenter: Segmenter) -> list[Sentence]:
    """Read the lines of a text file as sentences whose words the segmenter cuts; lines are cut at 2,000 letters.

    Raises DataError for a file that is no text, or holds no word.
    """
    lines = (line for text in documents(file) for line in _lines(nfc(text)))
    sentences = [sentence for sentence in (_lay_out(line, segmenter) for line in lines) if sentence.words]
    if not sentences:
        raise DataError(f"{file} holds no word.", "Suffixes are measured on words.", "Name another file.")
    return sentences


def _lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        plain = line.strip()
        yield from (plain[start : start + _LONGEST_LINE] for start in range(0, len(plain), _LONGEST_LINE))


def _lay_out(text: str, segmenter: Segmenter) -> Sentence:
    """Note the class of each byte; the blank before a word belongs to its stem, since tokens hold it too."""
    kind_T = np.full(len(text), _OTHER, np.uint8)
    counts = np.zeros(len(CLASSES), np.int64)
    words = unexplained = 0
    for match in WORD.finditer(text):
        words += 1
        start = match.start()
        parts = segmenter.name_parts(match[0])
        unexplained += any(part.kind == "other" for part in parts)
        if start and text[start - 1] == " ":
            kind_T[start - 1] = _CLASS_OF[parts[0].kind]
        for part in parts:
            kind = _CLASS_OF.get(part.kind, _OTHER)
            kind_T[start : start + len(part.text)] = kind
            start += len(part.text)
            counts[kind] += kind != _OTHER
    sizes = [len(letter.encode()) for letter in text]
    return Sentence(text, np.repeat(kind_T, sizes), counts, words, unexplained)
