"""Reads how a language builds words from a TOML file, and checks that the rules agree; knows no word.

A form such as "(s)I" or "DAn" is spelt anew behind every word: a letter in brackets is there only where it parts two
vowels or two consonants, and a capital letter stands for one of several.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from lowvram.config.base import FrozenConfig
from lowvram.errors import DataError

_FOLDER = Path(__file__).parent
_ANY_OTHER = ""


class SuffixForm(FrozenConfig):
    """A suffix as the file states it: its form, its name, the states it follows and the one it leads to."""

    form: str
    name: str
    after: str
    to: str


class ParticleForm(FrozenConfig):
    """A word that is spelt like a suffix of the word before it: its form, its name, its lemma, and its state."""

    form: str
    name: str
    lemma: str
    to: str


class Softening(FrozenConfig):
    """What a letter is before a vowel, and elsewhere."""

    vowel: str
    other: str


class StemChanges(FrozenConfig):
    """How the end of a stem may change before a suffix; every key may be left out."""

    softens: dict[str, str] = Field(default_factory=dict)
    softens_short: tuple[str, ...] = ()
    lost_vowel: str | None = None
    doubles: bool = False
    raised: dict[str, str] = Field(default_factory=dict)
    raises: tuple[str, ...] = ()
    irregular_after: str = ""
    irregular: dict[str, str] = Field(default_factory=dict)


class RulesFile(FrozenConfig):
    """The tables of a rules file."""

    language: str
    name: str
    vowels: str
    neutral_vowels: str = ""
    lower: dict[str, str] = Field(default_factory=dict)
    apostrophes: str = ""
    stems: tuple[str, ...]
    unfinished: tuple[str, ...] = ()
    harmony: dict[str, dict[str, str]] = Field(default_factory=dict)
    assimilation: dict[str, dict[str, str]] = Field(default_factory=dict)
    softening: dict[str, Softening] = Field(default_factory=dict)
    changes: StemChanges = StemChanges()
    groups: dict[str, str] = Field(default_factory=dict)
    states: dict[str, str]
    particles: tuple[ParticleForm, ...] = ()
    suffixes: dict[str, tuple[SuffixForm, ...]]


class FormLetter(NamedTuple):
    """A letter of a form, and whether it is there only where it parts two vowels or two consonants."""

    letter: str
    is_optional: bool


@dataclass(frozen=True)
class Suffix:
    """A suffix or particle: the letters of its form, its name and class, and the state of a word that ends with it."""

    form: str
    letters: tuple[FormLetter, ...]
    name: str
    kind: str
    to: str


@dataclass(frozen=True)
class Rules:
    """The checked rules of a language.

    suffixes: in the order of the file.  after: by state, the numbers of the suffixes that may follow it.
    particles: by lemma and state; their class is "particle".
    """

    file: RulesFile
    suffixes: tuple[Suffix, ...]
    after: Mapping[str, tuple[int, ...]]
    particles: Mapping[tuple[str, str], Suffix]

    @cached_property
    def vowels(self) -> frozenset[str]:
        """The vowels, in lower case."""
        return frozenset(self.file.vowels)

    @cached_property
    def harmonic_vowels(self) -> frozenset[str]:
        """The vowels that the vowels of suffixes agree with."""
        return self.vowels - frozenset(self.file.neutral_vowels)

    @cached_property
    def harmony(self) -> dict[str, dict[str, str]]:
        """By capital letter and last vowel, the letter that it stands for."""
        return {capital: _by_letter(table) for capital, table in self.file.harmony.items()}

    @cached_property
    def assimilation(self) -> dict[str, dict[str, str]]:
        """By capital letter and the letter before it, the letter that it stands for; "" is any other letter."""
        return {capital: _by_letter(table) for capital, table in self.file.assimilation.items()}

    @cached_property
    def _lower(self) -> dict[int, str]:
        return {ord(upper): lower for upper, lower in self.file.lower.items()}

    def lower_case(self, text: str) -> str:
        """Return the text in the language's lower case, letter for letter."""
        lower = text.translate(self._lower).lower()
        return lower if len(lower) == len(text) else "".join(letter.lower()[:1] for letter in text)

    def find_apostrophe(self, word: str) -> int:
        """Return where the first apostrophe of a word stands, -1 where there is none."""
        return min((word.find(mark) for mark in self.file.apostrophes if mark in word), default=-1)

    def ends(self, state: str) -> bool:
        """Say whether a word may end in this state."""
        return state not in self.file.unfinished


def _by_letter(table: Mapping[str, str]) -> dict[str, str]:
    return {letter: value for letters, value in table.items() for letter in letters or (_ANY_OTHER,)}


def shipped_languages() -> list[str]:
    """Return the codes of the languages whose rules are part of this package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def read_rules(language: str | Path) -> Rules:
    """Read a language's rules: a code such as "tr", or a TOML file of the same form.

    Raises DataError: no such language or file, no TOML, an unknown key, rules that contradict one another.
    """
    path = _FOLDER / f"{language}.toml" if str(language) in shipped_languages() else Path(language)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        known = ", ".join(shipped_languages())
        fix = f"Name one of {known}, or a TOML file of the same form."
        raise DataError(f"There are no rules of morphology for {language}.", fix=fix) from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as TOML.", f"{error}.", "Mend the file.") from error
    try:
        file = RulesFile.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        why = "No rules file has this key." if problem["type"] == "extra_forbidden" else _explain(problem)
        raise DataError(f"{path}: {where} cannot be used.", why, f"See {_FOLDER / 'tr.toml'} for the form.") from error
    problems = list(_contradictions(file))
    if problems:
        raise DataError(f"{path} contradicts itself.", " ".join(problems[:3]), "Mend the file.")
    return build_rules(file)


def _explain(problem: Any) -> str:
    return "The file needs it." if problem["type"] == "missing" else f"It is {problem['input']!r}."


def build_rules(file: RulesFile) -> Rules:
    """Return the rules of a file that `read_rules` has checked."""
    suffixes: list[Suffix] = []
    after: dict[str, list[int]] = {state: [] for state in file.states}
    for kind, rows in file.suffixes.items():
        for row in rows:
            for state in _expand(file, row.after):
                after[state].append(len(suffixes))
            suffixes.append(Suffix(row.form, tuple(_read_form(row.form)), row.name, kind, row.to))
    particles = {
        (row.lemma, row.to): Suffix(row.form, tuple(_read_form(row.form)), row.name, "particle", row.to)
        for row in file.particles
    }
    return Rules(file, tuple(suffixes), {state: tuple(numbers) for state, numbers in after.items()}, particles)


def _expand(file: RulesFile, states: str) -> list[str]:
    """Return the states that a text names, those of its groups included, each once."""
    names = [name for word in states.split() for name in file.groups.get(word, word).split()]
    return list(dict.fromkeys(names))


def _read_form(form: str) -> Iterator[FormLetter]:
    """Yield the letters of a form; raises ValueError where its brackets do not hold one letter each."""
    start = 0
    while start < len(form):
        is_optional = form[start] == "("
        if is_optional and form[start + 2 : start + 3] != ")":
            raise ValueError(form)
        letter = form[start + is_optional]
        if not letter.isalpha():
            raise ValueError(form)
        yield FormLetter(letter, is_optional)
        start += 3 if is_optional else 1


def _contradictions(file: RulesFile) -> Iterator[str]:
    """Yield a sentence for each rule that cannot hold beside the others."""
    yield from _letter_contradictions(file)
    for name, states in file.groups.items():
        if name in file.states:
            yield f"{name} is a group and a state."
        yield from (f"groups.{name} names {state}, which is no state." for state in _unknown(file, states.split()))
    short = file.changes.softens_short
    for key, names in (("stems", file.stems), ("unfinished", file.unfinished), ("changes.softens_short", short)):
        yield from (f"{key} names {state}, which is no state." for state in _unknown(file, names))
    seen: dict[tuple[str, str], str] = {}
    for kind, rows in file.suffixes.items():
        for row in rows:
            yield from _suffix_contradictions(file, kind, row)
            for state in _expand(file, row.after):
                known = seen.setdefault((row.form, state), row.to)
                if known != row.to and row.name in _names(file, row.form, known):
                    yield f"{row.form} ({row.name}) leads from {state} to {known} and to {row.to}."
    yield from _particle_contradictions(file)
    yield from _unreachable(file)


def _letter_contradictions(file: RulesFile) -> Iterator[str]:
    tables = {"harmony": file.harmony, "assimilation": file.assimilation}
    for where, table in tables.items():
        for capital, choices in table.items():
            letters = [letter for group in choices for letter in group]
            for letter in sorted({letter for letter in letters if letters.count(letter) > 1}):
                yield f"{where}.{capital} lists {letter} twice."
            missing = sorted(set(file.vowels) - set(file.neutral_vowels) - set(letters)) if where == "harmony" else []
            if missing:
                yield f"{where}.{capital} does not say what it is after {', '.join(missing)}."
            if where == "assimilation" and _ANY_OTHER not in choices:
                yield f'{where}.{capital} does not say what it is after any other letter ("").'
    kinds = [set(file.harmony), set(file.assimilation), set(file.softening)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        for capital in sorted(kinds[first] & kinds[second]):
            yield f"{capital} is chosen by two rules."


def _particle_contradictions(file: RulesFile) -> Iterator[str]:
    seen: set[tuple[str, str]] = set()
    for row in file.particles:
        where = f"{row.form} ({row.name}) in particles"
        yield from _form_contradictions(file, where, row.form)
        yield from (f"{where} names {state}, which is no state." for state in _unknown(file, (row.to,)))
        if row.to in file.stems:
            yield f"{where} is in the state {row.to}, in which stems are."
        if (row.lemma, row.to) in seen:
            yield f"particles lists {row.lemma} in the state {row.to} twice."
        seen.add((row.lemma, row.to))


def _suffix_contradictions(file: RulesFile, kind: str, row: SuffixForm) -> Iterator[str]:
    where = f"{row.form} ({row.name}) in suffixes.{kind}"
    yield from _form_contradictions(file, where, row.form)
    for state in _unknown(file, [*_expand(file, row.after), row.to]):
        yield f"{where} names {state}, which is no state."


def _form_contradictions(file: RulesFile, where: str, form: str) -> Iterator[str]:
    known = {*file.harmony, *file.assimilation, *file.softening}
    try:
        letters = list(_read_form(form))
    except (ValueError, IndexError):
        yield f"{where} is no form: brackets hold one letter, and all others are letters."
        return
    if not letters:
        yield f"{where} has no letters."
    for letter in (part.letter for part in letters if part.letter.isupper() and part.letter not in known):
        yield f"{where} has {letter}, which no rule of letters explains."


def _unknown(file: RulesFile, states: list[str] | tuple[str, ...]) -> list[str]:
    return [state for state in states if state not in file.states]


def _names(file: RulesFile, form: str, to: str) -> set[str]:
    return {row.name for rows in file.suffixes.values() for row in rows if (row.form, row.to) == (form, to)}


def _unreachable(file: RulesFile) -> Iterator[str]:
    """Yield a sentence for each state that no word reaches, or that no word leaves though none ends there."""
    rows = [row for rows in file.suffixes.values() for row in rows]
    steps = {(state, row.to) for row in rows for state in _expand(file, row.after)}
    reached, finished = {*file.stems, *(row.to for row in file.particles)}, set(file.states) - set(file.unfinished)
    for _ in file.states:
        reached |= {to for state, to in steps if state in reached}
        finished |= {state for state, to in steps if to in finished}
    for state in file.states:
        if state not in reached:
            yield f"No suffix leads to the state {state}, and no stem or particle is in it."
        elif state not in finished:
            yield f"No word that reaches the state {state} can end."
