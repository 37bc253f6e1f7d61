"""Applies the rules that need no other document to some documents, in order; knows no file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lowvram.config.cleaning import CleaningRules
from lowvram.data.clean import boilerplate, checks
from lowvram.data.clean.batch import Batch
from lowvram.data.clean.contamination import EvaluationIndex
from lowvram.data.clean.language import find_language
from lowvram.data.clean.private import KINDS, replace_private
from lowvram.data.clean.repair import REPAIRS, repair_texts
from lowvram.data.clean.toxicity import ToxicWords


@dataclass(frozen=True)
class Change:
    """What a rule did to a document, the first of them for the report: index, text before and after.

    after: None where the document was removed.  why: a few words about this document, where the rule has any.
    """

    rule: str
    document: int
    before: str
    after: str | None
    why: str = ""


@dataclass
class Outcome:
    """Documents after the rules.

    kept: indices of the documents that are left; texts: what they are now.  batch: of these texts and of some that were
    removed, None where none is left; left: the places of `texts` in it.
    removed, changed: documents by rule; parts: lines and private data by kind.  characters: taken away, by rule.
    examples: up to the number asked for, of each rule.
    """

    kept: list[int]
    texts: list[str]
    batch: Batch | None = None
    left: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    removed: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    characters: Counter[str] = field(default_factory=Counter)
    examples: list[Change] = field(default_factory=list)


class DocumentRules:
    """The rules that are on, with the lists that they need.  most_examples: of each rule and call."""

    def __init__(
        self,
        rules: CleaningRules,
        toxic: ToxicWords | None = None,
        evaluation: EvaluationIndex | None = None,
        most_examples: int = 3,
    ) -> None:
        self.rules = rules
        self._toxic = toxic or (ToxicWords() if rules.toxicity.on else None)
        self._evaluation = evaluation
        self._most_examples = most_examples
        self._repairs = [name for name in REPAIRS if getattr(rules, name).on]
        self._private = {kind for kind in KINDS if rules.private.on and getattr(rules.private, kind)}
        self._boilerplate = boilerplate.hash_lines(rules.boilerplate.lines) if rules.boilerplate.on else None

    def apply(self, texts: Sequence[str]) -> Outcome:
        """Return what the rules leave of some documents; `texts` stays as it is."""
        outcome = Outcome([], [])
        whole, indices = self._take_too_long(outcome, texts)
        whole = self._repair(outcome, indices, whole)
        whole = self._replace_private(outcome, indices, whole)
        indices, whole = self._drop_empty(outcome, indices, whole)
        if not whole:
            return outcome
        batch = Batch(whole)
        if self._boilerplate is not None:
            indices, batch = self._drop_lines(outcome, indices, batch, self._boilerplate)
        if not indices:
            return outcome
        left = self._remove(outcome, indices, batch)
        outcome.kept = [indices[place] for place in left]
        outcome.texts = [batch.texts[place] for place in left]
        if left:
            outcome.batch, outcome.left = batch, np.array(left, np.int64)
        return outcome

    def _take_too_long(self, outcome: Outcome, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """Return the documents that are short enough for arrays; the others break the rule of length, on or off."""
        most = self.rules.length.most_characters
        for index, text in enumerate(texts):
            if len(text) > most:
                self._note(outcome, Change("length", index, text[:2_000], None, f"{len(text):,} characters"))
                outcome.removed["length"] += 1
                outcome.characters["length"] += len(text)
        indices = [index for index, text in enumerate(texts) if len(text) <= most]
        return [texts[index] for index in indices], indices

    def _note(self, outcome: Outcome, change: Change) -> None:
        if sum(other.rule == change.rule for other in outcome.examples) < self._most_examples:
            outcome.examples.append(change)

    def _repair(self, outcome: Outcome, indices: list[int], texts: list[str]) -> list[str]:
        if not texts:
            return texts
        repaired, changed = repair_texts(texts, self._repairs)
        for name, places in changed.items():
            outcome.changed[name] += len(places)
            for place in places[: self._most_examples]:
                self._note(outcome, Change(name, indices[place], texts[place], repaired[place]))
        return repaired

    def _replace_private(self, outcome: Outcome, indices: list[int], texts: list[str]) -> list[str]:
        if not self._private:
            return texts
        replaced = []
        for index, text in zip(indices, texts, strict=True):
            after, found = replace_private(text, self._private)
            if found:
                outcome.changed["private"] += 1
                outcome.parts.update(found)
                self._note(outcome, Change("private", index, text, after))
            replaced.append(after)
        return replaced

    def _drop_empty(self, outcome: Outcome, indices: list[int], texts: list[str]) -> tuple[list[int], list[str]]:
        """Leave out documents of which the repairs leave nothing."""
        kept = [(index, text) for index, text in zip(indices, texts, strict=True) if text and not text.isspace()]
        outcome.removed["length"] += len(texts) - len(kept)
        return [index for index, _ in kept], [text for _, text in kept]

    def _drop_lines(
        self, outcome: Outcome, indices: list[int], batch: Batch, known: NDArray[np.uint64]
    ) -> tuple[list[int], Batch]:
        marks = boilerplate.mark_lines(batch, known)
        if not marks.any():
            return indices, batch
        outcome.parts["boilerplate"] += int(marks.sum())
        texts = list(batch.texts)
        first_lines = np.searchsorted(batch.line_documents, np.arange(len(texts)))
        for place in np.unique(batch.line_documents[marks]).tolist():
            first = int(first_lines[place])
            lines = texts[place].split("\n")
            after = "\n".join(line for number, line in enumerate(lines) if not marks[first + number]).strip("\n")
            is_removed = not after or after.isspace()
            self._note(outcome, Change("boilerplate", indices[place], texts[place], None if is_removed else after))
            (outcome.removed if is_removed else outcome.changed)["boilerplate"] += 1
            outcome.characters["boilerplate"] += len(texts[place]) - len(after)
            texts[place] = "" if is_removed else after
        left = [place for place, text in enumerate(texts) if text]
        return [indices[place] for place in left], Batch([texts[place] for place in left]) if left else batch

    def _remove(self, outcome: Outcome, indices: list[int], batch: Batch) -> list[int]:
        """Return the places of the documents that no rule removes; each is removed by the first rule that it breaks."""
        is_left = np.ones(len(batch.texts), np.bool_)
        for name, marks, why in self._judge(batch):
            broken = np.flatnonzero(marks & is_left)
            is_left[broken] = False
            outcome.removed[name] += len(broken)
            outcome.characters[name] += int(batch.lengths[broken].sum())
            for place in broken[: self._most_examples].tolist():
                self._note(outcome, Change(name, indices[place], batch.texts[place], None, why.get(place, "")))
        left: list[int] = np.flatnonzero(is_left).tolist()
        return left

    def _judge(self, batch: Batch) -> list[tuple[str, NDArray[np.bool_], dict[int, str]]]:
        """Return for each rule that is on its name, which documents break it, and words about some of them."""
        rules = self.rules
        found: list[tuple[str, NDArray[np.bool_], dict[int, str]]] = []
        if rules.length.on:
            found.append(("length", checks.breaks_length(batch, rules.length), {}))
        if rules.symbols.on:
            found.append(("symbols", checks.breaks_symbols(batch, rules.symbols), {}))
        if rules.repetition.on:
            found.append(("repetition", checks.breaks_repetition(batch, rules.repetition), {}))
        if rules.language.on and rules.language.keep:
            found.append(("language", *self._judge_language(batch)))
        if rules.toxicity.on and self._toxic is not None:
            found.append(("toxicity", self._judge_toxicity(batch, self._toxic), {}))
        if rules.contamination.on and self._evaluation is not None:
            found.append(("contamination", self._evaluation.count(batch) > 0, {}))
        return found

    def _judge_language(self, batch: Batch) -> tuple[NDArray[np.bool_], dict[int, str]]:
        rule = self.rules.language
        marks, found = np.zeros(len(batch.texts), np.bool_), {}
        for place, text in enumerate(batch.texts):
            if len(text) >= rule.least_characters:
                code = find_language(text, rule.keep)
                if code not in rule.keep:
                    marks[place], found[place] = True, code or "no language"
        return marks, found

    def _judge_toxicity(self, batch: Batch, toxic: ToxicWords) -> NDArray[np.bool_]:
        rule = self.rules.toxicity
        listed = np.bincount(batch.word_documents[toxic.mark(batch)], minlength=len(batch.texts))
        return (listed >= rule.least_words) & (listed > rule.most_share * batch.word_counts)
