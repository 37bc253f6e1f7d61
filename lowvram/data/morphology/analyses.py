"""Lists every way in which a language's rules read a word as a stem and suffixes; judges none of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from lowvram.data.morphology.rules import Rules, Suffix

# Some 200 MB of chains.
_MOST_CHAINS = 500_000
# Before a suffix: the vowel that harmony looks at ("" for none), and the letter before the suffix.
_Before = tuple[str, str]


class Lemma(NamedTuple):
    """A stem as it is without suffixes, the state that it is in, and whether its suffixes have front vowels anyway."""

    text: str
    state: str
    is_irregular: bool = False


class Analysis(NamedTuple):
    """A reading of a word: its lemma, the numbers of its suffixes, and how many letters stem and suffixes have."""

    lemma: Lemma
    suffixes: tuple[int, ...]
    lengths: tuple[int, ...]


class _Spelling(NamedTuple):
    """A suffix as it is spelt in one place; what must follow: "vowel", "no vowel", "raising", or anything ("")."""

    text: str
    vowel: str
    letter: str
    next: str


class Analyser:
    """Reads words by the rules of a language; what was found for the end of one word is kept for others."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._chains: dict[tuple[str, str, str, str], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        self._spellings: dict[tuple[int, str, str], list[_Spelling]] = {}
        changes = rules.file.changes
        self._raising = {number for number, suffix in enumerate(rules.suffixes) if suffix.form in changes.raises}
        self._raising_forms = tuple(rules.suffixes[number].form for number in self._raising)
        self._unsoftened = {soft: hard for hard, soft in changes.softens.items()}
        # Nobody knows the word before a particle, so that it may be spelt in each of its ways.
        self._particles = [
            (Lemma(*lemma), spelling)
            for lemma, particle in rules.particles.items()
            for spelling in self._spell_anew(particle, "", "")
        ]

    def read(self, word: str) -> list[Analysis]:
        """Return every analysis of a word in lower case; the first ones take it whole.

        An apostrophe is no letter of the analysis, and a stem or suffix ends where it stands.
        """
        mark = self.rules.find_apostrophe(word)
        letters = "".join(letter for letter in word if letter not in self.rules.file.apostrophes)
        found = [Analysis(Lemma(letters, state), (), (len(letters),)) for state in self.rules.file.stems]
        vowel, has_vowel = "", False
        for end in range(1, len(letters)):
            letter = letters[end - 1]
            vowel = letter if letter in self.rules.harmonic_vowels else vowel
            has_vowel = has_vowel or letter in self.rules.vowels
            if not (has_vowel or mark >= 0) or 0 <= mark < end:
                continue
            found += self._read_from(letters, end, (vowel, letter), mark)
        return found if mark >= 0 else [*found, *self._read_particles(letters)]

    def _read_particles(self, letters: str) -> Iterator[Analysis]:
        """Yield the analyses that begin with a particle: misiniz is mi + siniz."""
        for lemma, spelling in self._particles:
            size = len(spelling.text)
            if letters.startswith(spelling.text) and self._may_follow(spelling.next, letters[size:]):
                for suffixes, lengths in self._follow(lemma.state, spelling.vowel, spelling.letter, letters[size:]):
                    yield Analysis(lemma, suffixes, (size, *lengths))

    def _read_from(self, letters: str, end: int, before: _Before, mark: int) -> Iterator[Analysis]:
        """Yield the analyses whose stem has the first `end` letters."""
        (vowel, letter), file = before, self.rules.file
        ways = [(state, vowel, False) for state in (file.stems if mark < 0 else file.stems[:1])]
        if letter in file.changes.irregular_after and vowel in file.changes.irregular:
            ways.append((file.stems[0], file.changes.irregular[vowel], True))
        for state, heard, is_irregular in ways:
            for suffixes, lengths in self._follow(state, heard, letter, letters[end:]):
                # Where the first suffix has no vowel, nothing tells an irregular stem from a regular one.
                shows = not is_irregular or self.rules.vowels.intersection(letters[end : end + lengths[0]])
                if shows and (mark < 0 or mark in itertools.accumulate(lengths, initial=end)):
                    for text in self._lemmas(letters[:end], state, heard, suffixes[0], letters[end]):
                        # vakt-i: the vowel that vakit has lost is a front one, so that vakit is regular.
                        stays_irregular = is_irregular and self._last_vowel(text, vowel) == vowel
                        yield Analysis(Lemma(text, state, stays_irregular), suffixes, (end, *lengths))

    def _lemmas(self, stem: str, state: str, vowel: str, suffix: int, next_letter: str) -> Iterator[str]:
        """Yield what the stem may be without this suffix, which begins with `next_letter`.

        vowel: the one that harmony looks at.
        """
        changes, vowels = self.rules.file.changes, self.rules.vowels
        yield stem
        if suffix in self._raising:
            yield from self._lower_vowel(stem)
        if next_letter not in vowels or len(stem) < (2 if state in changes.softens_short else 3):
            return
        hard = list(self._harden(stem))
        yield from hard
        if len(stem) < 3 or stem[-1] in vowels or stem[-2] in vowels:
            return
        if changes.doubles and stem[-1] == stem[-2]:
            yield stem[:-1]
        elif changes.lost_vowel and vowel:
            lost = self.rules.harmony[changes.lost_vowel][vowel]
            yield from (text[:-1] + lost + text[-1] for text in (stem, *hard) if text[:-1] == stem[:-1])

    def _harden(self, stem: str) -> Iterator[str]:
        for soft, hard in self._unsoftened.items():
            if stem.endswith(soft):
                yield stem[: -len(soft)] + hard

    def _last_vowel(self, text: str, otherwise: str) -> str:
        return next((letter for letter in reversed(text) if letter in self.rules.harmonic_vowels), otherwise)

    def _lower_vowel(self, stem: str) -> Iterator[str]:
        """Yield the stem with the vowel that a raising suffix has changed: bekli- comes from bekle."""
        for low, high in self.rules.file.changes.raised.items():
            if stem[-1] in self.rules.harmony[high].values():
                yield stem[:-1] + self.rules.harmony[low][self._last_vowel(stem[:-1], stem[-1])]

    def _follow(self, state: str, vowel: str, letter: str, text: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Return every chain of suffixes that spells `text` behind a word in `state`: their numbers and lengths."""
        if not text:
            return [((), ())] if self.rules.ends(state) else []
        key = state, vowel, letter, text
        if key in self._chains:
            return self._chains[key]
        found = []
        for number in self.rules.after[state]:
            for spelling in self._spell(number, vowel, letter):
                size = len(spelling.text)
                if text.startswith(spelling.text) and self._may_follow(spelling.next, text[size:]):
                    to = self.rules.suffixes[number].to
                    for numbers, sizes in self._follow(to, spelling.vowel, spelling.letter, text[size:]):
                        if spelling.next != "raising" or (numbers and numbers[0] in self._raising):
                            found.append(((number, *numbers), (size, *sizes)))
        if len(self._chains) >= _MOST_CHAINS:
            self._chains.clear()
        self._chains[key] = found
        return found

    def _may_follow(self, wanted: str, rest: str) -> bool:
        if wanted == "raising":
            return rest.startswith(self._raising_forms)
        begins_with_vowel = rest[:1] in self.rules.vowels if rest else False
        return not wanted or begins_with_vowel == (wanted == "vowel")

    def _spell(self, number: int, vowel: str, letter: str) -> list[_Spelling]:
        """Return the spellings of a suffix behind a word with this last vowel and last letter."""
        key = number, vowel, letter
        if key not in self._spellings:
            suffix = self.rules.suffixes[number]
            spellings = [text for text in self._spell_anew(suffix, vowel, letter) if text.text]
            self._spellings[key] = [*spellings, *self._raise(suffix, spellings, vowel)]
        return self._spellings[key]

    def _spell_anew(self, suffix: Suffix, vowel: str, letter: str) -> list[_Spelling]:
        spellings = [_Spelling("", vowel, letter, "")]
        for place, part in enumerate(suffix.letters):
            is_last = place == len(suffix.letters) - 1
            spellings = [
                longer
                for spelling in spellings
                for longer in self._spell_letter(spelling, part.letter, part.is_optional, is_last)
            ]
        return spellings

    def _spell_letter(self, before: _Spelling, letter: str, is_optional: bool, is_last: bool) -> Iterator[_Spelling]:
        rules = self.rules
        is_vowel = letter in rules.vowels or letter in rules.harmony
        if is_optional and is_vowel == (before.letter in rules.vowels):
            yield before
            return
        wanted = [("", letter)]
        if letter in rules.harmony:
            table = rules.harmony[letter]
            # A word without a vowel, such as an abbreviation, is read aloud in a way that nobody can see.
            wanted = [("", choice) for choice in ([table[before.vowel]] if before.vowel else sorted({*table.values()}))]
        elif letter in rules.assimilation:
            table = rules.assimilation[letter]
            choices = [table.get(before.letter, table[""])] if before.letter else sorted({*table.values()})
            wanted = [("", choice) for choice in choices]
        elif letter in rules.file.softening:
            choice = rules.file.softening[letter]
            wanted = [("vowel", choice.vowel), ("no vowel", choice.other)] if is_last else [("", choice.other)]
        for next_kind, text in wanted:
            vowel = text if text in rules.harmonic_vowels else before.vowel
            yield _Spelling(before.text + text, vowel, text, next_kind or before.next)

    def _raise(self, suffix: Suffix, spellings: list[_Spelling], vowel: str) -> Iterator[_Spelling]:
        """Yield the spellings of a suffix whose last vowel is raised by the next one: temiz-li-yor."""
        high = self.rules.file.changes.raised.get(suffix.letters[-1].letter)
        for spelling in spellings if high else ():
            if last := self._last_vowel(spelling.text[:-1], vowel):
                raised = self.rules.harmony[str(high)][last]
                yield _Spelling(spelling.text[:-1] + raised, raised, raised, "raising")
