"""Compares where words are cut with gold segmentations: precision, recall and F1 of boundaries; cuts no word itself.

A boundary is a place inside a word.  Micro figures count boundaries over all words, macro figures are means over words,
and a word with nothing to find and nothing found is right.  By type every word counts once, by token as often as it
occurs in the gold's text.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lowvram.errors import DataError
from lowvram.evaluate.records import read_records


class GoldWord(NamedTuple):
    """A word, its parts, which add up to it, and how often it occurs."""

    word: str
    parts: tuple[str, ...]
    occurrences: int


@dataclass(frozen=True)
class BoundaryScore:
    """Figures of one way to cut words, each in [0, 1], and None where there is nothing to divide by.

    precision, recall, f1: micro.  over, under: the share of words with a boundary too many, or one too few.
    exact: the share of words that are cut as the gold says.
    """

    words: int
    precision: float | None
    recall: float | None
    f1: float | None
    macro_precision: float
    macro_recall: float
    macro_f1: float
    over: float
    under: float
    exact: float


def read_gold(file: Path) -> list[GoldWord]:
    """Read a table with the columns `form`, `segmentation` (parts with a blank between them) and perhaps `count`.

    Raises DataError: a missing column, parts that do not add up to the form, a count that is no number above 0.
    """
    words = []
    for record in read_records(file):
        if not record.values:
            continue
        form, parts = record.text("form"), tuple(record.text("segmentation").split())
        count = str(record.values.get("count", "1"))
        if "".join(parts) != form or not form:
            raise record.refuse(f"the parts {' + '.join(parts) or 'of nothing'} do not add up to {form!r}")
        if not count.isdecimal() or int(count) < 1:
            raise record.refuse(f"its count is {count!r}, not a whole number above 0")
        words.append(GoldWord(form, parts, int(count)))
    if not words:
        raise DataError(f"{file} holds no word.", "", "Name a file of gold segmentations.")
    return words


def find_boundaries(parts: Sequence[str]) -> set[int]:
    """Return the places inside a word where one part ends and the next begins, in characters."""
    return set(itertools.accumulate(map(len, parts[:-1])))


def score_boundaries(gold: Iterable[GoldWord], cut: Callable[[str], Sequence[str]], by: str = "type") -> BoundaryScore:
    """Return how well `cut` finds the gold's boundaries.  by: "type" or "token"."""
    right = found = wanted = total = 0
    precisions = recalls = f1s = over = under = exact = 0.0
    for word in gold:
        weight = word.occurrences if by == "token" else 1
        ours, theirs = find_boundaries(cut(word.word)), find_boundaries(word.parts)
        both = len(ours & theirs)
        right, found = right + weight * both, found + weight * len(ours)
        wanted, total = wanted + weight * len(theirs), total + weight
        precision = both / len(ours) if ours else 1.0
        recall = both / len(theirs) if theirs else 1.0
        precisions, recalls = precisions + weight * precision, recalls + weight * recall
        f1s += weight * (2 * precision * recall / (precision + recall) if precision + recall else 0.0)
        over, under = over + weight * (len(ours) > both), under + weight * (len(theirs) > both)
        exact += weight * (ours == theirs)
    if not total:
        raise DataError("There is no gold word to compare with.", "", "Name a file of gold segmentations.")
    micro_precision = right / found if found else None
    micro_recall = right / wanted if wanted else None
    f1 = 2 * right / (found + wanted) if found + wanted else None
    means = (value / total for value in (precisions, recalls, f1s, over, under, exact))
    return BoundaryScore(total, micro_precision, micro_recall, f1, *means)
