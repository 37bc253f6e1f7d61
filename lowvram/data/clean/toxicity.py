"""Finds listed offensive words with their Turkish suffixes; knows no sentence and judges no meaning.

The list below is this project's own and short: words that are offensive in every context.  A word counts as a whole:
the root, perhaps with a softened last consonant, and a chain of suffixes and nothing else, so that `sıkıntı` and
`götürmek` are none.  Source of the order of suffixes: Göksel & Kerslake 2005, chapters 6 to 8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lowvram.data.clean.batch import Batch, hash_words
from lowvram.data.turkish import lower_case
from lowvram.errors import DataError

_NOUNS = """
amcık dalyarak daşşak gavat göt götveren ibne kahpe kaltak kevaşe orospu pezevenk piç puşt sürtük şerefsiz taşak yarak
yarrak yavşak
"""
_VERBS = ("sik",)
_UNCHANGED = """
amına amk aq asshole assholes bitch bitches bullshit cunt cunts dickhead dickheads faggot faggots fuck fucked fucker
fuckers fucking motherfucker motherfuckers nigger niggers shit shitty slut sluts whore whores
"""
# Other words that such a root and suffixes would also spell: cyclic, cycles.
_OTHER_WORDS = {"sikli", "siklik", "siklikle", "sikler", "sikle"}
_OTHER_BEGINNINGS = ("sikint", "sikic")  # sıkıntı and sıkıcı, typed without ı
_MOST_LISTED = 100_000

_I, _A = "[ıiuü]", "[ae]"
_CASE = rf"(?:[ny]?{_I}|[ny]?{_A}|n?[dt]{_A}(?:n|ki)?|[ny]?{_I}n|[ny]?l{_A}|n?c{_A})"
_PERSON = rf"(?:y?{_I}m|m|s{_I}n|n|y?{_I}z|k|s{_I}n{_I}z|n{_I}z|l{_A}r)"
_COPULA = rf"(?:y?[dt]{_I}|y?m{_I}ş|y?s{_A}|[dt]{_I}r)"
_OWNER = rf"(?:{_I}?m{_I}z|{_I}?n{_I}z|{_I}?m|{_I}?n|s?{_I})"
_NOUN = rf"(?:l{_I}[kğ]|[cç]{_I}|[cç]{_A}|l{_I}|s{_I}z|[cç]{_I}[kğ])*(?:l{_A}r)?{_OWNER}?{_CASE}?{_COPULA}?{_PERSON}?"
_VOICE = rf"(?:t{_I}r|{_I}ş|{_I}l|{_I}n|d{_I}r)"
_TENSE = (
    rf"(?:m?{_I}yor|{_A}r|{_I}r|m{_A}z|[dt]{_I}|m{_I}ş|y?{_A}c{_A}[kğ]|s{_A}|m{_A}k|m{_A}|y?{_I}p|{_A}r{_A}k|"
    rf"[dt]{_I}[kğ]|y?{_A}n|{_I}[kğ]|{_A}y|{_A}l|{_I}c{_I})"
)
_VERB = rf"{_VOICE}*(?:m{_A})?{_TENSE}{_COPULA}?(?:l{_A}r)?{_OWNER}?{_CASE}?{_COPULA}?{_PERSON}?|{_VOICE}+"
_NOUN_CHAIN, _VERB_CHAIN = re.compile(_NOUN), re.compile(_VERB)
_NO_CHAIN = re.compile("")
_FRONT = {letter: letter in "eiöüâ" for letter in "aıoueiöüâ"}


class ToxicWords:
    """Listed words, to be found in batches.  extra: words of the user's own; each may take every chain of suffixes."""

    def __init__(self, extra: Iterable[str] = ()) -> None:
        self._chains: dict[str, list[re.Pattern[str]]] = {}
        for root in _NOUNS.split():
            self._add(root, [_NOUN_CHAIN])
        for root in _VERBS:
            self._add(root, [_NOUN_CHAIN, _VERB_CHAIN])
        for root in _UNCHANGED.split():
            self._add(root, [_NO_CHAIN])
        for root in extra:
            self._add(lower_case(root), [_NOUN_CHAIN, _VERB_CHAIN])
        by_length: dict[int, list[int]] = {}
        for root in self._chains:
            by_length.setdefault(len(root), []).append(int(hash_words(root)[0]))
        self._hashes = {length: np.array(sorted(hashes), np.uint64) for length, hashes in by_length.items()}
        self._shortest = min(by_length)
        self._beginnings = np.unique([hash_words(root[: self._shortest])[0] for root in self._chains])

    def _add(self, root: str, chains: list[re.Pattern[str]]) -> None:
        self._chains[root] = chains
        # k softens behind a vowel in words of more than one syllable, and behind n; other consonants of these stay.
        syllables = sum(letter in _FRONT for letter in root)
        if root.endswith("nk") or (root.endswith("k") and syllables > 1):
            self._chains.setdefault(root[:-1] + ("g" if root.endswith("nk") else "ğ"), chains)

    def is_listed(self, word: str) -> bool:
        """Return whether a word in lower case is a listed root with suffixes that follow its vowels."""
        if word in _OTHER_WORDS or word.startswith(_OTHER_BEGINNINGS):
            return False
        return any(
            chain.fullmatch(word, length) and _is_harmonious(word, length)
            for length in range(1, len(word) + 1)
            for chain in self._chains.get(word[:length], ())
        )

    def mark(self, batch: Batch) -> NDArray[np.bool_]:
        """Mark the words of a batch that are listed."""
        which, prefixes = batch.word_prefixes(self._shortest, np.arange(len(batch.words)))
        likely = which[_is_in(prefixes, self._beginnings)]
        candidates = [np.zeros(0, np.int64)]
        for length, hashes in self._hashes.items():
            which, prefixes = batch.word_prefixes(length, likely)
            candidates.append(which[_is_in(prefixes, hashes)])
        marks = np.zeros(len(batch.words), np.bool_)
        for index in np.unique(np.concatenate(candidates)):
            document = int(batch.word_documents[index])
            text, start = batch.texts[document], int(batch.starts[document])
            word = lower_case(text[int(batch.word_starts[index]) - start : int(batch.word_ends[index]) - start])
            # Who types no ı writes `sıkıldım` as `sikildim`, so that such a text says nothing.
            marks[index] = self.is_listed(word) and not (word.startswith(_VERBS) and "ı" not in text)
        return marks


def _is_in(values: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return known[places] == values


def _is_harmonious(word: str, length: int) -> bool:
    """Return whether the vowels behind a root of so many letters are front or back as the one before each of them.

    -ki and -yor do not change: -yor begins with an o in every word.
    """
    vowels = [letter for letter in word[:length] if letter in _FRONT][-1:]
    for letter in word[length:].replace("yor", "o"):
        if letter in _FRONT:
            if vowels and letter != "o" and _FRONT[letter] != _FRONT[vowels[-1]]:
                return False
            vowels.append(letter)
    return True


def read_words(file: Path) -> list[str]:
    """Return the words of a file, one a line; `#` begins a comment.  A line of several words is not matched.

    Raises DataError where it cannot be read, or holds no word.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        fix = "Name a text file in UTF-8 with one word a line as toxicity.words."
        raise DataError(f"The list of words {file} cannot be read.", f"{error}.", fix) from error
    words = [line.partition("#")[0].strip() for line in lines]
    words = [each for word in words if word for each in _letters_of(file, word)][:_MOST_LISTED]
    if not words:
        raise DataError(f"The list of words {file} holds no word.", "One word a line is read.", "Name another file.")
    return words


def _letters_of(file: Path, line: str) -> list[str]:
    """Return the one word of a line as it stands in a text, without signs around it; nothing for several words."""
    batch = Batch([line])
    if len(batch.words) != 1:
        return []
    word = line[int(batch.word_starts[0]) : int(batch.word_ends[0])]
    if len(word) == 1 and word != line:
        why = "Its signs are no part of a word, and the letter alone is in no way offensive."
        raise DataError(f"The list of words {file} has the line {line}.", why, "Delete that line.")
    return [word]
