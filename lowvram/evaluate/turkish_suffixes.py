"""Cuts a Turkish word with its gold analysis into stem and suffixes, each of one class; knows no model.

Universal Dependencies name a word's lemma and features but not where its suffixes begin.  The features say which
suffixes the word has, Turkish fixes their order, and each has few forms: so what stands behind the stem is read as
those suffixes in that order.  A word that cannot be read so is left whole.

Suffixes are written as grammars write them: A is a or e, I one of ı i u ü, D is d or t, C is c or ç, K is k or ğ; a
letter in brackets may be missing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lowvram.data.turkish import lower_case
from lowvram.evaluate.turkish import VOWELS

# Negation and ability count as tense, aspect and mood; voice, participles and verbal nouns as derivation.
CLASSES = ("stem", "plural", "possessive", "case", "tense, aspect, mood", "person", "derivation", "other")
_TENSE = "tense, aspect, mood"
_APOSTROPHES = "'’"
_LETTERS = {"A": "ae", "I": "ıiuü", "D": "dt", "C": "cç", "K": "kğ"}
_SOFT = {"p": "b", "ç": "c", "t": "d", "k": "ğ", "g": "ğ"}
_NOMINALS = ("NOUN", "PROPN", "ADJ", "PRON", "NUM", "ADV", "DET", "ADP")
_PREDICATES = ("VERB", "AUX")

_CASES = {
    "Acc": ("(y)I", "nI"),
    "Dat": ("(y)A", "nA"),
    "Loc": ("DA", "nDA"),
    "Abl": ("DAn", "nDAn"),
    "Gen": ("(n)In", "Im", "yIn"),
    "Ins": ("(y)lA", "nlA"),
    "Equ": ("CA", "nCA"),
}
_POSSESSIVES = {
    ("1", "Sing"): ("(I)m",),
    ("2", "Sing"): ("(I)n",),
    ("3", "Sing"): ("(s)I", "yI"),
    ("1", "Plur"): ("(I)mIz",),
    ("2", "Plur"): ("(I)nIz",),
    ("3", "Plur"): ("lArI", "(s)I"),
}
_PERSONS = {
    ("1", "Sing"): ("m", "(y)Im"),
    ("2", "Sing"): ("n", "sIn"),
    ("1", "Plur"): ("k", "(y)Iz", "lIm"),
    ("2", "Plur"): ("nIz", "sInIz", "sIn"),
    ("3", "Plur"): ("lAr",),
}
_IMPERATIVES = {
    ("2", "Sing"): ("",),
    ("2", "Plur"): ("(y)In", "(y)InIz"),
    ("3", "Sing"): ("sIn",),
    ("3", "Plur"): ("sInlAr",),
}
_VOICES = ("t", "DIr", "Ir", "Ar", "It", "l", "Il", "n", "In", "ş", "Iş")
_VERB_FORMS = {
    "Part": ("(y)An", "DIK", "mIş", "(y)AcAK", "r", "Ar", "Ir", "z", "(y)AsI"),
    "Vnoun": ("mAK", "mA", "(y)Iş"),
    "Conv": (
        "(y)Ip",
        "(y)ArAk",
        "rken",
        "Arken",
        "Irken",
        "zken",
        "(y)ken",
        "(y)IncA",
        "DIkCA",
        "dAn",
        "(y)AlI",
        "(y)A",
    ),
}
# Productive ones that gold analyses leave unnamed, where the lemma is not that of the derived word.
_FROM_NOUNS = (
    "lIK",
    "CI",
    "lI",
    "sIz",
    "DAş",
    "CA",
    "sAl",
    "(I)ncI",
    "(ş)Ar",
    "DAki",
    "CIK",
    "(I)msI",
    "lAn",
    "lAş",
    "lA",
)
_PARTICIPLES = ("(y)An", "DIK", "mIş", "(y)AcAK", "(y)AsI", "mAK", "mA", "(y)Iş", "(y)IcI", "mAz")
_ADVERBS = ("(y)Ip", "(y)ArAk", "Arken", "Irken", "mAzken", "(y)IncA", "DIkCA", "mAdAn", "(y)AlI", "CAsInA", "mAksIzIn")
_DERIVATIONS = {
    "VERB": (*_VOICES, "lAn", "lAş", "lA"),
    "AUX": (),
    "PRON": ("CA", "lI", "sIz", "lIK"),
    "DET": ("CA",),
    "ADP": (),
}
_OTHER_DERIVATIONS = (*_FROM_NOUNS, *_PARTICIPLES, *_ADVERBS)
_ALL_TENSES = ("(y)DI", "(y)mIş", "(y)AcAK", "Iyor", "mAkDA", "r", "Ar", "Ir", "z", "mAlI", "(y)sA")


class Part(NamedTuple):
    """Some letters of a word: how many, and their class."""

    letters: int
    kind: str


class _Slot(NamedTuple):
    kind: str
    forms: tuple[str, ...]
    may_be_empty: bool


def read_features(features: str) -> dict[str, str]:
    """Return Universal Dependencies' features by name; raises ValueError where the text is none."""
    if features in ("_", ""):
        return {}
    pairs = [feature.partition("=") for feature in features.split("|")]
    if not all(name and sign and value for name, sign, value in pairs):
        raise ValueError(f"{features!r} is no list of features like Case=Loc|Number=Sing")
    return {name: value for name, _, value in pairs}


def cut_word(form: str, lemma: str, category: str, features: Mapping[str, str]) -> list[Part] | None:
    """Return the parts of a word, whose letters add up to it; None where its gold analysis does not explain it.

    category: Universal Dependencies' part of speech (`upos`).
    """
    word = lower_case(form)
    if category not in (*_NOMINALS, *_PREDICATES):
        return [Part(len(word), "stem")] if word == lower_case(lemma) else None
    derivation = _Slot("derivation", _DERIVATIONS.get(category, _OTHER_DERIVATIONS), False)
    readings = _readings(category, features)
    # An analysis that leaves out a derivation names at least all tenses, or too little is certain.
    tries = [*((0, slots) for slots in readings), *((count, slots) for count in (1, 2) for slots in readings[:2])]
    for derivations, slots in tries:
        for stem in _stems(lower_case(lemma), category):
            if not word.startswith(stem):
                continue
            start = len(stem) + (word[len(stem) : len(stem) + 1] in tuple(_APOSTROPHES))
            parts = _match(word, start, [derivation] * derivations + slots)
            if parts is not None:
                return [Part(start, "stem"), *parts] if start else parts
    return None


def _readings(category: str, features: Mapping[str, str]) -> list[list[_Slot]]:
    """Return what may follow the stem, the likeliest first: a predicate may be a verb, or a noun with its endings."""
    nominal = [*_nominal_slots(features), *_predicate_slots(features, category)]
    if category in _NOMINALS:
        return [nominal]
    # Some treebanks name only the last of two tenses, and no ability.
    return [_verb_slots(features), nominal, _verb_slots(features, names_all=False)]


def _stems(lemma: str, category: str) -> Iterator[str]:
    """Yield the forms that a stem takes before suffixes, the lemma itself first."""
    yield lemma
    if category == "AUX" and lemma in ("i", "y", "null"):
        yield ""  # the copula that is a suffix: -(y)di, -(y)miş, -dir
    last, body = lemma[-1:], lemma[:-1]
    if category in _PREDICATES:
        if lemma.endswith(("mek", "mak")) and len(lemma) > 4:
            yield from _stems(lemma[:-3], category)
        if last in ("a", "e"):
            yield body  # başla- in başl-ıyor
            yield body + {"a": "ı", "e": "i"}[last]  # de- in di-yecek
    if lemma in ("bu", "şu", "o"):
        yield f"{lemma}n"
    if lemma in ("ben", "sen"):
        yield f"{lemma[0]}an"  # bana, sana
    if last in _SOFT:
        yield body + _SOFT[last]
        if lemma.endswith("nk"):
            yield f"{body}g"
    if last and last not in VOWELS:
        if len(lemma) > 3 and lemma[-2] in VOWELS and lemma[-3] not in VOWELS:
            yield lemma[:-2] + last  # burun in burn-u
            if last in _SOFT:
                yield lemma[:-2] + _SOFT[last]
        yield lemma + last  # hak in hakk-ı


def _nominal_slots(features: Mapping[str, str]) -> list[_Slot]:
    slots = []
    is_plural = features.get("Number") == "Plur" and features.get("Person", "3") == "3"
    if is_plural:
        slots.append(_Slot("plural", ("lAr",), False))
    owner = features.get("Person[psor]"), features.get("Number[psor]", "Sing")
    if owner[0] is not None:
        slots.append(_Slot("possessive", _POSSESSIVES.get((owner[0], owner[1]), ("",)), False))
    if forms := _CASES.get(features.get("Case", "Nom")):
        slots.append(_Slot("case", forms, False))
    slots.append(_Slot("derivation", ("ki", "kü"), True))
    return slots


def _predicate_slots(features: Mapping[str, str], category: str) -> list[_Slot]:
    """Return the slots of a noun or adjective that is a sentence's predicate."""
    slots = []
    if "Tense" in features or "Mood" in features or "Evident" in features:
        slots.append(_Slot(_TENSE, ("(y)DI", "(y)mIş", "(y)sA", "DIr"), True))
    person = features.get("Person", "3"), features.get("Number", "Sing")
    if category != "PRON" and person[0] in ("1", "2"):
        slots.append(_Slot("person", _PERSONS[person], False))
    return slots


def _verb_slots(features: Mapping[str, str], names_all: bool = True) -> list[_Slot]:
    """Return the slots of a verb.  names_all: whether the features name every tense and ability that it has."""
    slots = []
    if "Voice" in features:
        slots += [_Slot("derivation", _VOICES, False), _Slot("derivation", _VOICES, True)]
        slots.append(_Slot("derivation", _VOICES, True))
    is_negative = features.get("Polarity") == "Neg"
    if "Pot" in features.get("Mood", "") or "Abil" in features.get("Mood", ""):
        slots.append(_Slot(_TENSE, ("(y)AmA", "(y)Am") if is_negative else ("(y)Abil",), False))
    elif is_negative:
        slots.append(_Slot(_TENSE, ("mA", "m") if names_all else ("mA", "m", "(y)AmA", "(y)Am"), False))
    elif not names_all:
        slots.append(_Slot(_TENSE, ("(y)Abil",), True))
    if (verb_form := features.get("VerbForm")) in _VERB_FORMS:
        return [*slots, _Slot("derivation", _VERB_FORMS[verb_form], False), *_nominal_slots(features)]
    return slots + _finite_slots(features, is_negative, names_all)


def _finite_slots(features: Mapping[str, str], is_negative: bool, names_all: bool) -> list[_Slot]:
    person = features.get("Person", "3"), features.get("Number", "Sing")
    mood = features.get("Mood", "")
    if "Imp" in mood or (mood == "Opt" and person[0] == "3" and not names_all):
        return [_Slot("person", _IMPERATIVES.get(person, ("",)), False)]
    tenses = _tenses(features) if names_all else _ALL_TENSES
    # Of a negative aorist, gelme-m, nothing is left in the first persons.
    tense = _Slot(_TENSE, tenses, is_negative and "r" in tenses)
    more = _Slot(_TENSE, tenses, True)
    plural = [_Slot("person", ("lAr",), True)] if person == ("3", "Plur") else []
    last = [_Slot("person", _PERSONS[person], False)] if person in _PERSONS and not plural else []
    return [tense, *plural, more, *plural, *last, _Slot(_TENSE, ("DIr",), True)]


def _tenses(features: Mapping[str, str]) -> tuple[str, ...]:
    """Return the suffixes of tense, aspect and mood that the features name."""
    tense, aspect, mood = (features.get(name, "") for name in ("Tense", "Aspect", "Mood"))
    forms: list[str] = []
    if "Past" in tense or "Pqp" in tense or "Evident" in features or (tense, aspect) == ("Pres", "Perf"):
        forms += ["(y)DI", "(y)mIş"]
    if "Fut" in tense:
        forms += ["(y)AcAK"]
    if aspect == "Prog":
        forms += ["Iyor", "mAkDA"]
    if aspect == "Hab" or tense == "Pres" or "Gen" in mood:
        forms += ["r", "Ar", "Ir", "z"]
    if "Nec" in mood:
        forms += ["mAlI"]
    if "Cnd" in mood or "Des" in mood:
        forms += ["(y)sA"]
    if "Opt" in mood:
        forms += ["(y)A"]
    if "Gen" in mood:
        forms += ["DIr"]
    return tuple(forms) or ("",)


def _match(word: str, start: int, slots: Sequence[_Slot]) -> list[Part] | None:
    """Return the parts of the word from `start` on, one for each slot that is filled; None where none fits."""
    if not slots:
        return [] if start == len(word) else None
    slot, *rest = slots
    for form in _spell_out(slot.forms):
        if word.startswith(form, start):
            parts = _match(word, start + len(form), rest)
            if parts is not None:
                return [Part(len(form), slot.kind), *parts] if form else parts
    return _match(word, start, rest) if slot.may_be_empty else None


@functools.cache
def _spell_out(forms: tuple[str, ...]) -> tuple[str, ...]:
    """Return all spellings of suffixes, the longest first."""
    spelt: set[str] = set()
    for form in forms:
        choices: list[tuple[str, ...]] = []
        while form:
            if form[0] == "(":
                choices.append((*_LETTERS.get(form[1], form[1]), ""))
                form = form[3:]
            else:
                choices.append(tuple(_LETTERS.get(form[0], form[0])))
                form = form[1:]
        spelt |= {"".join(letters) for letters in itertools.product(*choices)}
    return tuple(sorted(spelt, key=lambda text: (-len(text), text)))
