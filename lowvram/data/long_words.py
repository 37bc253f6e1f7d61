"""Removes words that are too long to learn merges from (DNA, a key held down for minutes); knows no tokenizer.

The time to train byte-pair merges grows with the square of a word's length: 400,000 letters without a space take
minutes.  The longest words of natural languages have fewer than 200 letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Longer than any word, and than any run of white space or punctuation in the texts that lowvram was tried on.
LONGEST_WORD = 1_000
# A tokenizer's regular expression keeps letters together, or characters that are neither letters nor digits; each digit
# is a word of its own.
_KINDS = tuple(re.compile(kind) for kind in (r"[^\W\d_]*", r"[\W_]*"))


def without_long_words(text: str) -> list[str]:
    """Return a text without runs of more than LONGEST_WORD letters or other characters, as the parts between them.

    Takes time linear in the text, and little where there is no such run.
    """
    parts, end_before = [], 0
    for start, end in _long_runs(text):
        parts.append(text[end_before:start])
        end_before = end
    parts.append(text[end_before:])
    return [part for part in parts if part]


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of more than LONGEST_WORD characters of one kind.

    A run of that length covers a whole block of half the length, so runs are measured only from blocks of one kind.
    """
    block = LONGEST_WORD // 2
    run_end = 0
    for start in range(0, len(text) - block + 1, block):
        if start < run_end:
            continue
        for kind in _KINDS:
            if _end_of_run(kind, text, start, start + block) < start + block:
                continue
            run_start = start - _end_of_run(kind, text[max(run_end, start - block) : start][::-1], 0, block)
            run_end = _end_of_run(kind, text, start, len(text))
            if run_end - run_start > LONGEST_WORD:
                yield run_start, run_end


def _end_of_run(kind: re.Pattern[str], text: str, start: int, limit: int) -> int:
    match = kind.match(text, start, limit)
    assert match is not None  # an empty run matches too
    return match.end()
