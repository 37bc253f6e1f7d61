"""Plain text is cut by learnt stems, and every byte has the class of its stem or suffix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lowvram.data.morphology.rules import read_rules
from lowvram.data.morphology.segmenter import Segmenter, learn_segmenter
from lowvram.errors import DataError
from lowvram.evaluate.plain_suffixes import read_plain_sentences
from lowvram.evaluate.turkish_suffixes import CLASSES
from lowvram.finish import finish


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    words = [stem + ending for stem in ("ev", "şehir", "deniz") for ending in ("", "ler", "lerde", "den", "lerin")]
    words += ["mi", "mı", "mu", "mü", "misiniz", "mısınız", "musunuz"]
    return finish(learn_segmenter(Counter(dict.fromkeys(words, 2)), read_rules("tr")))


def test_each_byte_has_the_class_of_its_part(segmenter: Segmenter, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Şehirlerde, evden!\n\n1923\nDenizler’in\nEvde misiniz\n", encoding="utf-8")
    first, second, third = read_plain_sentences(file, segmenter)
    names = [CLASSES[kind] for kind in first.kind_T]
    assert first.text == "Şehirlerde, evden!"
    assert names == ["stem"] * 6 + ["plural"] * 3 + ["case"] * 2 + ["other"] + ["stem"] * 3 + ["case"] * 3 + ["other"]
    assert len(names) == len(first.text.encode())
    assert (first.words, first.unexplained) == (2, 0)
    assert first.parts[CLASSES.index("case")] == 2
    assert second.text == "Denizler’in"
    assert [CLASSES[kind] for kind in second.kind_T] == ["stem"] * 5 + ["plural"] * 3 + ["case"] * 5
    # The blank belongs to the particle, which counts as a stem.
    names = [CLASSES[kind] for kind in third.kind_T]
    assert names == ["stem"] * 2 + ["case"] * 2 + ["stem"] * 3 + ["person"] * 5


def test_text_without_words_is_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("1923, 2023\n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no word"):
        read_plain_sentences(file, segmenter)
