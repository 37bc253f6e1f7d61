"""Finds duplicates among all parts: of documents, near ones by their signatures, and of lines; knows no text.

Everything that grows with the text lies on disk.  The first of several equal or similar documents stays, in the order
of the texts, so that neither processes nor interruptions change what is found.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowvram.config.cleaning import CleaningRules
from lowvram.data.clean.pair_buckets import Flags, PairBuckets
from lowvram.data.clean.part import Part
from lowvram.data.clean.signature import BANDS, FUNCTIONS, band_keys, similarity

_EXAMPLES = 3
_BANDS_AT_ONCE = 7
_PAIRS_AT_ONCE = 1 << 13
# Of documents with an equal band, each is compared with the first, and with as many before it.
_NEIGHBOURS = 4

# A document that is left out, the earlier one that it resembles, and how similar they are; both by their number.
Pair = tuple[int, int, float]


@dataclass
class Found:
    """What was found.  documents, near, lines: flags by number; examples: the first pairs of documents, by rule."""

    documents: Flags
    near: Flags
    lines: Flags
    examples: dict[str, list[Pair]] = field(default_factory=dict)

    def close(self) -> None:
        """Close the files."""
        for flags in (self.documents, self.near, self.lines):
            flags.close()


def find_duplicates(parts: Sequence[Part], folder: Path, rules: CleaningRules, found: Found) -> Iterator[float]:
    """Set the flags of what the rules find, and yield which share of the work is done.

    folder: where pairs are sorted.  found: made by `open_flags`.
    """
    if rules.duplicate_documents.on:
        found.examples["duplicate_documents"] = _find_equal(parts, folder / "documents", found.documents)
    yield 0.1
    if rules.near_duplicates.on:
        pairs: list[Pair] = []
        for band in range(0, BANDS, _BANDS_AT_ONCE):
            bands = range(band, min(BANDS, band + _BANDS_AT_ONCE))
            pairs = _first(pairs + _find_near(parts, folder, found, bands, rules.near_duplicates.similarity))
            yield 0.1 + 0.8 * bands.stop / BANDS
        found.examples["near_duplicates"] = pairs
    if rules.duplicate_lines.on:
        _find_lines(parts, folder / "lines", found, rules.duplicate_lines.most)
    yield 1.0


def open_flags(parts: Sequence[Part], folder: Path) -> Found:
    """Return flags for what the parts hold, none of them set."""
    folder.mkdir(parents=True, exist_ok=True)
    last = parts[-1]
    return Found(
        Flags(folder / "documents.flags", last.first_document + last.documents),
        Flags(folder / "near.flags", last.first_signed + last.signed),
        Flags(folder / "lines.flags", last.first_line + last.lines),
    )


def left_documents(part: Part, found: Found) -> NDArray[np.bool_]:
    """Return which documents of a part are no duplicates of whole documents: [documents]."""
    left = found.documents.read(part.first_document, part.documents) == 0
    near = found.near.read(part.first_signed, part.signed) != 0
    left[part.read("signed")[near]] = False
    return left


def _first(pairs: list[Pair]) -> list[Pair]:
    """Return the pairs of the first documents, one of each document."""
    by_document: dict[int, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (pair[0], -pair[2], pair[1])):
        by_document.setdefault(pair[0], pair)
    return heapq.nsmallest(_EXAMPLES, by_document.values())


def _find_equal(parts: Sequence[Part], folder: Path, flags: Flags) -> list[Pair]:
    buckets = PairBuckets(folder, parts[-1].first_document + parts[-1].documents)
    for part in parts:
        numbers = np.arange(part.first_document, part.first_document + part.documents, dtype=np.uint64)
        buckets.add(part.read("document_hashes"), numbers)
    examples: list[Pair] = []
    for keys, documents in buckets.take():
        starts, sizes = _groups(keys)
        originals = np.repeat(documents[starts], sizes)
        again = documents != originals
        flags.set(documents[again])
        nearest = np.argsort(documents[again])[:_EXAMPLES]
        chosen = zip(documents[again][nearest].tolist(), originals[again][nearest].tolist(), strict=True)
        examples = _first(examples + [(one, other, 1.0) for one, other in chosen])
    return examples


def _groups(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each run of equal keys begins, and how long it is."""
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if len(keys) else np.zeros(0, np.int64)
    return starts, np.diff(starts, append=len(keys))


def _find_near(parts: Sequence[Part], folder: Path, found: Found, bands: range, least: float) -> list[Pair]:
    total = parts[-1].first_signed + parts[-1].signed
    buckets = {band: PairBuckets(folder / f"band-{band}", total) for band in bands}
    for part in parts:
        signatures = part.read("signatures")
        is_left = found.documents.read(part.first_document, part.documents)[part.read("signed")] == 0
        numbers = (part.first_signed + np.flatnonzero(is_left)).astype(np.uint64)
        for band in bands:
            buckets[band].add(band_keys(signatures[is_left], band), numbers)
    examples: list[Pair] = []
    locate = _locator(parts)
    for band in bands:
        for keys, numbers in buckets[band].take():
            for one, other in _candidates(keys, numbers):
                known = found.near.pick(one) != 0
                one, other = one[~known], other[~known]
                similar = similarity(_read_rows(parts, locate, one), _read_rows(parts, locate, other))
                hits = similar >= least
                found.near.set(one[hits])
                places = np.argsort(one[hits])[:_EXAMPLES]
                pairs = [
                    (
                        _document_of(parts, locate, one[hits][place]),
                        _document_of(parts, locate, other[hits][place]),
                        float(similar[hits][place]),
                    )
                    for place in places
                ]
                examples = _first(examples + pairs)
    return examples


def _candidates(
    keys: NDArray[np.uint64], numbers: NDArray[np.uint64]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Yield pairs of a document and an earlier one with the same key, some at a time."""
    starts, sizes = _groups(keys)
    rank = np.arange(len(keys)) - np.repeat(starts, sizes)
    firsts = np.repeat(starts, sizes)
    for distance in range(_NEIGHBOURS + 1):
        # Distance 0 stands for the first of the group, which for its nearest neighbours is compared anyhow.
        later = np.flatnonzero(rank > _NEIGHBOURS if distance == 0 else rank >= distance)
        earlier = firsts[later] if distance == 0 else later - distance
        for start in range(0, len(later), _PAIRS_AT_ONCE):
            some = slice(start, start + _PAIRS_AT_ONCE)
            yield numbers[later[some]], numbers[earlier[some]]


def _locator(parts: Sequence[Part]) -> Callable[[NDArray[np.uint64]], NDArray[np.int64]]:
    firsts = np.array([part.first_signed for part in parts], np.uint64)
    return lambda numbers: np.searchsorted(firsts, numbers, side="right") - 1


def _read_rows(
    parts: Sequence[Part], locate: Callable[[NDArray[np.uint64]], NDArray[np.int64]], numbers: NDArray[np.uint64]
) -> NDArray[np.uint16]:
    """Return the signatures of some documents, by their number among all that have one."""
    order = np.argsort(numbers)
    owners = locate(numbers[order])
    rows = np.empty((len(numbers), FUNCTIONS), np.uint16)
    starts, sizes = _groups(owners.astype(np.uint64))
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        part, some = parts[int(owners[start])], order[start : start + size]
        rows[some] = part.read_signatures(numbers[some].astype(np.int64) - part.first_signed)
    return rows


def _document_of(
    parts: Sequence[Part], locate: Callable[[NDArray[np.uint64]], NDArray[np.int64]], number: np.uint64
) -> int:
    part = parts[int(locate(np.array([number]))[0])]
    return part.first_document + int(part.read("signed")[int(number) - part.first_signed])


def _find_lines(parts: Sequence[Part], folder: Path, found: Found, most: int) -> None:
    buckets = PairBuckets(folder, parts[-1].first_line + parts[-1].lines)
    for part in parts:
        is_left = left_documents(part, found)[part.read("line_documents")]
        numbers = (part.first_line + np.flatnonzero(is_left)).astype(np.uint64)
        buckets.add(part.read("line_hashes")[is_left], numbers)
    for keys, numbers in buckets.take():
        starts, sizes = _groups(keys)
        is_first = np.zeros(len(keys), np.bool_)
        is_first[starts] = True
        found.lines.set(numbers[(np.repeat(sizes, sizes) > most) & ~is_first])
