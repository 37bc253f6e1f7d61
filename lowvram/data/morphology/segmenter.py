"""Cuts words into stem and suffixes with what was learnt, and saves and loads it; knows no tokenizer and no model."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lowvram.data.morphology.analyses import Analyser, Analysis, Lemma
from lowvram.data.morphology.learning import LONGEST_WORD, LetterCosts, WordModel, choose_words, learn
from lowvram.data.morphology.rules import Rules, RulesFile, build_rules
from lowvram.errors import DataError
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import JsonError, read_object

_FORMAT = 1


class Morpheme(NamedTuple):
    """Some letters of a word: the stem (name "stem"), or a particle or suffix with its name and class.

    lemma: how a stem or particle is spelt without suffixes, in lower case; None where it stands so in the word.
    """

    text: str
    name: str
    kind: str
    lemma: str | None = None


class Segmenter:
    """Reads words by a language's rules and chooses the most probable reading."""

    def __init__(self, rules: Rules, model: WordModel) -> None:
        self.rules, self.model = rules, model
        self._analyser = Analyser(rules)
        self._cached_cuts = functools.lru_cache(maxsize=1 << 17)(lambda word: self._find_cuts(word, self.analyse(word)))

    def segment(self, word: str) -> list[str]:
        """Return the parts of a word, which add up to it: the stem, then each suffix."""
        return _cut(word, self._cached_cuts(self.rules.lower_case(word)))

    def name_parts(self, word: str) -> list[Morpheme]:
        """Return the parts of a word with their names and classes; a word that is too long is one stem."""
        analysis = self.analyse(word)
        lower = self.rules.lower_case(word)
        first, *others = _cut(word, self._find_cuts(lower, analysis))
        suffixes = [self.rules.suffixes[number] for number in (analysis.suffixes if analysis else ())]
        named = [(suffix.name, suffix.kind) for suffix in suffixes]
        # Behind the apostrophe of a word that no rule reads stands a part without a name.
        named += [("unknown", "other")] * (len(others) - len(named))
        particle = self.rules.particles.get(analysis.lemma[:2]) if analysis else None
        name, kind = (particle.name, particle.kind) if particle else ("stem", "stem")
        # Without a suffix nothing has changed, and an apostrophe that no rule explains is no letter of the lemma.
        changed = analysis.lemma.text if analysis and (suffixes or particle) else None
        lemma = changed if changed != self.rules.lower_case(first) else None
        stem = Morpheme(first, name, kind, lemma)
        return [stem, *(Morpheme(text, *names) for text, names in zip(others, named, strict=True))]

    def analyse(self, word: str) -> Analysis | None:
        """Return the most probable analysis of a word; None for a word that is too long for one."""
        lower = self.rules.lower_case(word)
        if not 0 < len(lower) <= LONGEST_WORD:
            return None
        return max(self._analyser.read(lower), key=lambda analysis: self.model.score(analysis, self.rules))

    def _find_cuts(self, word: str, analysis: Analysis | None) -> tuple[int, ...]:
        """Return where a word in lower case is cut by its analysis."""
        mark = self.rules.find_apostrophe(word)
        ends = itertools.accumulate(analysis.lengths[:-1]) if analysis else iter(())
        # The apostrophe is a letter of the word but not of the analysis, and belongs to the suffix behind it.
        cuts = [end + (0 <= mark < end) for end in ends]
        return tuple(cuts) if cuts or mark <= 0 else (mark,)

    def save(self, path: Path, disk: Disk = DISK) -> None:
        """Write the rules and what was learnt to a JSON file; equal models give equal bytes."""
        table = {
            "format": _FORMAT,
            "rules": self.rules.file.model_dump(mode="json"),
            "stems": [[*lemma, round(log, 4)] for lemma, log in sorted(self.model.stems.items())],
            "steps": [[*step, round(log, 4)] for step, log in sorted(self.model.steps.items())],
            "new_stem": round(self.model.new_stem, 4),
            "letters": [[*pair, round(log, 4)] for pair, log in sorted(self.model.letters.pairs.items())],
            "unseen_letters": round(self.model.letters.unseen, 4),
        }
        data = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        disk.write(path, data)

    @staticmethod
    def load(path: Path) -> Segmenter:
        """Read what `save` wrote; raises DataError where it is something else."""
        try:
            table = read_object(path)
            if table["format"] != _FORMAT:
                raise ValueError(f"format {table['format']}")
            rules = build_rules(RulesFile.model_validate(table["rules"]))
            stems = {Lemma(text, state, irregular): log for text, state, irregular, log in table["stems"]}
            steps = {(state, number): log for state, number, log in table["steps"]}
            pairs = {(before, letter): log for before, letter, log in table["letters"]}
            model = WordModel(stems, steps, table["new_stem"], LetterCosts(pairs, table["unseen_letters"]))
        except (OSError, JsonError, KeyError, TypeError, ValueError) as error:
            why = "`lowvram tokenizer train --morphology soft` writes such a file."
            raise DataError(f"{path} holds no learnt morphology.", why, "Name another file.") from error
        return Segmenter(rules, model)


def _cut(word: str, places: Sequence[int]) -> list[str]:
    return [word[start:end] for start, end in itertools.pairwise([0, *places, len(word)])]


def learn_segmenter(counts: Mapping[str, int], rules: Rules) -> Generator[tuple[str, int, int], None, Segmenter]:
    """Learn a segmenter from the counts of words; yield what is being done, how much of it is done, of how much.

    Raises DataError where there are no words.
    """
    model = yield from learn(choose_words(counts, rules), Analyser(rules))
    return Segmenter(rules, model)
