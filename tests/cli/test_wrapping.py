"""Lines break between words, whole or in pieces, and nothing of the text is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from lowvram.cli.wrapping import WordWrap, wrap_words


def in_pieces(text: str, size: int, width: int, indent: int = 0) -> str:
    wrapped = WordWrap(width, indent)
    pieces = [wrapped.push(text[start : start + size]) for start in range(0, len(text), size)]
    return "".join([*pieces, wrapped.end()])


def cells_of(line: str) -> int:
    """How far a line reaches in a terminal, whose tabs stop at every eighth cell."""
    end = 0
    for letter in line:
        end = end // 8 * 8 + 8 if letter == "\t" else end + cell_len(letter)
    return end


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("abışğ漢🙂.' \t\n-"), max_size=120),
    size=st.integers(1, 9),
    width=st.integers(1, 30),
    indent=st.integers(0, 8),
)
@example(text="bir  iki üç", size=2, width=5, indent=0)
@example(text="a" * 40 + " b", size=3, width=10, indent=4)
@example(text="aaaaaaa漢\t漢", size=1, width=18, indent=0)
def test_pieces_wrap_as_the_whole_text_does_and_lose_no_word(text: str, size: int, width: int, indent: int) -> None:
    found = in_pieces(text, size, width, indent)
    assert found == in_pieces(text, max(1, len(text)), width, indent)
    assert found.split() == text.split()
    kept = indent if indent <= width // 2 else 0
    for line in found.split("\n"):
        # Only a word that is wider than a line can make a line too wide.
        words = line.split()
        assert cells_of(line) <= width or any(cell_len(word) > width - kept for word in words), line
    assert text.count("\n") <= found.count("\n")


def test_a_text_that_fits_is_left_as_it_is() -> None:
    text = "  iki\tsütun\n\nbir  satır"
    assert wrap_words(text, 40) == text


@pytest.mark.parametrize(("width", "lines"), [(13, 1), (12, 2)], ids=["at the limit", "one beyond"])
def test_a_line_of_exactly_the_width_is_not_broken(width: int, lines: int) -> None:
    assert len(wrap_words("kedi köpek ev", width).split("\n")) == lines


def test_wide_letters_count_two_cells() -> None:
    assert wrap_words("漢字 漢字", 9) == "漢字 漢字"
    assert wrap_words("漢字 漢字", 8) == "漢字\n漢字"


def test_a_path_that_is_wider_than_the_line_stays_in_one_piece() -> None:
    path = "/home/ayşe/" + "metinler/" * 9
    lines = wrap_words(f"Saved to {path} now.", 20).split("\n")
    assert path in lines
    # In a conversation the end of such a word may be far away, so it is shown before it has ended.
    wrapped = WordWrap(20)
    shown = wrapped.push("x" * 10**4)
    assert shown == "x" * 10**4


def test_a_held_back_word_is_never_longer_than_a_line() -> None:
    wrapped = WordWrap(10)
    assert wrapped.push("kedi") == ""
    assert wrapped.push(" ") == "kedi"
    assert wrapped.push("köpek") == ""
    assert wrapped.push("lerden biri") == "\nköpeklerden"
    assert wrapped.end() == "\nbiri"


def test_further_lines_begin_below_the_second_column_or_the_first_word() -> None:
    assert (
        wrap_words("processor     x86-64 with four cores", 28)
        == "processor     x86-64 with\n" + " " * 14 + "four cores"
    )
    assert wrap_words("    peak of this run and more", 18) == "    peak of this\n    run and more"
    assert wrap_words("It fits.  It is fast here.", 12) == "It fits.  It\nis fast\nhere."


def test_an_indent_of_more_than_half_the_width_is_given_up() -> None:
    found = wrap_words(" " * 15 + "bir iki üç", 20)
    assert re.search(r"\n\S", found)
