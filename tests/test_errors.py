"""An error has up to three parts, and an unknown word is answered with the nearest known ones."""

from __future__ import annotations

import inspect

import lowvram_kernels.errors
import pytest

import lowvram.errors
from lowvram.errors import BusyError, LowvramError, ShapeError, name_nearest


def test_an_error_reads_as_what_why_and_what_to_do() -> None:
    error = LowvramError("The disk is full.", "3 B were free.", "Free some.")
    assert str(error) == "The disk is full. 3 B were free. Free some."
    assert (error.what, error.why, error.fix) == ("The disk is full.", "3 B were free.", "Free some.")


@pytest.mark.parametrize(
    "parts, text",
    [(("A.",), "A."), (("A.", "", "C."), "A. C."), ((" A. ", " B."), "A. B.")],
    ids=["one part", "no reason", "stray spaces"],
)
def test_a_part_that_is_missing_leaves_no_gap(parts: tuple[str, ...], text: str) -> None:
    assert str(BusyError(*parts)) == text


def test_every_public_error_is_caught_by_the_command_line() -> None:
    classes = [getattr(lowvram.errors, name) for name in lowvram.errors.__all__ if name.endswith("Error")]
    assert len(classes) >= 11
    for kind in classes:
        assert inspect.isclass(kind)
        assert issubclass(kind, LowvramError | ShapeError), kind


def test_the_kernels_shape_error_is_shown_again_and_not_another_one() -> None:
    assert ShapeError is lowvram_kernels.errors.ShapeError


@pytest.mark.parametrize(
    "word, sentence",
    [
        ("seqlen", "Did you mean seq_len?"),
        ("lr", "Did you mean lr?"),
        ("zzz", "Known: batch_tokens, lr, seq_len, tokens."),
        ("", "Known: batch_tokens, lr, seq_len, tokens."),
        ("token", "Did you mean tokens?"),
        ("tokes_len", "Did you mean tokens or seq_len?"),
    ],
)
def test_the_nearest_known_words_are_named_or_else_all_of_them(word: str, sentence: str) -> None:
    assert name_nearest(word, {"tokens", "lr", "seq_len", "batch_tokens"}) == sentence
