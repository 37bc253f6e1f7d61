"""Marks in a text where its words are cut, so that merges are learnt from morphemes; knows no tokenizer's vocabulary.

Only the training of the merges sees the marks: the tokenizer is the same kind of file with them and without.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from lowvram.data.morphology.segmenter import Segmenter
from lowvram.data.tokenizer import MARK

Marking = Literal["soft", "strict"]
MARKINGS: tuple[Marking, ...] = ("soft", "strict")
# Some 150 MB of words.
_MOST_KEPT = 1_000_000
# Words as the rules know them: letters, with at most one apostrophe between two of them.
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Return how often each word occurs in texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(find_words(text))
    return counts


def find_words(text: str) -> list[str]:
    """Return the words of a text, in order."""
    return WORD.findall(text)


class Marker:
    """Rewrites texts for the training of merges.

    strict: every word is cut, so that no token reaches over a morpheme's end.  soft: each text comes cut and whole, so
    that a merge inside a morpheme counts twice as much as one over its end.
    """

    def __init__(self, segmenter: Segmenter, marking: Marking) -> None:
        self._segmenter, self._marking = segmenter, marking
        self._marked: dict[str, str] = {}

    def rewrite(self, text: str) -> Iterator[str]:
        """Yield the texts to learn from in place of `text`."""
        plain = text.replace(MARK, "")
        yield WORD.sub(self._mark, plain)
        if self._marking == "soft":
            yield plain

    def _mark(self, match: re.Match[str]) -> str:
        word = match[0]
        marked = self._marked.get(word)
        if marked is None:
            if len(self._marked) >= _MOST_KEPT:
                self._marked.clear()
            marked = self._marked[word] = MARK.join(self._segmenter.segment(word))
        return marked
