"""Some documents as arrays of characters, words and lines, so that a rule takes one pass over all; knows no rule.

Words are runs of letters and digits, in lower case by Turkish rules (I becomes ı).  A word and a sequence of words are
hashes of 64 bits: polynomials with odd random factors, modulo 2⁶⁴.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowvram.data.splitmix import STEP, scramble
from lowvram.data.turkish import lower_case

LETTER, DIGIT, SPACE, LINE_END, PUNCTUATION, SYMBOL = range(1, 7)
Array = NDArray[np.generic]
U64 = np.uint64
_PLANE = 0x10000  # characters beyond are counted as symbols: emoji, historic scripts
_SEED = 0x6C6F7776
# As many words of a sequence have factors of their own; longer ones repeat them.
_FACTORS = 1 << 16
_WORD_FACTORS = 64


class Batch:
    """Documents and what rules ask of them.

    words: hash of each word.  word_documents, word_lines: its document and its line (counted through the batch).
    word_starts, word_ends: where it stands in `characters`.  line_starts: where each line begins in `characters`.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        codes = np.frombuffer("".join(f"{text}\n" for text in texts).encode("utf-32-le"), "<u4")
        self._small = np.minimum(codes, _PLANE - 1).astype(np.uint16)
        self.kinds: NDArray[np.uint8] = _tables()[0][self._small]
        self.ends = np.cumsum(self.lengths + 1) - 1
        self.starts = self.ends - self.lengths

    @functools.cached_property
    def _edges(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        is_word = np.zeros(len(self.kinds) + 2, np.int8)
        is_word[1:-1] = self.kinds <= DIGIT
        edges = np.flatnonzero(np.diff(is_word))
        return edges[0::2], edges[1::2]

    @property
    def word_starts(self) -> NDArray[np.int64]:
        """Where each word begins."""
        return self._edges[0]

    @property
    def word_ends(self) -> NDArray[np.int64]:
        """Where each word ends."""
        return self._edges[1]

    @functools.cached_property
    def _prefixes(self) -> NDArray[np.uint64]:
        """Sums of letters' values up to each character of all words: a difference hashes a word's beginning."""
        starts, ends = self._edges
        letters = self._small[self.kinds <= DIGIT]
        lengths = ends - starts
        begins = (np.cumsum(lengths) - lengths).astype(np.int32)
        position = np.arange(len(letters), dtype=np.int32)
        position -= np.repeat(begins, lengths)
        position &= _WORD_FACTORS - 1
        values = np.take(_tables()[1], letters)
        values *= np.take(_factors(_WORD_FACTORS), position)
        sums = np.zeros(len(letters) + 1, U64)
        np.cumsum(values, out=sums[1:])
        return sums

    @functools.cached_property
    def _word_begins(self) -> NDArray[np.int64]:
        """Where each word begins among the characters of all words."""
        lengths = self.word_ends - self.word_starts
        return np.cumsum(lengths) - lengths

    @functools.cached_property
    def words(self) -> NDArray[np.uint64]:
        """The hash of each word."""
        lengths = self.word_ends - self.word_starts
        ends = np.cumsum(lengths)
        return scramble(self._prefixes[ends] - self._prefixes[ends - lengths])

    def word_prefixes(self, length: int, among: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return which of the words `among` have `length` characters or more, and hashes of their first `length`."""
        lengths = self.word_ends - self.word_starts
        which = among[lengths[among] >= length]
        begins = self._word_begins[which]
        return which, scramble(self._prefixes[begins + length] - self._prefixes[begins])

    @functools.cached_property
    def word_documents(self) -> NDArray[np.int64]:
        """The document of each word."""
        return np.repeat(np.arange(len(self.texts)), self.word_counts)

    @functools.cached_property
    def word_counts(self) -> NDArray[np.int64]:
        """How many words each document has."""
        return np.diff(np.searchsorted(self.word_starts, self.ends), prepend=0)

    @functools.cached_property
    def line_starts(self) -> NDArray[np.int64]:
        """Where each line begins; a document has at least one."""
        return np.concatenate(([0], np.flatnonzero(self.kinds == LINE_END)[:-1] + 1))

    @functools.cached_property
    def line_documents(self) -> NDArray[np.int64]:
        """The document of each line."""
        return np.searchsorted(self.ends, self.line_starts)

    @functools.cached_property
    def word_lines(self) -> NDArray[np.int64]:
        """The line of each word."""
        return np.repeat(np.arange(len(self.line_starts)), self.line_words)

    @functools.cached_property
    def line_words(self) -> NDArray[np.int64]:
        """How many words each line has."""
        ends = np.append(self.line_starts[1:], len(self.kinds))
        return np.diff(np.searchsorted(self.word_starts, ends), prepend=0)

    @functools.cached_property
    def line_hashes(self) -> NDArray[np.uint64]:
        """The hash of each line's words."""
        return hash_sequences(self.words, self.line_words)

    @functools.cached_property
    def document_hashes(self) -> NDArray[np.uint64]:
        """The hash of each document's words."""
        return hash_sequences(self.words, self.word_counts)

    @functools.cached_property
    def counts(self) -> NDArray[np.int64]:
        """How many characters of each kind each document has: [kinds, documents]."""
        counts = np.stack([self.sum_characters(self.kinds == kind) for kind in range(SYMBOL + 1)])
        counts[LINE_END] -= 1
        return counts

    def sum_characters(self, is_counted: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return how many characters of each document, and of the line end behind it, are marked."""
        return np.add.reduceat(is_counted.view(np.uint8), self.starts, dtype=np.int64)

    def runs(self) -> NDArray[np.bool_]:
        """Mark each character that is neither white space nor a digit and equals the two before it."""
        small = self._small
        marks = np.zeros(len(small), np.bool_)
        is_same = small[1:] == small[:-1]
        marks[2:] = is_same[1:] & is_same[:-1]
        return marks & ((self.kinds == LETTER) | (self.kinds >= PUNCTUATION))

    def sequences(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the document of each sequence of `length` words that lies in one document, and its hash."""
        count = len(self.words) - length + 1
        if count <= 0:
            return np.zeros(0, np.int64), np.zeros(0, U64)
        factors = _factors(_FACTORS)
        hashes = self.words[:count] * factors[0]
        for index in range(1, length):
            hashes += self.words[index : index + count] * factors[index]
        documents = self.word_documents
        is_inside = documents[:count] == documents[length - 1 :]
        return documents[:count][is_inside], scramble(hashes[is_inside])


def hash_sequences(words: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash for each sequence of words; the sequences follow each other, and an empty one is 0 mixed.

    The same as `Batch.sequences` gives for as many words.
    """
    ends = np.cumsum(counts)
    begins = ends - counts
    position = np.arange(len(words)) - np.repeat(begins, counts)
    values = words * _factors(_FACTORS)[position & (_FACTORS - 1)]
    sums = np.zeros(len(words) + 1, U64)
    np.cumsum(values, out=sums[1:])
    return scramble(sums[ends] - sums[begins])


def hash_words(text: str) -> NDArray[np.uint64]:
    """Return the hashes of the words of one text."""
    return Batch([text]).words


@functools.cache
def _factors(count: int) -> NDArray[np.uint64]:
    """Return odd random factors for the places in a sequence."""
    return scramble(np.arange(1, count + 1, dtype=U64) * STEP + U64(_SEED)) | U64(1)


@functools.cache
def _tables() -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
    """Return for each character below U+10000 its kind, and the value that it adds to a word's hash."""
    kinds = np.full(_PLANE, SYMBOL, np.uint8)
    lowered = np.arange(_PLANE, dtype=U64)
    for code in range(_PLANE - 1):
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "LM":
            kinds[code] = LETTER
            small = lower_case(character)
            if len(small) == 1:
                lowered[code] = ord(small)
        elif category == "Nd":
            kinds[code] = DIGIT
        elif character == "\n":
            kinds[code] = LINE_END
        elif category[0] == "Z" or character in "\t\r\x0b\x0c":
            kinds[code] = SPACE
        elif category[0] == "P":
            kinds[code] = PUNCTUATION
    return kinds, scramble(lowered + U64(_SEED))
