"""Converts text to Unicode's composed form (NFC) in linear time; knows nothing of files or tokens."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import defaultdict

# Characters below U+0300 are composed and never combine with the one before, so a text of only these is NFC already.
_MAY_CHANGE = re.compile("[\u0300-\U0010ffff]")
# Python sorts the marks of one character by insertion: n marks take n² steps, and an attacker's mark costs two bytes.
# Unicode's stream-safe text has at most 30 marks in a row (UAX #15, section 13); longer runs are sorted here first.
_LONG_RUN = re.compile("[\u0300-\U0010ffff]{31,}")
# These have combining class 0 but decompose into marks; a test checks that there are no others.
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
    # One list for each class that occurs.  Sorting the whole run in one call would let no other thread run meanwhile.
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
    """Return a mark's decomposition, or "" for a character that is not a mark."""
    decomposed = unicodedata.normalize("NFD", character)
    return decomposed if unicodedata.combining(decomposed[0]) else ""
