"""Multiple choice by likelihood: the choice that a model finds likeliest behind its question; with Turkish prompts.

The main figure is per byte of the choice, because a sum prefers short ones.  Below some billion parameters most tests
are near chance, so chance and a 95 % interval stand beside every share.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lowvram.data.nfc import nfc
from lowvram.data.tokenizer import count_bytes
from lowvram.evaluate.intervals import Interval, wilson
from lowvram.evaluate.records import Record, read_records
from lowvram.evaluate.scorer import Scorer
from lowvram.evaluate.turkish import lower_first

# SIB-200's topics, as they are asked for in Turkish.
TOPICS = {
    "science/technology": "bilim ve teknoloji",
    "travel": "seyahat",
    "politics": "siyaset",
    "sports": "spor",
    "health": "sağlık",
    "entertainment": "eğlence",
    "geography": "coğrafya",
}
_CONJUNCTIONS = {"cause": "çünkü", "effect": "bu yüzden"}


class Item(NamedTuple):
    """A context, the texts that may follow it, each with the blank before it, and the number of the right one."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoicesReport:
    """What a model chooses in a file of questions.

    kind: how the file's questions are asked.  per_byte: the share of right answers by the likelihood of a byte of the
    choice, with its 95 % interval; by_sum: by that of the whole choice.  chance: the share that guessing gets; longest:
    the one that the rule gets which takes the choice of most bytes, as wrong answers may be shorter.
    cut: questions that were longer than the model reads, so that their beginning was left out.
    """

    file: Path
    kind: str
    count: int
    per_byte: float
    interval: Interval
    by_sum: float
    chance: float
    longest: float
    cut: int

    @property
    def is_chance(self) -> bool:
        """Whether the share cannot be told from guessing."""
        return self.interval.contains(self.chance)


def read_items(file: Path) -> tuple[str, list[Item]]:
    """Read questions of XCOPA, ARC, TruthfulQA or SIB-200, or with `question` or `context`, `choices` and `answer`.

    Returns how they are asked, and the items.  `answer` is the number of the right choice counted from 0, its text, or
    one of `labels`.  In a table, lists and objects are written as JSON in their cell.
    Raises DataError, naming the line, where a record is of no such form, or two lines are of two.
    """
    kind = ""
    items: list[Item] = []
    for record in read_records(file):
        if not record.values:
            continue
        found = next((name for name, (fields, _) in _FORMS.items() if fields <= record.values.keys()), None)
        if found is None:
            known = "; ".join(f"{name}: {', '.join(sorted(fields))}" for name, (fields, _) in _FORMS.items())
            raise record.refuse(f"its fields are {', '.join(record.values)}, and questions have one of {known}")
        items.append(_check(record, _FORMS[found][1](record)))
        if kind not in ("", found):
            raise record.refuse(f"it has the fields of {found}, and the lines before it those of {kind}")
        kind = found
    return kind, items


def _check(record: Record, item: Item) -> Item:
    if len(item.choices) < 2 or not all(choice.strip() for choice in item.choices):
        raise record.refuse("it has fewer than two choices, or an empty one")
    return Item(nfc(item.context), tuple(map(nfc, item.choices)), item.answer)


def _read_xcopa(record: Record) -> Item:
    relation = record.text("question")
    if relation not in _CONJUNCTIONS:
        raise record.refuse(f"its question is {relation!r}, neither cause nor effect")
    premise = record.text("premise").strip().rstrip(".")
    choices = tuple(f" {lower_first(record.text(name).strip())}" for name in ("choice1", "choice2"))
    return Item(f"{premise} {_CONJUNCTIONS[relation]}", choices, _find_answer(record, "label", choices))


def _read_truthfulqa(record: Record) -> Item:
    targets = _unpack(record.values["mc1_targets"])
    if not isinstance(targets, dict) or not isinstance(targets.get("labels"), list) or targets["labels"].count(1) != 1:
        raise record.refuse("its mc1_targets are no object with choices and with labels of which one is 1")
    choices = _choices_of(record, targets.get("choices"))
    if len(choices) != len(targets["labels"]):
        raise record.refuse(f"it has {len(choices)} choices and {len(targets['labels'])} labels")
    return Item(_ask(record.text("question")), choices, targets["labels"].index(1))


def _read_sib(record: Record) -> Item:
    topic = record.text("category")
    if topic not in TOPICS:
        raise record.refuse(f"its category is {topic!r}; known are {', '.join(TOPICS)}")
    choices = tuple(f" {name}" for name in TOPICS.values())
    return Item(f"{record.text('tr', 'text').strip()}\nKonu:", choices, list(TOPICS).index(topic))


def _read_question(record: Record) -> Item:
    choices = _choices_of(record, record.values["choices"])
    question = _ask(record.text("question"))
    return Item(question, choices, _find_answer(record, "answer", choices))


def _read_context(record: Record) -> Item:
    choices = _choices_of(record, record.values["choices"])
    return Item(record.text("context").rstrip(), choices, _find_answer(record, "answer", choices))


def _ask(question: str) -> str:
    return f"Soru: {question.strip()}\nCevap:"


def _choices_of(record: Record, value: Any) -> tuple[str, ...]:
    choices = _unpack(value)
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise record.refuse('its choices are no list of texts, which in a table is written as ["…", "…"]')
    return tuple(f" {choice.strip()}" for choice in choices)


def _unpack(value: Any) -> Any:
    """Return the list or object that a cell of a table holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.strip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _find_answer(record: Record, name: str, choices: Sequence[str]) -> int:
    """Return the number of the right choice, from its number, its label or its text."""
    answer, labels = record.values[name], _unpack(record.values.get("labels"))
    if isinstance(labels, list) and len(labels) == len(choices):
        # A cell of a table is text, also where its labels are numbers.
        for known, given in ((labels, answer), ([str(label) for label in labels], answer)):
            if known.count(given) == 1:
                return known.index(given)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    texts = [choice.strip() for choice in choices]
    if isinstance(answer, str) and texts.count(answer.strip()) == 1:
        return texts.index(answer.strip())
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    if labels is None and isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in letters:
        return letters.index(answer.strip())
    if isinstance(answer, str) and re.fullmatch("[0-9]{1,9}", answer.strip()) and int(answer) < len(choices):
        return int(answer)
    raise record.refuse(f"its {name} is {answer!r}, which is none of its {len(choices)} choices")


# By the fields that records of each form have, the most particular first, and how they are read.
_FORMS: dict[str, tuple[set[str], Callable[[Record], Item]]] = {
    "XCOPA": ({"premise", "choice1", "choice2", "question", "label"}, _read_xcopa),
    "TruthfulQA (mc1)": ({"question", "mc1_targets"}, _read_truthfulqa),
    "SIB-200": ({"category", "tr"}, _read_sib),
    "SIB-200, one language": ({"category", "text"}, _read_sib),
    "question and choices": ({"question", "choices", "answer"}, _read_question),
    "context and choices": ({"context", "choices", "answer"}, _read_context),
}


def choose(
    scorer: Scorer, file: Path, kind: str, items: Sequence[Item]
) -> Generator[tuple[int, int], None, ChoicesReport]:
    """Let a model choose; yields the choices that are scored and those that there are."""
    requests = [scorer.encode(item.context, choice) for item in items for choice in item.choices]
    found = yield from scorer.score(requests)
    place = cut = 0
    by_sum = per_byte = longest = 0
    for item in items:
        likelihoods = found[place : place + len(item.choices)]
        place += len(item.choices)
        nats = [likelihood.nats for likelihood in likelihoods]
        by_sum += _is_right(item, nats)
        per_byte += _is_right(item, [cost / count_bytes(text) for cost, text in zip(nats, item.choices, strict=True)])
        longest += _is_right(item, [-count_bytes(choice) for choice in item.choices])
        cut += any(likelihood.was_cut for likelihood in likelihoods)
    count = len(items)
    chance = math.fsum(1 / len(item.choices) for item in items) / count
    shares = (by_sum / count, chance, longest / count)
    return ChoicesReport(file, kind, count, per_byte / count, wilson(per_byte, count), *shares, cut)


def _is_right(item: Item, costs: Sequence[float]) -> bool:
    """Say whether the right choice costs less than every other; one with the same text is the right one too."""
    right = costs[item.answer]
    return all(
        right < cost for cost, choice in zip(costs, item.choices, strict=True) if choice != item.choices[item.answer]
    )
