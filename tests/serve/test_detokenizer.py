"""Pieces of an answer hold whole characters and nothing of a stop string, however its tokens cut the text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.data.tokenizer import Tokenizer
from lowvram.serve.detokenizer import Detokenizer, Logprobs
from lowvram.serve.limits import LONGEST_STOP, MOST_STOPS

SURE = Logprobs(-0.5, ())


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return ids of single bytes: every letter beyond ASCII spans several tokens."""
    one = {tokenizer.token_bytes(id): id for id in range(tokenizer.size)}
    return [one[bytes([byte])] for byte in text.encode()]


def say(tokenizer: Tokenizer, text: str, *stops: str) -> tuple[list[str], str, Detokenizer]:
    """Return the pieces of a text said byte by byte until it stops, what finish adds, and the answer."""
    answer, pieces = Detokenizer(tokenizer, stops), []
    for id in byte_ids(tokenizer, text):
        pieces.append(answer.push(id).text)
        if answer.is_stopped:
            break
    return pieces, answer.finish().text, answer


def test_letters_that_span_tokens_are_never_cut(small_tokenizer: Tokenizer) -> None:
    pieces, rest, _ = say(small_tokenizer, "şığ")
    assert pieces == ["", "ş", "", "ı", "", "ğ"]
    assert rest == ""


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("bir iki üç", ["iki"], "bir "),
        ("bir iki üç", ["dört"], "bir iki üç"),
        ("aab", ["ab"], "a"),
        ("ababc", ["abc"], "ab"),
        ("bir\n\nSoru: x", ["\nSoru:"], "bir\n"),
        ("abc", ["abcd"], "abc"),
        ("abc", ["bc", "b"], "a"),
        ("xşy", ["ş"], "x"),
        ("dur", ["dur"], ""),
        ("abcde", ["cdx", "bcde"], "a"),
    ],
)
def test_a_stop_string_ends_the_answer_and_none_of_it_is_said(
    small_tokenizer: Tokenizer, text: str, stops: list[str], expected: str
) -> None:
    pieces, rest, answer = say(small_tokenizer, text, *stops)
    assert "".join(pieces) + rest == expected
    assert answer.is_stopped == (expected != text)


def test_what_may_begin_a_stop_string_is_held_back_and_said_when_it_does_not(small_tokenizer: Tokenizer) -> None:
    pieces, rest, _ = say(small_tokenizer, "abx", "abc")
    assert pieces == ["", "", "abx"]
    assert rest == ""
    assert say(small_tokenizer, "ab", "abc")[:2] == (["", ""], "ab")


def test_half_a_character_at_the_end_is_a_replacement_character(small_tokenizer: Tokenizer) -> None:
    answer = Detokenizer(small_tokenizer)
    assert answer.push(byte_ids(small_tokenizer, "ş")[0]).text == ""
    assert answer.finish().text == "�"


@given(text=st.text("abş ", max_size=12), stop=st.text("abş", min_size=1, max_size=4))
def test_any_text_is_cut_exactly_where_python_would(small_tokenizer: Tokenizer, text: str, stop: str) -> None:
    pieces, rest, _ = say(small_tokenizer, text, stop)
    assert "".join(pieces) + rest == text.split(stop)[0]


@given(text=st.text("ab", max_size=20), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_of_several_stop_strings_the_one_that_begins_first_cuts(
    small_tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    answer, said = Detokenizer(small_tokenizer, stops), ""
    for number, id in enumerate(byte_ids(small_tokenizer, text), 1):
        said += answer.push(id).text
        found = [text.find(stop) for stop in stops if stop in text[:number]]
        assert answer.is_stopped == bool(found)
        if found:
            assert said == text[: min(found)]
            break
        doubtful = [n for stop in stops for n in range(len(stop)) if text[:number].endswith(stop[:n])]
        assert said == text[: number - max(doubtful, default=0)]


class Counting(str):
    """A string that counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, place: object) -> str:
        Counting.looks += 1
        return super().__getitem__(place)  # type: ignore[index]


def test_long_stop_strings_cost_a_few_looks_a_character(small_tokenizer: Tokenizer) -> None:
    stops = [Counting("a" * (LONGEST_STOP - 1) + "b")] * MOST_STOPS
    answer = Detokenizer(small_tokenizer, stops)
    ids = byte_ids(small_tokenizer, "a" * 2000)
    Counting.looks = 0
    pieces = [answer.push(id).text for id in ids]
    assert "".join(pieces) == "a" * (2000 - LONGEST_STOP + 1)
    assert Counting.looks <= 3 * MOST_STOPS * 2000


def test_chances_come_with_the_text_of_their_tokens_and_not_with_a_stop_strings(small_tokenizer: Tokenizer) -> None:
    answer = Detokenizer(small_tokenizer, ["cd"])
    found = [answer.push(id, SURE) for id in byte_ids(small_tokenizer, "aşcd")]
    assert [piece.text for piece in found] == ["a", "", "ş", "", ""]
    assert [[one.start for one in piece.said] for piece in found] == [[0], [], [1, 1], [], []]
    assert answer.finish().said == ()


def test_chances_of_tokens_without_text_are_told_at_the_end(small_tokenizer: Tokenizer) -> None:
    answer = Detokenizer(small_tokenizer)
    assert answer.push(small_tokenizer.mask_id, SURE).said == ()
    assert [one.id for one in answer.finish().said] == [small_tokenizer.mask_id]
