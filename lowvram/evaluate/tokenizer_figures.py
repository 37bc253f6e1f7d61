"""Measures a tokenizer on texts of one language: how much a token holds, what is lost, how fast it is; opens no file.

Words stand between white space.  Tokens a word are all tokens over all words.  A word is continued where it takes more
than one token behind a blank, a token for the blank alone not counted.  A model cannot tell strings of equal ids apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowvram.data.any_tokenizer import AnyTokenizer, OwnTokenizer, find_parts
from lowvram.evaluate.boundaries import BoundaryScore, GoldWord, score_boundaries

SPEED_BYTES = 1 << 20
REPEATS = 3
_TOLD_EVERY = 1_000


@dataclass(frozen=True)
class Sample:
    """The text of a language.  lines, words: each distinct one, and how often it occurs.  is_whole: nothing was cut."""

    language: str
    documents: tuple[str, ...]
    lines: Counter[str]
    words: Counter[str]
    characters: int
    text_bytes: int
    is_whole: bool


@dataclass(frozen=True)
class BoundaryFigures:
    """How tokens cut the gold's words.  unplaced: words whose tokens do not add up to them, taken as not cut."""

    by_type: BoundaryScore
    by_token: BoundaryScore
    unplaced: int


@dataclass(frozen=True)
class Speed:
    """Megabytes (10⁶ bytes) of text encoded in a second of one thread's CPU time.

    library: the same tokenizer.json run by the package tokenizers, None where there is none.
    """

    mb_per_s: float
    library: float | None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the package tokenizers."""
        return self.mb_per_s / self.library if self.library else None


@dataclass(frozen=True)
class Figures:
    """What was measured of one tokenizer in one language.

    continued, exact_lines, exact_documents: shares.  equal_words, equal_lines: distinct strings whose ids are those of
    another one.
    """

    tokens: int
    characters_per_token: float
    bytes_per_token: float
    tokens_per_word: float
    continued: float
    exact_lines: float
    exact_documents: float
    equal_words: int
    equal_lines: int
    speed: Speed
    boundaries: BoundaryFigures | None = None

    @property
    def is_lossless(self) -> bool:
        """Whether every text came back as it was."""
        return self.exact_lines == self.exact_documents == 1.0

    def as_dict(self) -> dict[str, object]:
        """Return the figures for JSON."""
        table: dict[str, object] = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("speed", "boundaries")
        }
        speed = {"mb_per_s": self.speed.mb_per_s, "library_mb_per_s": self.speed.library, "ratio": self.speed.ratio}
        boundaries = dataclasses.asdict(self.boundaries) if self.boundaries else None
        return {**table, **speed, "boundaries": boundaries}


def take_sample(language: str, documents: Sequence[str], is_whole: bool) -> Sample:
    """Count the lines and words of documents; a line is what stands between line ends and is not all white space."""
    lines: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for text in documents:
        lines.update(line for line in text.splitlines() if line.strip())
        words.update(text.split())
    size = sum(len(text.encode()) for text in documents)
    return Sample(language, tuple(documents), lines, words, sum(map(len, documents)), size, is_whole)


def measure(
    tokenizer: AnyTokenizer, sample: Sample, gold: Sequence[GoldWord] | None = None
) -> Generator[tuple[int, int], None, Figures]:
    """Measure; yield how many strings are encoded, of how many."""
    counts = len(sample.documents), len(sample.lines), len(sample.words), len(gold or ())
    timing = _Timing(tokenizer, sample.documents)
    total, done = sum(counts) + timing.strings, 0
    tokens = exact = 0
    for text in sample.documents:
        ids = tokenizer.encode(text)
        tokens += len(ids)
        exact += tokenizer.decode(ids) == text
        done += 1
        yield done, total
    exact_lines, equal_lines = 0, _EqualIds()
    for line, count in sample.lines.items():
        ids = tokenizer.encode(line)
        exact_lines += count * (tokenizer.decode(ids) == line)
        equal_lines.add(ids)
        done += 1
        if done % _TOLD_EVERY == 0:
            yield done, total
    continued, equal_words = 0, _EqualIds()
    for word, count in sample.words.items():
        ids = tokenizer.encode(f" {word}")
        starts_blank = len(ids) > 0 and int(ids[0]) in tokenizer.blank_ids
        continued += count * (len(ids) - starts_blank > 1)
        equal_words.add(ids)
        done += 1
        if done % _TOLD_EVERY == 0:
            yield done, total
    boundaries = None
    if gold:
        parts: dict[str, list[str] | None] = {}
        for entry in gold:
            parts[entry.word] = find_parts(tokenizer.split(f" {entry.word}"), entry.word)
            done += 1
            if done % _TOLD_EVERY == 0:
                yield done, total
        boundaries = _score(gold, parts)
    for strings in timing.repeat():
        yield done + strings, total
    all_words = sample.words.total()
    return Figures(
        tokens=tokens,
        characters_per_token=sample.characters / max(1, tokens),
        bytes_per_token=sample.text_bytes / max(1, tokens),
        tokens_per_word=tokens / all_words,
        continued=continued / all_words,
        exact_lines=exact_lines / sample.lines.total(),
        exact_documents=exact / len(sample.documents),
        equal_words=equal_words.count(),
        equal_lines=equal_lines.count(),
        speed=timing.speed(),
        boundaries=boundaries,
    )


class _EqualIds:
    """Counts distinct strings that share their ids with another one."""

    def __init__(self) -> None:
        self._seen: Counter[bytes] = Counter()

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        packed = np.asarray(ids, np.uint32).tobytes()
        self._seen[hashlib.blake2b(packed, digest_size=16).digest()] += 1

    def count(self) -> int:
        return sum(count for count in self._seen.values() if count > 1)


class _Timing:
    """Times the first SPEED_BYTES, alternating with the package tokenizers where that can run the same tokenizer."""

    def __init__(self, tokenizer: AnyTokenizer, documents: Sequence[str]) -> None:
        self._texts: list[str] = []
        self._size = 0
        for text in documents:
            if self._size < SPEED_BYTES:
                self._texts.append(text)
                self._size += len(text.encode())
        self._library = tokenizer.library if isinstance(tokenizer, OwnTokenizer) else None
        self._works = [tokenizer.encode, *([self._library.encode] if self._library else [])]
        self._taken: list[list[float]] = [[] for _ in self._works]
        self.strings = len(self._texts) * len(self._works) * REPEATS

    def repeat(self) -> Iterator[int]:
        """Encode everything REPEATS times; yield how many strings have been encoded."""
        done = 0
        for _ in range(REPEATS):
            for encode, times in zip(self._works, self._taken, strict=True):
                times.append(_time(encode, self._texts))
                done += len(self._texts)
                yield done

    def speed(self) -> Speed:
        """Return the medians."""
        rates = [self._size / 1e6 / statistics.median(times) for times in self._taken]
        return Speed(rates[0], rates[1] if self._library else None)


def _time(encode: Callable[[str], object], texts: Iterable[str]) -> float:
    """Return the CPU seconds of this thread; the clock's steps may be longer than a short text takes."""
    began = time.thread_time_ns()
    for text in texts:
        encode(text)
    return max(1, time.thread_time_ns() - began) / 1e9


def _score(gold: Sequence[GoldWord], parts: Mapping[str, list[str] | None]) -> BoundaryFigures:
    """Compare where tokens end with where morphemes end, in words behind a blank."""

    def cut(word: str) -> list[str]:
        return parts[word] or [word]

    by_type, by_token = (score_boundaries(gold, cut, by) for by in ("type", "token"))
    return BoundaryFigures(by_type, by_token, sum(found is None for found in parts.values()))
