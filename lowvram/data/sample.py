"""Generates Turkish sample text: inflects words by rule and writes small stories from a seed; knows no tokenizer.

The words, phrases and templates are in data/sample_words.py.  Suffixes are written in archiphonemes: A is a or e, I is
ı, i, u or ü, D is d or t, C is c or ç; a letter in brackets is a buffer: (y), (s) and (n) after a vowel, (I) after a
consonant.  Source of the rules: G. Lewis, Turkish Grammar, 2nd ed., Oxford 2000, chapters 1, 2, 6 and 8.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import TypeVar

from lowvram.data.sample_words import ADJECTIVES, NOUNS, PHRASES, PLANS, POOLS, PROPER, VERBS

_VOWELS = "aâıoueiîöüûAIOUEİÖÜ"
_VOICELESS = "fstkçşhp"
# The vowels that A and I become after each vowel.
_HARMONY = dict.fromkeys("aâıAI", "aı") | dict.fromkeys("ouûOU", "au") | dict.fromkeys("eiîEİ", "ei")
_HARMONY |= dict.fromkeys("öüÖÜ", "eü")
_FRONTED = {"aı": "ei", "au": "eü"}
_SOFT = {"p": "b", "ç": "c", "t": "d", "k": "ğ"}

_CASES = {"acc": "(y)I", "dat": "(y)A", "loc": "DA", "abl": "DAn", "gen": "(n)In", "ins": "(y)lA"}
_PRONOMINAL_CASES = {**_CASES, "acc": "nI", "dat": "nA", "loc": "nDA", "abl": "nDAn"}
_POSSESSIVES = {"1s": "(I)m", "2s": "(I)n", "3s": "(s)I", "1p": "(I)mIz", "2p": "(I)nIz", "3p": "lArI"}
_DERIVATIONS = {"li": "lI", "siz": "sIz", "ci": "CI", "lik": "lIk", "ca": "CA", "ki": "ki"}
_OTHERS = {"pl": "lAr", "dir": "DIr", "am": "(y)Im", "was": "(y)DIm", "were": "(y)DI", "seemed": "(y)mIş"}
_SUFFIXES = {**_POSSESSIVES, **_DERIVATIONS, **_OTHERS}
_PARTICLES = {"q": "mI", "da": "dA"}
_IRREGULAR = {
    ("ben", "dat"): "bana", ("sen", "dat"): "sana", ("ben", "gen"): "benim", ("biz", "gen"): "bizim",
    ("ben", "ins"): "benimle", ("sen", "ins"): "seninle", ("o", "ins"): "onunla", ("biz", "ins"): "bizimle",
    ("siz", "ins"): "sizinle", ("bu", "ins"): "bununla", ("şu", "ins"): "şununla", ("kim", "ins"): "kiminle",
}  # fmt: skip

_PRESENT_ENDINGS = {"1s": "(y)Im", "2s": "sIn", "3s": "", "1p": "(y)Iz", "2p": "sInIz", "3p": "lAr"}
_PAST_ENDINGS = {"1s": "m", "2s": "n", "3s": "", "1p": "k", "2p": "nIz", "3p": "lAr"}
# Tense: its suffix (AOR is the verb's own aorist) and the copula that follows.
_TENSES = {
    "prog": ("Iyor", ""), "aor": ("AOR", ""), "past": ("DI", ""), "evid": ("mIş", ""), "fut": ("(y)AcAk", ""),
    "must": ("mAlI", ""), "sa": ("sA", ""), "cond": ("AOR", "(y)sA"), "hab": ("AOR", "(y)DI"),
    "pcont": ("Iyor", "(y)DI"), "plup": ("mIş", "(y)DI"),
}  # fmt: skip
_MOODS = {"imp2s": "", "imp2p": "(y)In", "imp3s": "sIn", "let1s": "(y)AyIm", "let1p": "(y)AlIm"}
_NONFINITE = {
    "an": "(y)An", "dik": "DIk", "acak": "(y)AcAk", "mak": "mAk", "ma": "mA", "ip": "(y)Ip", "ince": "(y)IncA",
    "arak": "(y)ArAk", "madan": "mAdAn", "mus": "mIş", "dikca": "DIkCA", "ali": "(y)AlI", "is": "(y)Iş",
}  # fmt: skip

_UNITS = ("", "bir", "iki", "üç", "dört", "beş", "altı", "yedi", "sekiz", "dokuz")
_TENS = ("", "on", "yirmi", "otuz", "kırk", "elli", "altmış", "yetmiş", "seksen", "doksan")


def _syllables(text: str) -> int:
    return sum(letter in _VOWELS for letter in text.rpartition(" ")[2])


def _soften(text: str, marks: str) -> str:
    """Return text as it is written before a vowel."""
    last = text[-1]
    if "=" in marks:
        return text + last
    if "~" in marks or (last in "pçk" and _syllables(text) > 1 and not set("!'v") & set(marks)):
        return text[:-1] + ("g" if text.endswith("nk") else _SOFT[last])
    return text


def _harmonise(text: str, suffix: str, marks: str) -> str:
    """Return the letters of suffix after text, with archiphonemes resolved."""
    pair = next((_HARMONY[letter] for letter in reversed(text) if letter in _VOWELS), "ei")
    if "^" in marks:
        pair = _FRONTED.get(pair, pair)
    letters: list[str] = []
    previous = text[-1]
    for letter in suffix:
        if letter in "AI":
            letter = pair["AI".index(letter)]
        elif letter in "DC":
            letter = {"D": "dt", "C": "cç"}[letter][previous in _VOICELESS]
        pair = _HARMONY.get(letter, pair)
        previous = letter
        letters.append(letter)
    return "".join(letters)


def _join(text: str, suffix: str, marks: str) -> str:
    if not suffix:
        return text
    if suffix == "Iyor" and text[-1] in _VOWELS:
        if text[-1] in "ae":
            text = text[:-1]
        if not _syllables(text):
            return text + "iyor"
        return text + _harmonise(text, suffix[1:] if text[-1] in _VOWELS else suffix, "")
    buffer = ""
    if suffix[0] == "(":
        buffer, suffix = suffix[1], suffix[3:]
        if "y" in marks:
            buffer = "yI" if buffer == "I" else "y"
        elif (text[-1] in _VOWELS) == (buffer == "I"):
            buffer = ""
    word = text.rpartition(" ")[2]
    if buffer == "y" and "v" in marks and (word == "ye" or (word == "de" and suffix not in ("Ip", "IncA", "In", "Iş"))):
        text = text[:-1] + "i"
    ending = _harmonise(text, buffer + suffix, marks)
    if ending[0] in _VOWELS and "'" not in marks:
        if "-" in marks:
            text = text[:-2] + text[-1]
        text = _soften(text, marks)
    return text + ("'" if "'" in marks else "") + ending


def attach(stem: str, *suffixes: str) -> str:
    """Return stem with suffixes in archiphonemes: `attach("kitap", "lAr", "(I)m", "DA")` is "kitaplarımda".

    stem: a word with its marks (data/sample_words.py); a number reads "1998:sekiz/'", digits and last spoken word.
    """
    text, marks = stem.partition("/")[::2]
    written, _, spoken = text.partition(":")
    text = spoken or written
    for suffix in suffixes:
        if suffix:
            text = _join(text, suffix, marks)
            marks = ""
    return written + text[len(spoken) :] if spoken else text


def _particle(word: str, suffix: str, marks: str = "") -> str:
    return f"{word} {_harmonise(word, suffix, marks)}"


@lru_cache(maxsize=1 << 16)
def inflect(noun: str, tags: tuple[str, ...] = ()) -> str:
    """Return a noun, adjective, name or pronoun with tags in order: `inflect("şehir/-", ("dat",))` is "şehre".

    tags: pl; possessors 1s ... 3p; cases acc dat loc abl gen ins; li siz ci lik ca ki; predicates dir am was were
    seemed; particles q and da.  Raises KeyError for an unknown tag.
    """
    text, marks = noun.partition("/")[::2]
    if len(tags) == 1 and (text, tags[0]) in _IRREGULAR:
        return _IRREGULAR[text, tags[0]]
    order = list(tags)
    if "3" in marks and not _POSSESSIVES.keys() & tags:
        order.insert(order.index("pl") + 1 if "pl" in order else 0, "3s")
    if _DERIVATIONS.keys() & tags:
        marks = marks.replace("'", "")
    suffixes, pronominal = list[str](), "n" in marks
    particle = order.pop() if order and order[-1] in _PARTICLES else ""
    # A proper compound (Van Gölü) takes its apostrophe after the possessive.
    late = sum(tag == "pl" or tag in _POSSESSIVES for tag in order) if "'" in marks and "3" in marks else 0
    for tag in order:
        if tag in _CASES:
            suffixes.append((_PRONOMINAL_CASES if pronominal else _CASES)[tag])
        else:
            suffixes.append("I" if suffixes == ["lAr"] and tag in ("3s", "3p") else _SUFFIXES[tag])
        pronominal = tag in ("3s", "3p")
    if late:
        text, marks, suffixes = attach(text, *suffixes[:late]), "'", suffixes[late:]
    word = attach(f"{text}/{marks}", *suffixes)
    return _particle(word, _PARTICLES[particle], "" if suffixes else marks) if particle else word


@lru_cache(maxsize=1 << 16)
def conjugate(verb: str, tags: tuple[str, ...]) -> str:
    """Return a verb with tags in order: `conjugate("git/~", ("not", "aor", "1s", "q"))` is "gitmez miyim".

    tags: pas, abil, not, cannot; then a tense (prog aor past evid fut must sa cond hab pcont plup) and a person, a mood
    (imp2s imp2p imp3s let1s let1p), ken, or a participle or verbal noun (an dik acak mak ma ip ince arak madan mus
    dikca ali is) with a noun's tags; q asks.  Raises KeyError for an unknown tag.
    """
    text, marks = verb.partition("/")[::2]
    suffixes, rest, negative = list[str](), list(tags), False
    passive = "n" if text[-1] in _VOWELS else "In" if text[-1] == "l" else "Il"
    derivations = {"pas": [passive], "abil": ["(y)Abil"], "not": ["mA"], "cannot": ["(y)A", "mA"]}
    while rest[0] in derivations:
        suffixes += derivations[rest.pop(0)]
        negative = suffixes[-1] == "mA"
    stem = attach(f"{text}/{marks}v", *suffixes)
    high = "i" in marks or suffixes or (_syllables(stem) > 1 and "a" not in marks)
    aorist = "z" if negative else "r" if stem[-1] in _VOWELS else "Ir" if high else "Ar"
    marks = "v" if suffixes else marks + "v"
    first, *rest = rest
    if first == "ken":
        return attach(f"{stem}/{marks}", aorist, "ken")
    if first in _MOODS:
        form = attach(f"{stem}/{marks}", _MOODS[first])
        return _particle(form, "mI") if rest == ["q"] else form
    if first in _NONFINITE:
        return inflect(attach(f"{stem}/{marks}", _NONFINITE[first]), tuple(rest))
    return _finite(f"{stem}/{marks}", aorist, first, rest[0], negative, "q" in rest)


def _finite(stem: str, aorist: str, tense: str, person: str, negative: bool, asks: bool) -> str:
    suffix, copula = _TENSES[tense]
    suffix = aorist if suffix == "AOR" else suffix
    if negative and tense == "aor" and person in ("1s", "1p") and not asks:
        return attach(stem, "m" if person == "1s" else "(y)Iz")
    past = bool(copula) or tense in ("past", "sa")
    ending = (_PAST_ENDINGS if past else _PRESENT_ENDINGS)[person]
    many = person == "3p"
    if not asks:
        tail = (ending, copula) if many and copula else (copula, ending)
        return attach(stem, suffix, *tail)
    if past and not copula:
        return _particle(attach(stem, suffix, ending), "mI")
    head = attach(stem, suffix, ending if many else "")
    whole = attach(head, "mI", copula, "" if many else ending)
    return f"{head} {whole[len(head) :]}"


def number_words(number: int) -> str:
    """Return 0 < number < 100 in words: 42 is "kırk iki"."""
    return f"{_TENS[number // 10]} {_UNITS[number % 10]}".strip()


def spoken_number(number: int) -> str:
    """Return digits as a stem for inflect: 1998 takes the suffixes of "sekiz", after an apostrophe."""
    tens, units = number // 10 % 10, number % 10
    last = _UNITS[units] or _TENS[tens] or ("yüz" if number % 1000 else "bin")
    return f"{number}:{last}/'"


_CLASSES = {
    kind: tuple(word + ("'" if "/" in word else "/'") for word in words) if kind in PROPER else words
    for kind, words in (*NOUNS.items(), *ADJECTIVES.items())
}
_STEMS = {word.partition("/")[0]: word for words in reversed(_CLASSES.values()) for word in words}
_VERB_STEMS = {verb.partition("/")[0]: verb for verb in VERBS}
_T = TypeVar("_T")
_DIGIT_PERSONS = {"1": "1s", "2": "2s", "3": "3s", "4": "1p", "5": "2p"}
_SUBJECTS = {"1s": "ben", "2s": "sen", "3s": "o", "1p": "biz", "2p": "siz", "3p": "onlar"}
# The smallest and the largest value for each head that makes numbers.
_NUMBERS = {"few": (1, 4), "num": (2, 9), "age": (7, 12), "number": (11, 60), "digits": (2, 28), "hundreds": (120, 980),
            "year": (1950, 2024), "price": (15, 480), "clock": (1, 12)}  # fmt: skip
_PIECE = re.compile(r"([^{]*)(?:\{([^{}+]+?)(\d?)(\+[^{}]*)?\})?")
_CAPITALS = {"i": "İ", "ı": "I"}
_SENTENCE_START = re.compile(r"(^[^\w“]*|“|[.!?] |\n[– ]*)(\w)")


def _find_verb(text: str) -> str:
    """Return a listed verb with its marks; in a compound ("yardım et") the last word decides."""
    head, space, last = text.rpartition(" ")
    return head + space + _VERB_STEMS[last]


@cache
def _parse(template: str) -> tuple[str | tuple[str, str, tuple[str, ...]], ...]:
    """Return a template as alternating literal text and pieces (head, its digit, tags)."""
    parts: list[str | tuple[str, str, tuple[str, ...]]] = []
    for literal, head, digit, tags in _PIECE.findall(template):
        parts += [literal, (head, digit, tuple(tags.split("+")[1:]))] if head else [literal]
    return tuple(parts)


class _Story:
    """One document being written: its tense, person and setting, and the words bound so far."""

    def __init__(self, rng: random.Random, plan: tuple[int, str, str, str, str]) -> None:
        self._rng = rng
        self._setting = self._choose(plan[1].split())
        self._tense, self._person = self._choose(plan[2].split()).split("/")
        self._subject, self._steps = plan[3], plan[4].split()
        self._bound: dict[str, str] = {}
        self._used: list[str] = []
        self._again = "bekle"

    def _choose(self, items: Sequence[_T]) -> _T:
        # random() is the one method whose numbers Python promises to keep from version to version.
        return items[int(self._rng.random() * len(items))]

    def write(self) -> str:
        """Return the document: the plan's steps, with a line break at each slash."""
        lines = [""]
        for step in self._steps:
            if step == "/":
                lines.append("")
                continue
            for text in map(self._fill, self._draw(step)):
                text = text.lstrip(" ,").replace("  ", " ").replace(" ,", ",")
                text = _SENTENCE_START.sub(lambda match: match[1] + (_CAPITALS.get(match[2]) or match[2].upper()), text)
                lines[-1] += ("\n" if text[0] == "–" else " ") + text
        text = "\n".join(line.strip() for line in lines)
        return text.translate({ord("“"): '"', ord("”"): '"'})

    def _draw(self, step: str) -> list[str]:
        names, kind, span = (*re.split(r"([*~])", step), "", "")[:3]
        templates = [template for name in names.split(",") for template in POOLS[name]]
        if not kind:
            return [self._fresh(templates)]
        least, most = (int(end) for end in span.split("-"))
        order = sorted(range(len(templates)), key=lambda _: self._rng.random())
        chosen = order[: least + int(self._rng.random() * (most - least + 1))]
        return [templates[index] for index in (sorted(chosen) if kind == "~" else chosen)]

    def _fresh(self, items: Sequence[str]) -> str:
        """Return one of items; a used one is drawn again, at most twice."""
        for _ in range(3):
            item = self._choose(items)
            if item not in self._used:
                break
        self._used.append(item)
        return item

    def _fill(self, template: str, person: str = "") -> str:
        person = person or self._person
        return "".join(part if isinstance(part, str) else self._expand(*part, person) for part in _parse(template))

    def _expand(self, head: str, digit: str, tags: tuple[str, ...], person: str) -> str:
        if head[0] == "*":
            return self._verb(_find_verb(head[1:]), tags, person)
        if head in ("vp", "again"):
            return self._phrase(head, _DIGIT_PERSONS.get(digit, person), tags)
        if head == "when":
            head = f"when_{self._tense.replace('evid', 'past')}"
        if head == "too":
            return inflect(_SUBJECTS[person], ("da",))
        if head == "S":
            if self._subject and (person == "3p" or self._rng.random() < 0.6):
                return self._fill(self._subject)
            return _SUBJECTS[person] if person in ("1s", "1p") and self._rng.random() < 0.2 else ""
        if head in POOLS:
            return self._fill(self._fresh(POOLS[head]), person)
        return self._noun(_STEMS[head[1:]] if head[0] == "=" else self._bind(head, digit), tags, person)

    def _bind(self, kind: str, digit: str) -> str:
        """Return a stem of the class; each digit stands for one stem of its own in the whole document."""
        while not digit or kind + digit not in self._bound:
            word = self._number(kind) if kind in _NUMBERS else self._fresh(_CLASSES[kind])
            if not digit:
                return word
            if word not in self._bound.values():
                self._bound[kind + digit] = word
        return self._bound[kind + digit]

    def _phrase(self, head: str, person: str, tags: tuple[str, ...]) -> str:
        if head == "again":
            return self._verb(self._again, tags, person)
        before, _, verb = self._fresh(PHRASES[self._setting]).partition(">")
        self._again = _find_verb(verb)
        return f"{self._fill(before, person)} {self._verb(self._again, tags, person)}"

    def _verb(self, verb: str, tags: tuple[str, ...], person: str) -> str:
        mode = ("imp2p",) if self._tense == "imp2p" else ("pas", "aor", "3s")
        meanings = {"T": (self._tense, person), "T3": (self._tense, "3s"), "R": mode, "P": (person,), "my": (person,)}
        return conjugate(verb, tuple(tag for name in tags for tag in meanings.get(name, (name,))))

    def _noun(self, noun: str, tags: tuple[str, ...], person: str) -> str:
        if tags and tags[-1] in ("be", "be3", "is"):
            return self._copula(noun, tags[:-1], tags[-1], person if tags[-1] == "be" else "3s")
        meanings = {"O": ("acc",) if self._tense == "imp2p" else (), "my": (person,)}
        return inflect(noun, tuple(tag for name in tags for tag in meanings.get(name, (name,))))

    def _copula(self, noun: str, tags: tuple[str, ...], kind: str, person: str) -> str:
        """Return a predicate in the document's tense: "yorgundum", "yorgunmuş", "yorgun olacak"."""
        tense, text = self._tense, noun.partition("/")[0]
        if tense in ("past", "hab"):
            return attach(inflect(noun, (*tags, "were")), _PAST_ENDINGS[person])
        if tense == "evid":
            return attach(inflect(noun, (*tags, "seemed")), _PRESENT_ENDINGS[person])
        if kind == "is":
            return inflect(noun, (*tags, "dir"))
        if tense == "prog":
            return attach(noun if not tags else inflect(noun, tags), _PRESENT_ENDINGS[person])
        prefix = "" if text in ("değil", "var") else inflect(noun, tags) + " "
        return prefix + conjugate("ol/i", (*(("not",) if text == "değil" else ()), tense, person))

    def _number(self, head: str) -> str:
        """Return a stem for one of the heads that make numbers."""
        least, most = _NUMBERS[head]
        number = least + int(self._rng.random() * (most - least + 1))
        if head == "price":
            return f"{number} lira"
        if head == "clock":
            hour, minutes = number_words(number), number_words(5 * (1 + int(self._rng.random() * 5)))
            stem = hour + ("/~" if number == 4 else "")
            half, past, to = f"{hour} buçukta", f"{inflect(stem, ('acc',))} {minutes} geçe", inflect(stem, ("dat",))
            return f"saat {self._choose((inflect(stem, ('loc',)), half, past, f'{to} {minutes} kala'))}"
        return number_words(number) if most <= 60 and head != "digits" else spoken_number(number)


def write_document(seed: int, number: int) -> str:
    """Return document `number` of the stream `seed`: several sentences on one or more lines, no blank line.

    It is the same on every Python version and system.
    """
    rng = random.Random(f"{seed}/{number}")
    weighted = [plan for plan in PLANS for _ in range(plan[0])]
    return _Story(rng, weighted[int(rng.random() * len(weighted))]).write()


def sample_documents(seed: int, characters: int) -> Iterator[str]:
    """Yield documents 0, 1, ... of the stream `seed` until they hold at least `characters` characters."""
    number = written = 0
    while written < characters:
        document = write_document(seed, number)
        yield document
        number, written = number + 1, written + len(document)
