"""How much of each source merges are learnt from, which pieces those are, and how much memory that is said to take."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.data.mix.portions import Portion, TextSize, choose_portions
from lowvram.data.mix.shares import Wish
from lowvram.data.sample import write_document
from lowvram.data.tokenizer import estimate_memory
from lowvram.errors import DataError
from tests.flows.typed import environment

# A Cyrillic letter takes two bytes, so that bytes would halve the share of the second one.
SIZES = {"tr": TextSize(1_000, 1_100), "kk": TextSize(500, 1_000)}


def test_shares_are_of_characters_and_a_small_source_is_read_several_times() -> None:
    portions = choose_portions(SIZES, 10_000, 0.0, {})
    assert portions == {"tr": Portion(0.5, 1.0, 1_100), "kk": Portion(0.5, 2.0, 1_000)}
    assert [portion.learnt_bytes for portion in portions.values()] == [1_100, 2_000]
    assert [portion.distinct_bytes for portion in portions.values()] == [1_100, 1_000]
    half = choose_portions(SIZES, 1_550, 0.0, {})
    assert [portion.copies for portion in half.values()] == [0.5, 1.0]
    assert [portion.copies for portion in choose_portions(SIZES, 10_000, 1.0, {}).values()] == [1.0, 1.0]
    wished = choose_portions(SIZES, 10_000, 1.0, {"kk": Wish(share=0.8)})
    assert [portion.copies for portion in wished.values()] == [1.0, 8.0]


@given(
    st.lists(st.integers(1, 10**9), min_size=2, max_size=8),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.integers(10**6, 10**10),
)
def test_no_more_is_read_than_was_asked_for_and_every_source_whole_where_there_is_room(
    characters: list[int], temperature: float, most_bytes: int
) -> None:
    sizes = {f"s{number}": TextSize(count, 2 * count) for number, count in enumerate(characters)}
    portions = choose_portions(sizes, most_bytes, temperature, {})
    learnt = sum(portion.copies * portion.text_bytes for portion in portions.values())
    assert learnt <= most_bytes * 1.006, "copies are rounded to three digits"
    if learnt < most_bytes * 0.99:
        assert min(portion.copies for portion in portions.values()) >= 0.994
    shares = {name: portion.copies * sizes[name].characters for name, portion in portions.items()}
    for name, portion in portions.items():
        assert shares[name] / sum(shares.values()) == pytest.approx(portion.share, rel=0.02)


def test_pieces_are_taken_by_their_words_as_often_as_the_share_says() -> None:
    documents = [write_document(3, number) for number in range(300)]
    for copies in (0.3, 1.7):
        portion = Portion(1.0, copies, 1)
        taken = Counter(piece for text in documents for piece in portion.take(text))
        assert set(taken.values()) == ({1} if copies < 1 else {1, 2})
        assert taken.total() / len(documents) == pytest.approx(copies, abs=0.1)
        again = Counter(piece for text in documents[::-1] for piece in portion.take(text.replace("\n", "\r\n")))
        assert {piece.replace("\r\n", "\n") for piece in again} == set(taken), "neither order nor line ends decide"
    assert list(Portion(1.0, 2.0, 1).take("a\nb")) == ["a\nb", "a\nb"]


def test_a_large_document_is_taken_in_pieces_that_are_all_of_it() -> None:
    book = "\n".join(write_document(4, number) for number in range(1_000))
    seen = dict.fromkeys(Portion(1.0, 1.5, 1).take(book))
    assert len(seen) > 5
    assert "".join(seen) == book
    part = "".join(Portion(1.0, 0.5, 1).take(book))
    assert 0.2 * len(book) < len(part) < 0.8 * len(book)


def test_a_source_without_text_is_refused_by_its_name() -> None:
    with pytest.raises(DataError, match="kk holds no text to learn from"):
        choose_portions({"tr": TextSize(5, 5), "kk": TextSize()}, 10, 1.0, {})
    with pytest.raises(DataError, match="There is no text to learn a tokenizer from"):
        choose_portions({"": TextSize()}, 10, 1.0, {})


def test_a_gigabyte_is_said_to_fit_into_six() -> None:
    one = estimate_memory([10**9])
    assert 2e9 < one < 6e9
    assert estimate_memory([0]) < 0.2e9
    assert one < estimate_memory([5 * 10**8, 5 * 10**8]), "two languages have more words than one"


def test_learning_a_vocabulary_does_not_wait_for_torch() -> None:
    say = "import sys, lowvram.api.tokenizer_training, lowvram.data.mix.portions; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", say], check=True, capture_output=True, text=True, env=environment())
    assert found.stdout == "False\n", "it is 200 MB and two seconds"
