"""Finds words that are too long to learn merges from (DNA, a key pressed for minutes); knows no tokenizer.

Training byte-pair merges costs the square of a word's length: 400,000 letters without a space take minutes.  The
longest words of natural languages stay below 200 letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Longer than any word, and than any run of white space or punctuation in the texts that lowvram was tried on.
LONGEST_WORD = 1_000
# A tokenizer's expression keeps letters together, or what is neither a letter nor a digit; digits stand alone.
_KINDS = tuple(re.compile(kind) for kind in (r"[^\W\d_]*", r"[\W_]*"))


def without_long_words(text: str) -> list[str]:
    """Return the parts of a text between runs of more than LONGEST_WORD letters, or of as many other signs.

    Such a run is in no part.  Takes time linear in the text, and little where it has no such run.
    """
    parts, end_before = [], 0
    for start, end in _long_runs(text):
        parts.append(text[end_before:start])
        end_before = end
    parts.append(text[end_before:])
    return [part for part in parts if part]


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of more than LONGEST_WORD characters of one kind.

    A run that long covers a whole block of half that length, so runs are measured only from blocks of one kind.
    """
    block = LONGEST_WORD // 2
    run_end = 0
    for place in range(0, len(text) - block + 1, block):
        if place < run_end:
            continue
        for kind in _KINDS:
            if _end_of_run(kind, text, place, place + block) < place + block:
                continue
            run_start = place - _end_of_run(kind, text[max(run_end, place - block) : place][::-1], 0, block)
            run_end = _end_of_run(kind, text, place, len(text))
            if run_end - run_start > LONGEST_WORD:
                yield run_start, run_end


def _end_of_run(kind: re.Pattern[str], text: str, start: int, most: int) -> int:
    found = kind.match(text, start, most)
    assert found is not None  # an empty run matches too
    return found.end()
