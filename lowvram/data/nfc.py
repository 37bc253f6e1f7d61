"""Unicode's composed form (NFC) of any text, in time that grows with its length; knows nothing of files or tokens."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict

# Every character below U+0300 is composed and starts a new character, so a text of these alone is its own NFC.
_MAY_CHANGE = re.compile("[\u0300-\U0010ffff]")
# Python sorts the marks of one character by insertion: n marks cost n² steps, and a mark is two bytes on a wire.
# Unicode's stream-safe text has at most 30 marks in a row (UAX #15, section 13); longer runs are sorted here first.
_LONG_RUN = re.compile("[\u0300-\U0010ffff]{31,}")
# Of class 0, yet they decompose into marks; a test asks that there are no others.
_TIBETAN_VOWELS = re.compile("[\u0f73\u0f75\u0f81]")


def nfc(text: str) -> str:
    """Return the same string as `unicodedata.normalize("NFC", text)`, in linear time also for long runs of marks.

    Source: Unicode Standard Annex #15; canonical ordering is a stable sort of each run by combining class, so a
    run that is sorted beforehand has the same normal form.
    """
    if not _MAY_CHANGE.search(text):
        return text
    return unicodedata.normalize("NFC", _LONG_RUN.sub(lambda run: _sort_marks(run[0]), text))


def _sort_marks(characters: str) -> str:
    """Put the marks of each base character into canonical order."""
    if not any(map(unicodedata.combining, characters)) and not _TIBETAN_VOWELS.search(characters):
        return characters
    sorted_parts: list[str] = []
    # One list for each class that occurs.  A sort of the whole run would be one step that lets no other thread run.
    marks: defaultdict[int, list[str]] = defaultdict(list)
    for character in characters:
        if decomposed := _decompose_mark(character):
            for mark in decomposed:
                marks[unicodedata.combining(mark)].append(mark)
            continue
        _move_marks(marks, sorted_parts)
        sorted_parts.append(character)
    _move_marks(marks, sorted_parts)
    return "".join(sorted_parts)


def _move_marks(marks: dict[int, list[str]], sorted_parts: list[str]) -> None:
    for combining_class in sorted(marks):
        sorted_parts += marks[combining_class]
    marks.clear()


@functools.lru_cache(maxsize=4096)
def _decompose_mark(character: str) -> str:
    """Return a mark's decomposition, and "" for what starts a new character."""
    decomposed = unicodedata.normalize("NFD", character)
    return decomposed if unicodedata.combining(decomposed[0]) else ""
