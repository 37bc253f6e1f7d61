"""Learns a language's stems and how often each suffix follows from word counts; knows no file and no tokenizer.

The model: a word is a stem drawn from all stems of the language, and a chain of suffixes, each drawn from those that
its state allows.  Expectation maximisation (Dempster, Laird & Rubin 1977) over all analyses of each word finds the
probabilities; a discount as in Kneser & Ney 1995 drops the stems that few words need, and a stem that is not kept costs
its letters, as in the minimum description length of Goldsmith 2001.  Words count once, however frequent they are, since
frequent words say little about how words are built.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowvram.data.morphology.analyses import Analyser, Analysis, Lemma
from lowvram.data.morphology.rules import Rules
from lowvram.errors import DataError

# Chosen on the types with an even hash of the gold segmentations (docs/morphology.md).
LEAST_COUNT = 2
MOST_WORDS = 300_000
LONGEST_WORD = 40
_ROUNDS = 8
_DISCOUNT = 1.0
_NEW_STEMS = 5.0
# Added to the cost of each letter of a stem, in nats: a longer stem must be worth it.
_LETTER_COST = 0.5
_IRREGULAR_COST = 4.0
_UNSEEN_STEP = -12.0
_SMOOTHING = 0.5
_TOLD_EVERY = 2_000
# The number that ends a chain of suffixes.
END = -1
Step = tuple[str, int]


@dataclass(frozen=True)
class LetterCosts:
    """The log-probability of a stem's letters, each given the one before it; "" is the edge of a word."""

    pairs: Mapping[tuple[str, str], float]
    unseen: float

    def of(self, lemma: Lemma) -> float:
        """Return the log-probability of a stem that is not known."""
        total = math.log(0.5) - (_IRREGULAR_COST if lemma.is_irregular else 0.0)
        before = ""
        for letter in (*lemma.text, ""):
            total += self.pairs.get((before, letter), self.unseen) - _LETTER_COST * bool(letter)
            before = letter
        return total


@dataclass(frozen=True)
class WordModel:
    """What was learnt: log-probabilities of stems and of steps between suffixes, and of a stem that is new."""

    stems: Mapping[Lemma, float]
    steps: Mapping[Step, float]
    new_stem: float
    letters: LetterCosts

    def score(self, analysis: Analysis, rules: Rules) -> float:
        """Return the log-probability of an analysis."""
        stem = self.stems.get(analysis.lemma)
        total = self.new_stem + self.letters.of(analysis.lemma) if stem is None else stem
        return total + sum(self.steps.get(step, _UNSEEN_STEP) for step in list_steps(analysis, rules))


def list_steps(analysis: Analysis, rules: Rules) -> list[Step]:
    """Return the steps of an analysis: in which state which suffix follows, and where the word ends."""
    steps, state = [], analysis.lemma.state
    for number in analysis.suffixes:
        steps.append((state, number))
        state = rules.suffixes[number].to
    return [*steps, (state, END)]


def choose_words(counts: Mapping[str, int], rules: Rules) -> list[str]:
    """Return the words to learn from, in lower case: the most frequent ones, those that occur once left out."""
    lower: Counter[str] = Counter()
    for word, count in counts.items():
        lower[rules.lower_case(word)] += count
    known = [(word, count) for word, count in lower.items() if count >= LEAST_COUNT and len(word) <= LONGEST_WORD]
    known.sort(key=lambda pair: (-pair[1], pair[0]))
    return [word for word, _ in known[:MOST_WORDS]]


def learn(words: Sequence[str], analyser: Analyser) -> Generator[tuple[str, int, int], None, WordModel]:
    """Learn from distinct words in lower case; yield what is being done, how much of it is done, and how much it is.

    Takes about a minute for 100,000 words, and some 100 bytes for each analysis.  Raises NoWordsError where there is
    no word.
    """
    if not words:
        why = f"Words are learnt from that occur {LEAST_COUNT} times or more."
        raise NoWordsError("There are no words to learn stems from.", why, "Name more text.")
    table = _Table(analyser.rules)
    for done, word in enumerate(words):
        if done % _TOLD_EVERY == 0:
            yield "Reading words", done, len(words)
        table.add(analyser.read(word))
    letters = count_letters(words)
    estimate = _Estimate(table, letters)
    for done in range(_ROUNDS):
        yield "Learning stems", done, _ROUNDS
        estimate.improve()
    return estimate.finish()


def count_letters(words: Sequence[str]) -> LetterCosts:
    """Return what the letters of a stem cost, as counted in whole words."""
    pairs: Counter[tuple[str, str]] = Counter()
    for word in words:
        pairs.update(zip(("", *word), (*word, ""), strict=True))
    firsts: Counter[str] = Counter()
    for (before, _), count in pairs.items():
        firsts[before] += count
    kinds = len({letter for _, letter in pairs})
    costs = {
        pair: math.log((count + _SMOOTHING) / (firsts[pair[0]] + _SMOOTHING * kinds)) for pair, count in pairs.items()
    }
    return LetterCosts(costs, math.log(_SMOOTHING / (len(words) + _SMOOTHING * kinds)))


class NoWordsError(DataError):
    """A text has no words that occur often enough."""


class _Table:
    """All analyses of all words, as arrays of numbers."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.words = 0
        self.stems: dict[Lemma, int] = {}
        self.chains: dict[tuple[str, tuple[int, ...]], int] = {}
        self.steps: dict[Step, int] = {}
        self._word, self._stem, self._chain = array("i"), array("i"), array("i")
        self._step_chain, self._step = array("i"), array("i")

    def add(self, analyses: Sequence[Analysis]) -> None:
        """Add the analyses of one more word."""
        for analysis in analyses:
            key = analysis.lemma.state, analysis.suffixes
            chain = self.chains.get(key)
            if chain is None:
                chain = self.chains[key] = len(self.chains)
                for step in list_steps(analysis, self._rules):
                    self._step_chain.append(chain)
                    self._step.append(self.steps.setdefault(step, len(self.steps)))
            self._word.append(self.words)
            self._stem.append(self.stems.setdefault(analysis.lemma, len(self.stems)))
            self._chain.append(chain)
        self.words += 1

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return by analysis its word, stem and chain, and by step of a chain its chain and step, all int32."""
        parts = self._word, self._stem, self._chain, self._step_chain, self._step
        return tuple(np.frombuffer(part, np.int32) for part in parts)


class _Estimate:
    """Probabilities that are improved round by round."""

    def __init__(self, table: _Table, letters: LetterCosts) -> None:
        self._table, self._letters = table, letters
        self._word, self._stem, self._chain, self._step_chain, self._step = table.arrays()
        states = list(dict.fromkeys(state for state, _ in table.steps))
        self._state = np.array([states.index(state) for state, _ in table.steps])
        self._new = np.array([letters.of(lemma) for lemma in table.stems])
        # At first a stem costs its letters, and all steps from a state are alike.
        self._stem_log: np.ndarray = self._new
        self._step_log: np.ndarray = -np.log(np.bincount(self._state))[self._state]
        self._counts: np.ndarray = np.zeros(len(table.stems))
        self._new_log = 0.0

    def improve(self) -> None:
        """Share each word out among its analyses by their probability, and count anew."""
        chain_log = np.bincount(self._step_chain, self._step_log[self._step], len(self._table.chains))
        log = self._stem_log[self._stem] + chain_log[self._chain]
        best = np.full(self._table.words, -np.inf)
        np.maximum.at(best, self._word, log)
        share = np.exp(log - best[self._word])
        share /= np.bincount(self._word, share, self._table.words)[self._word]
        self._counts = np.bincount(self._stem, share, len(self._table.stems))
        chain_counts = np.bincount(self._chain, share, len(self._table.chains))
        step_counts = np.bincount(self._step, chain_counts[self._step_chain], len(self._table.steps)) + _SMOOTHING
        self._step_log = np.log(step_counts / np.bincount(self._state, step_counts)[self._state])
        kept = np.maximum(self._counts - _DISCOUNT, 0.0)
        total = self._table.words + _NEW_STEMS
        spared = _NEW_STEMS + _DISCOUNT * np.count_nonzero(self._counts > _DISCOUNT)
        self._new_log = math.log(spared / total)
        # The logarithm of a sum, since a long stem's letters alone are too improbable for a float.
        with np.errstate(divide="ignore"):
            self._stem_log = np.logaddexp(np.log(kept / total), self._new_log + self._new)

    def finish(self) -> WordModel:
        """Return what was learnt; stems that the discount drops are not part of it."""
        stems = {
            lemma: float(log)
            for lemma, log, count in zip(self._table.stems, self._stem_log, self._counts, strict=True)
            if count > _DISCOUNT
        }
        steps = {step: float(log) for step, log in zip(self._table.steps, self._step_log, strict=True)}
        return WordModel(stems, steps, self._new_log, self._letters)
