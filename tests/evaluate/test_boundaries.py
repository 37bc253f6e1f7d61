"""Boundaries of words are compared with gold ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.errors import DataError
from lowvram.evaluate.boundaries import GoldWord, read_gold, score_boundaries

GOLD = (GoldWord("evlerde", ("ev", "ler", "de"), 3), GoldWord("bir", ("bir",), 5), GoldWord("okul", ("okul",), 1))
CUTS = {"evlerde": ("ev", "lerd", "e"), "bir": ("bir",), "okul": ("ok", "ul")}


def test_the_figures_are_those_counted_by_hand() -> None:
    by_type = score_boundaries(GOLD, CUTS.__getitem__)
    # Found: 2 | 6 and 2, of which the first 2 is right; wanted: 2 and 5.
    assert (by_type.words, by_type.precision, by_type.recall) == (3, pytest.approx(1 / 3), 0.5)
    assert by_type.f1 == pytest.approx(2 / 5)
    assert (by_type.over, by_type.under, by_type.exact) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert (by_type.macro_precision, by_type.macro_recall) == pytest.approx(((0.5 + 1 + 0) / 3, (0.5 + 1 + 1) / 3))
    by_token = score_boundaries(GOLD, CUTS.__getitem__, by="token")
    assert by_token.words == 9
    assert (by_token.precision, by_token.recall) == pytest.approx((3 / 7, 3 / 6))


def test_nothing_found_and_nothing_wanted_has_no_f1() -> None:
    found = score_boundaries(GOLD[1:2], CUTS.__getitem__)
    assert (found.precision, found.recall, found.f1, found.macro_f1, found.exact) == (None, None, None, 1.0, 1.0)


BAD = {
    "no column": ("word\tparts\n ev\tev\n", "no field 'form'"),
    "parts that do not add up": ("form\tsegmentation\nevler\tev lar\n", "do not add up to 'evler'"),
    "a count of letters": ("form\tsegmentation\tcount\nev\tev\tmany\n", "Its count is 'many'"),
    "a count of nothing": ("form\tsegmentation\tcount\nev\tev\t0\n", "Its count is '0'"),
    "no rows": ("form\tsegmentation\n", "holds no items"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_gold_of_the_wrong_form_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "gold.tsv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_gold(file)
    assert says in str(caught.value)


def test_gold_is_read(tmp_path: Path) -> None:
    file = tmp_path / "gold.tsv"
    file.write_text("form\tsegmentation\tcount\nevlerde\tev ler de\t3\nbir\tbir\t5\nokul\tokul\t1\n", encoding="utf-8")
    assert tuple(read_gold(file)) == GOLD
