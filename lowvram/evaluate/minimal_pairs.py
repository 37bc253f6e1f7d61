"""Minimal pairs: does a model prefer the grammatical one of two sentences?  Beside it, what knows no grammar.

A sum of log-probabilities prefers the shorter sentence, so a phenomenon whose wrong sentence is always longer is solved
by a rule that counts letters.  Each phenomenon is therefore shown with that rule and with the untrained model.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lowvram.data.nfc import nfc
from lowvram.data.tokenizer import count_bytes
from lowvram.evaluate.intervals import Interval, of_mean, wilson
from lowvram.evaluate.records import Record, read_records, spread
from lowvram.evaluate.scorer import Scorer

# TurBLiMP's phenomena whose two sentences are about equally long; in the others length gives the answer away.
LENGTH_CONTROLLED = (
    "anaphor_agreement",
    "argument_structure_ditransitive",
    "argument_structure_transitive",
    "ellipsis",
    "irregular_forms",
    "nominalization",
    "relative_clauses",
    "scrambling",
    "subject_verb_agreement",
)
# The harness names a phenomenon otherwise than TurBLiMP's files do.
_OTHER_NAMES = {"subject_agreement": "subject_verb_agreement"}
_NEEDED = 'A pair has two texts: "sentence_good" and "sentence_bad", or "good" and "bad"'


class Pair(NamedTuple):
    """A grammatical and an ungrammatical sentence, both in NFC, and the phenomenon that they differ in."""

    good: str
    bad: str
    phenomenon: str


class Answers(NamedTuple):
    """For each pair, whether the better sentence has the greater probability as a whole, and per byte."""

    by_sum: list[bool]
    per_byte: list[bool]


@dataclass(frozen=True)
class PairsRow:
    """Shares of right answers on `count` pairs of one phenomenon, or means of several phenomena.

    by_sum: by the probability of the whole sentence, with its 95 % interval.  per_byte: by that of a byte.
    untrained, untrained_per_byte: the same of the model before training, None where it was not asked.  shorter: of the
    rule that takes the shorter sentence, which guesses where both have as many bytes.
    """

    name: str
    count: int
    by_sum: float
    interval: Interval
    per_byte: float
    untrained: float | None
    untrained_per_byte: float | None
    shorter: float


@dataclass(frozen=True)
class PairsReport:
    """What a model prefers in a file of minimal pairs.

    rows: one for each phenomenon.  identical: pairs whose two sentences are one, which nobody can answer; they are in
    no row.  mean: of all phenomena, each counting alike.  controlled_mean: of those of TurBLiMP that length does not
    give away, None where the file does not hold all of them.
    """

    file: Path
    rows: tuple[PairsRow, ...]
    identical: int
    mean: PairsRow
    controlled_mean: PairsRow | None


def read_pairs(file: Path) -> list[Pair]:
    """Read pairs from JSON lines or a table; raises DataError, naming the line, where one is of another form.

    The phenomenon is the field `phenomenon` or `UID`, with `subtype` and `subset` where TurBLiMP has them.
    """
    return [_read_pair(record) for record in read_records(file) if record.values]


def _read_pair(record: Record) -> Pair:
    names = ("sentence_good", "good"), ("sentence_bad", "bad")
    if not all(any(name in record.values for name in choice) for choice in names):
        raise record.refuse(f"{_NEEDED}; it has {', '.join(record.values)}")
    good, bad = (nfc(record.text(*choice)) for choice in names)
    if not good.strip() or not bad.strip():
        raise record.refuse("one of the two sentences is empty")
    phenomenon = next((record.text(name) for name in ("phenomenon", "UID") if name in record.values), "all pairs")
    if subtype := record.values.get("subtype"):
        phenomenon = f"{phenomenon}_{subtype}"
    phenomenon = _OTHER_NAMES.get(phenomenon, phenomenon)
    if (subset := record.values.get("subset")) not in (None, "", "base"):
        phenomenon = f"{phenomenon} ({subset})"
    return Pair(good, bad, phenomenon)


def choose_light_subset(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """Return a few pairs for a curve: of the length-controlled phenomena where the file has all, evenly spread."""
    differing = [pair for pair in pairs if pair.good != pair.bad]
    controlled = [pair for pair in differing if pair.phenomenon in LENGTH_CONTROLLED]
    has_all = {pair.phenomenon for pair in controlled} == set(LENGTH_CONTROLLED)
    return spread(controlled if has_all else differing, most)


def answer_pairs(scorer: Scorer, pairs: Sequence[Pair]) -> Generator[tuple[int, int], None, Answers]:
    """Ask a model for its preferences; yields the sentences that are scored and those that there are."""
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    found = yield from scorer.score([scorer.encode("", sentence) for sentence in sentences])
    nats = [likelihood.nats for likelihood in found]
    per_byte = [cost / count_bytes(sentence) for cost, sentence in zip(nats, sentences, strict=True)]
    return Answers(
        *([good < bad for good, bad in zip(costs[::2], costs[1::2], strict=True)] for costs in (nats, per_byte))
    )


def report_pairs(
    file: Path, pairs: Sequence[Pair], trained: Answers, untrained: Answers | None, identical: int
) -> PairsReport:
    """Sum up the answers of a model and, if it was asked, of the same model before training to the same pairs."""
    rows = []
    for phenomenon in sorted({pair.phenomenon for pair in pairs}):
        places = [place for place, pair in enumerate(pairs) if pair.phenomenon == phenomenon]
        count = len(places)

        def share(answers: Sequence[bool], of: Sequence[int] = places) -> float:
            return sum(answers[place] for place in of) / len(of)

        before, before_per_byte = map(share, untrained) if untrained is not None else (None, None)
        shorter = math.fsum(_guess_shorter(pairs[place]) for place in places) / count
        interval = wilson(sum(trained.by_sum[place] for place in places), count)
        shares = share(trained.by_sum), interval, share(trained.per_byte), before, before_per_byte, shorter
        rows.append(PairsRow(phenomenon, count, *shares))
    controlled = [row for row in rows if row.name in LENGTH_CONTROLLED]
    has_all = len(controlled) == len(LENGTH_CONTROLLED)
    mean = _average("mean of all phenomena", rows)
    controlled_mean = _average("mean of the length-controlled", controlled) if has_all else None
    return PairsReport(file, tuple(rows), identical, mean, controlled_mean)


def _guess_shorter(pair: Pair) -> float:
    """Return whether the rule that takes the sentence of fewer bytes is right, one half where it must guess."""
    good, bad = count_bytes(pair.good), count_bytes(pair.bad)
    return 0.5 if good == bad else float(good < bad)


def _average(name: str, rows: Sequence[PairsRow]) -> PairsRow:
    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(rows)

    def mean_before(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    return PairsRow(
        name,
        sum(row.count for row in rows),
        mean(row.by_sum for row in rows),
        of_mean([row.by_sum for row in rows], [row.count for row in rows]),
        mean(row.per_byte for row in rows),
        mean_before([row.untrained for row in rows]),
        mean_before([row.untrained_per_byte for row in rows]),
        mean(row.shorter for row in rows),
    )
