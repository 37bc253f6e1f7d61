"""Minimal pairs against sums by hand, against rules that need no model, and TurBLiMP's own traps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lowvram.api import measures, tasks
from lowvram.cli import evaluate_tables
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.evaluate.intervals import of_mean, wilson
from lowvram.evaluate.likelihood import Request, Scoring, score_requests
from lowvram.evaluate.minimal_pairs import Answers, Pair, answer_pairs, read_pairs, report_pairs
from lowvram.evaluate.records import spread
from lowvram.evaluate.scorer import Scorer
from lowvram.units import show_bytes
from tests.evaluate.scored import finish, nats_by_hand, scorer_of, write

DATA = Path(__file__).parents[3] / "shared/data/eval/turblimp.jsonl.gz"
PAIRS = [
    Pair("Annem çay demlerdi.", "Annem çay demlerdim.", "agreement"),
    Pair("Kuşlar öttü.", "Kuşlar öttün.", "agreement"),
    Pair("Ben geldim.", "Ben geldik.", "agreement"),
    Pair("Çünkü yağmur yağdı, eve döndük.", "Çünkü yağmur, eve döndük.", "deletion"),
    Pair("Hava serindi.", "Hava serindi idi.", "addition"),
]


def test_answers_are_those_of_sums_by_hand(small_tokenizer: Tokenizer) -> None:
    scorer = scorer_of(small_tokenizer)
    found = finish(answer_pairs(scorer, PAIRS))
    nats = [(nats_by_hand(scorer, pair.good), nats_by_hand(scorer, pair.bad)) for pair in PAIRS]
    assert found.by_sum == [good < bad for good, bad in nats]
    per_byte = [
        good / len(pair.good.encode()) < bad / len(pair.bad.encode())
        for pair, (good, bad) in zip(PAIRS, nats, strict=True)
    ]
    assert found.per_byte == per_byte


def test_swapping_the_two_sentences_swaps_every_answer(small_tokenizer: Tokenizer) -> None:
    scorer = scorer_of(small_tokenizer)
    swapped = [Pair(pair.bad, pair.good, pair.phenomenon) for pair in PAIRS]
    one, other = finish(answer_pairs(scorer, PAIRS)), finish(answer_pairs(scorer, swapped))
    assert [not right for right in one.by_sum] == other.by_sum
    assert [not right for right in one.per_byte] == other.per_byte


def test_a_report_counts_by_phenomenon_beside_the_untrained_model_and_the_length_rule() -> None:
    trained = Answers([True, False, True, True, False], [True] * 5)
    untrained = Answers([False] * 4 + [True], [False, True, False, False, False])
    report = report_pairs(Path("pairs.jsonl"), PAIRS, trained, untrained, 2)
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["addition", "agreement", "deletion"]
    agreement = rows["agreement"]
    assert (agreement.count, agreement.by_sum, agreement.per_byte) == (3, 2 / 3, 1.0)
    assert (agreement.untrained, agreement.untrained_per_byte) == (0.0, 1 / 3)
    # The third pair has as many bytes in both sentences, so the rule guesses.
    assert agreement.shorter == pytest.approx(2.5 / 3)
    assert (rows["deletion"].shorter, rows["addition"].shorter) == (0.0, 1.0)
    assert report.identical == 2
    assert report.mean.by_sum == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert report.mean.count == 5
    assert report.controlled_mean is None


def test_without_memory_for_the_untrained_model_the_trained_ones_answers_are_told(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(small_tokenizer)._replace(dtype=torch.bfloat16)
    twin = scorer.untrained().model
    assert scorer.untrained_bytes() == sum(part.nbytes for part in (*twin.parameters(), *twin.buffers()))
    files = ((Path("one.jsonl"), PAIRS, 1), (Path("two.jsonl"), PAIRS[:2], 0))
    whole, notices = tasks.finish(measures._measure_pairs(scorer, files))
    assert notices == ()
    asked = []

    def fail_at_the_second(self: Scorer, requests: Sequence[Request]) -> Scoring:
        asked.append(self.model is not scorer.model)
        if sum(asked) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return score_requests(self.model, requests, self.dtype, self.max_context)

    monkeypatch.setattr(Scorer, "score", fail_at_the_second)
    (one, two), notices = tasks.finish(measures._measure_pairs(scorer, files))
    assert one == whole[0]
    assert [row.by_sum for row in two.rows] == [row.by_sum for row in whole[1].rows]
    assert {row.untrained for row in (*two.rows, two.mean)} == {None}
    assert [notice.level for notice in notices] == ["warning"]
    assert show_bytes(scorer.untrained_bytes()) in notices[0].text
    evaluate_tables._show_pairs(two)


def test_the_interval_of_a_share_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert of_mean([0.5], [100]) == pytest.approx(wilson(50, 100))
    assert of_mean([1.0, 0.0], [1, 1]) == pytest.approx((0.5 - 0.7935 / 2, 0.5 + 0.7935 / 2), abs=1e-4)
    assert wilson(50, 100).contains(0.5)
    assert not wilson(90, 100).contains(0.5)


def test_pairs_are_read_in_either_spelling(tmp_path: Path) -> None:
    fields = {"sentence_good": "i\u0307yi", "sentence_bad": "kotu", "phenomenon": "a", "subtype": "b", "subset": "base"}
    lines = [fields, fields | {"subset": "experimental"}, {"good": "Bir", "bad": "Biri"}]
    found = read_pairs(write(tmp_path / "pairs.jsonl", *map(json.dumps, lines)))
    assert found == [
        Pair("i̇yi", "kotu", "a_b"),
        Pair("i̇yi", "kotu", "a_b (experimental)"),
        Pair("Bir", "Biri", "all pairs"),
    ]
    table = write(tmp_path / "pairs.tsv", "good\tbad\tUID", "Bir\tBiri\tx")
    assert read_pairs(table) == [Pair("Bir", "Biri", "x")]


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"good": "Bir"}', r'A pair has two texts: .*"good" and "bad"; it has good\.'),
        ('{"good": "Bir", "bad": 3}', r"Its field 'bad' is a number, not text"),
        ('{"good": "Bir", "bad": " "}', "one of the two sentences is empty".capitalize()),
        ("[1, 2]", "is a list, not an object"),
        ('{"good": "Bir"', "is not JSON"),
    ],
    ids=["one sentence", "a number", "empty", "a list", "cut short"],
)
def test_a_pair_of_another_form_is_refused_with_its_line(line: str, says: str, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", '{"good": "Bir", "bad": "Biri"}', line)
    with pytest.raises(DataError, match=says) as error:
        read_pairs(file)
    assert "pairs.jsonl:2" in str(error.value)


def test_items_are_spread_evenly() -> None:
    assert spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert spread(list(range(3)), 4) == spread(list(range(3)), None) == [0, 1, 2]


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not beside the checkout")
def test_turblimps_traps_are_shown_by_the_length_rule() -> None:
    pairs = read_pairs(DATA)
    differing = [pair for pair in pairs if pair.good != pair.bad]
    assert len(pairs) - len(differing) == 23
    nothing = Answers([False] * len(differing), [False] * len(differing))
    report = report_pairs(DATA, differing, nothing, nothing, 23)
    shorter = {row.name: row.shorter for row in report.rows}
    assert shorter["island_effects"] == shorter["passives"] == 1.0
    assert shorter["determiners"] == shorter["binding"] == 0.0
    assert shorter["npi_licensing"] > 0.95
    assert report.controlled_mean is not None
    assert 0.4 < report.controlled_mean.shorter < 0.6
