"""What a run asks with each validation: a fixed few minimal pairs, analysed sentences and questions; learns nothing.

Which they are follows from the files alone, so that curves of runs with other tokenizers compare.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lowvram.config.run import RunOptions
from lowvram.data.tokenizer import count_bytes
from lowvram.errors import DataError, NumbersError
from lowvram.evaluate.minimal_pairs import Pair, answer_pairs, choose_light_subset, read_pairs
from lowvram.evaluate.multiple_choice import Item, choose, read_items
from lowvram.evaluate.records import spread
from lowvram.evaluate.scorer import Scorer
from lowvram.evaluate.suffix_loss import Sentence, measure_suffixes, read_sentences
from lowvram.finish import finish
from lowvram.train.oom import free_memory, is_out_of_memory

PAIRS, SENTENCES, QUESTIONS = 256, 512, 96
# Of the texts of each kind, and so the most tokens that are scored of it: docs/evaluate.md tells what they take.
MOST_BYTES = 48 * 1024

_Asked = TypeVar("_Asked")
_Figure = TypeVar("_Figure")


class LightSubset(NamedTuple):
    """What each validation of a run asks; a kind is empty where the run names no file of it."""

    pairs: list[Pair]
    sentences: list[Sentence]
    items: list[Item]


def read_light_subset(run: RunOptions) -> LightSubset:
    """Return what each validation of a run asks; raises DataError where a file that it names is of another kind."""
    return LightSubset(
        _read_pairs(run.pairs) if run.pairs is not None else [],
        _read_sentences(run.suffixes) if run.suffixes is not None else [],
        _read_items(run.choices) if run.choices is not None else [],
    )


@functools.lru_cache(maxsize=1)
def _read_pairs(file: Path) -> list[Pair]:
    pairs = read_pairs(file)
    if all(pair.good == pair.bad for pair in pairs):
        raise DataError(f"{file} holds no pair whose sentences differ.", "run.pairs names it.", "Name another file.")
    sized = [(count_bytes(pair.good) + count_bytes(pair.bad), pair) for pair in choose_light_subset(pairs, len(pairs))]
    return _choose(file, "pairs", sized, PAIRS)


@functools.lru_cache(maxsize=1)
def _read_sentences(file: Path) -> list[Sentence]:
    return _choose(file, "suffixes", [(len(text.kind_T), text) for text in read_sentences(file)], SENTENCES)


@functools.lru_cache(maxsize=1)
def _read_items(file: Path) -> list[Item]:
    sized = [(sum(count_bytes(item.context + choice) for choice in item.choices), item) for item in read_items(file)[1]]
    return _choose(file, "choices", sized, QUESTIONS)


def _choose(file: Path, key: str, sized: Sequence[tuple[int, _Asked]], most: int) -> list[_Asked]:
    """Return at most so many items, evenly spread over all that are short enough, with MOST_BYTES together at most."""
    short = [each for each in sized if each[0] <= MOST_BYTES]
    if not short:
        what = f"Each text in {file} has more than {MOST_BYTES:,} bytes."
        raise DataError(what, f"run.{key} names it, and a validation reads no more.", "Name a file of shorter texts.")
    chosen = spread(short, most)
    while (size := sum(size for size, _ in chosen)) > MOST_BYTES:
        chosen = spread(short, min(len(chosen) - 1, len(chosen) * MOST_BYTES // size))
    return [item for _, item in chosen]


def measure_light_subset(run: RunOptions, scorer: Scorer) -> dict[str, Any]:
    """Return what `Evaluated` tells of the light subset, by the names of its fields.

    A figure is None where the model's numbers are broken or memory ran out: a run goes on without it.
    """
    asked = read_light_subset(run)
    found: dict[str, Any] = {}
    if run.pairs is not None:
        answer = functools.partial(_answer_pairs, scorer, asked.pairs)
        found["pairs_right"], found["pairs_problem"] = _try(scorer, answer, "minimal pairs were asked")
    if run.suffixes is not None:
        measure = functools.partial(_measure_suffixes, scorer, run.suffixes, asked.sentences)
        found["suffix_bits"], found["suffixes_problem"] = _try(scorer, measure, "suffixes were measured")
    if run.choices is not None:
        choose_all = functools.partial(_answer_questions, scorer, run.choices, asked.items)
        found["choices_right"], found["choices_problem"] = _try(scorer, choose_all, "questions were asked")
    return found


def _answer_pairs(scorer: Scorer, pairs: Sequence[Pair]) -> float:
    return sum(finish(answer_pairs(scorer, pairs)).by_sum) / len(pairs)


def _measure_suffixes(scorer: Scorer, file: Path, sentences: Sequence[Sentence]) -> dict[str, float]:
    report = finish(measure_suffixes(scorer, file, sentences))
    return {row.name: row.bits_per_byte for row in report.rows if row.bits_per_byte is not None}


def _answer_questions(scorer: Scorer, file: Path, items: Sequence[Item]) -> float:
    return finish(choose(scorer, file, "", items)).per_byte


def _try(scorer: Scorer, measure: Callable[[], _Figure], doing: str) -> tuple[_Figure | None, str]:
    """Return a figure, and why memory did not suffice for it, else an empty text."""
    try:
        return measure(), ""
    except NumbersError:  # later steps may repair the weights; a diverged run is stopped by the trainer
        return None, ""
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Behind the handler, since the error's frames keep the tensors alive.
    free_memory(scorer.model.embedding.device)
    return None, f"Memory ran out while the {doing}; training goes on without that figure."
