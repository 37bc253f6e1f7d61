"""Multiple choice: the forms of the known tests, the answers by hand, and what is said of chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.data.tokenizer import Tokenizer
from lowvram.data.turkish import lower_case
from lowvram.errors import DataError
from lowvram.evaluate.multiple_choice import Item, choose, read_items
from lowvram.evaluate.turkish import lower_first
from tests.evaluate.scored import finish, nats_by_hand, scorer_of, write

DATA = Path(__file__).parents[3] / "shared/data/eval"
QUESTION = {"question": "Kedi ne içer?", "choices": ["süt", "taş", "ışık"]}


def read_one(tmp_path: Path, **fields: object) -> Item:
    _, items = read_items(write(tmp_path / "items.jsonl", json.dumps(fields)))
    return items[0]


def test_xcopa_is_one_sentence_with_its_conjunction(tmp_path: Path) -> None:
    fields = {"premise": "Adam musluğu açtı.", "choice1": "Işık söndü.", "choice2": "İçeri su aktı.", "label": 1}
    found = read_one(tmp_path, **fields, question="effect")
    assert found == Item("Adam musluğu açtı bu yüzden", (" ışık söndü.", " içeri su aktı."), 1)
    assert read_one(tmp_path, **fields, question="cause").context == "Adam musluğu açtı çünkü"


@pytest.mark.parametrize(
    "fields, answer",
    [
        ({"answer": 0}, 0),
        ({"answer": "taş"}, 1),
        ({"answer": "C"}, 2),
        ({"answer": "2", "labels": ["1", "2", "3"]}, 1),
        ({"answer": 1, "labels": [1, 2, 3]}, 0),
    ],
    ids=["number", "text", "letter", "label", "number that is a label"],
)
def test_an_answer_may_be_a_number_a_text_a_letter_or_a_label(
    fields: dict[str, object], answer: int, tmp_path: Path
) -> None:
    found = read_one(tmp_path, **QUESTION, **fields)
    assert found == Item("Soru: Kedi ne içer?\nCevap:", (" süt", " taş", " ışık"), answer)


def test_the_other_forms(tmp_path: Path) -> None:
    targets = {"choices": ["Evet.", "Hayır."], "labels": [0, 1]}
    found = read_one(tmp_path, question="Öyle mi?", mc1_targets=targets, mc2_targets={})
    assert found == Item("Soru: Öyle mi?\nCevap:", (" Evet.", " Hayır."), 1)
    assert read_one(tmp_path, context="Bir varmış", choices=["bir", "iki"], answer=0).context == "Bir varmış"
    table = write(tmp_path / "sib.tsv", "index_id\tcategory\ttr\ten", "1\thealth\tAşı oldu.\tHe was vaccinated.")
    kind, items = read_items(table)
    assert kind == "SIB-200"
    assert items[0].context == "Aşı oldu.\nKonu:"
    assert items[0].choices[items[0].answer] == " sağlık"


@pytest.mark.parametrize(
    "fields, answer",
    [
        ({"premise": "Adam geldi.", "choice1": "a", "choice2": "b", "question": "effect", "label": 1}, 1),
        ({"question": "Kim?", "mc1_targets": {"choices": ["a", "b", "c"], "labels": [0, 0, 1]}}, 2),
        (QUESTION | {"answer": 2}, 2),
        (QUESTION | {"answer": 2, "labels": [1, 2, 3]}, 1),
        (QUESTION | {"answer": "taş"}, 1),
        ({"context": "Bir", "choices": ["1", "0"], "answer": "0"}, 1),
    ],
    ids=["XCOPA", "TruthfulQA", "number", "label", "text", "text of digits"],
)
def test_a_table_asks_what_json_lines_ask(fields: dict[str, Any], answer: int, tmp_path: Path) -> None:
    cells = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in fields.values()]
    table = write(tmp_path / "items.tsv", "\t".join(fields), "\t".join(cells))
    found = read_items(table)
    assert found == read_items(write(tmp_path / "items.jsonl", json.dumps(fields)))
    assert found[1][0].answer == answer


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"soru": "Kim?"}, "Its fields are soru, and questions have one of XCOPA: choice1"),
        (QUESTION | {"answer": "D"}, r"Its answer is 'D', which is none of its 3 choices"),
        (QUESTION | {"answer": "3"}, "Its answer is '3'"),
        (QUESTION | {"answer": True}, "Its answer is True"),
        (QUESTION | {"answer": 3}, "Its answer is 3"),
        (QUESTION | {"choices": "süt", "answer": 0}, "no list of texts"),
        (QUESTION | {"choices": ["süt"], "answer": 0}, "fewer than two choices"),
        ({"question": "Kim?", "mc1_targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "of which one is 1"),
        ({"category": "food", "tr": "Yemek"}, "Its category is 'food'; known are"),
        (
            {"context": "Bir", "choices": ["a", "b"], "answer": 0},
            "has the fields of context and choices, and the lines",
        ),
    ],
    ids=["other fields", "letter", "digits", "truth", "number", "a text", "one", "two right", "topic", "two forms"],
)
def test_a_question_of_another_form_is_refused_with_its_line(
    fields: dict[str, object], says: str, tmp_path: Path
) -> None:
    first = json.dumps(QUESTION | {"answer": 0})
    with pytest.raises(DataError, match=says) as error:
        read_items(write(tmp_path / "items.jsonl", first, json.dumps(fields)))
    assert "items.jsonl:2" in str(error.value)


def test_choices_are_those_of_likelihoods_by_hand(small_tokenizer: Tokenizer) -> None:
    scorer = scorer_of(small_tokenizer)
    words = [" çay", " bir kedi", " gökyüzü bulutsuzdu", " su", " incir ağacı"]
    items = [
        Item(f"Soru: {number} ne?\nCevap:", tuple(words[number:] + words[:number])[: 2 + number % 3], number % 2)
        for number in range(12)
    ]
    by_sum = per_byte = longest = 0
    for item in items:
        nats = [nats_by_hand(scorer, choice, item.context) for choice in item.choices]
        shares = [cost / len(choice.encode()) for cost, choice in zip(nats, item.choices, strict=True)]
        by_sum += nats.index(min(nats)) == item.answer
        per_byte += shares.index(min(shares)) == item.answer
        sizes = [len(choice.encode()) for choice in item.choices]
        longest += sizes.index(max(sizes)) == item.answer
    report = finish(choose(scorer, Path("items.jsonl"), "kind", items))
    assert (report.by_sum, report.per_byte, report.longest) == (by_sum / 12, per_byte / 12, longest / 12)
    assert report.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert 0 < by_sum < 12 or 0 < per_byte < 12
    assert report.cut == 0


def test_a_second_choice_of_the_same_text_is_right_too_and_a_tie_is_not(small_tokenizer: Tokenizer) -> None:
    scorer = scorer_of(small_tokenizer)
    same = Item("Soru:", (" çay", " çay"), 0)
    assert finish(choose(scorer, Path("x"), "", [same])).per_byte == 1.0
    with torch.no_grad():
        scorer.model.embedding.zero_()  # every token is as likely as every other
    tied = Item("Soru:", (" a", " b"), 0)
    assert finish(choose(scorer, Path("x"), "", [tied])).per_byte == 0.0


def test_of_a_question_that_is_too_long_the_end_is_read_and_it_is_counted(small_tokenizer: Tokenizer) -> None:
    scorer = scorer_of(small_tokenizer, max_context=24)
    long = Item("kedi " * 60 + "\nCevap:", (" süt", " taş"), 0)
    report = finish(choose(scorer, Path("x"), "", [long, Item("Kedi", (" süt", " taş"), 0)]))
    assert report.cut == 1


def test_chance_within_the_interval_is_named(small_tokenizer: Tokenizer) -> None:
    scorer = scorer_of(small_tokenizer)
    items = [Item(f"{number}", (" bir", " iki"), number % 2) for number in range(10)]
    report = finish(choose(scorer, Path("x"), "", items))
    assert report.is_chance == (report.interval.low <= 0.5 <= report.interval.high)
    assert report.is_chance


def test_turkish_lower_case_keeps_dotted_and_dotless_apart() -> None:
    assert lower_case("ISPARTA İZMİR Iğdır") == "ısparta izmir ığdır"
    assert len(lower_case("İIÇÂ")) == 4
    assert lower_first("Işık söndü. İyi") == "ışık söndü. İyi"
    assert lower_first("İyi") == "iyi"
    assert lower_first("TBMM toplandı") == "TBMM toplandı"
    assert lower_first("O geldi") == "o geldi"
    assert lower_first("") == ""


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not beside the checkout")
@pytest.mark.parametrize(
    "name, count, choices",
    [
        ("xcopa_tr.val.jsonl.gz", 100, {2}),
        ("arc_tr.jsonl.gz", 588, {3, 4, 5}),
        ("truthfulqa_tr.jsonl.gz", 386, set(range(2, 14))),
        ("sib200_flores_tr_kk_ru_en.dev.tsv.gz", 99, {7}),
    ],
)
def test_the_shared_tests_are_read_whole(name: str, count: int, choices: set[int]) -> None:
    _, items = read_items(DATA / name)
    assert len(items) == count
    assert {len(item.choices) for item in items} <= choices
