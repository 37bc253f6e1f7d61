"""A curve of text shows what its numbers do."""

from __future__ import annotations

import math

import pytest

from lowvram.cli.curve import draw_curve


def test_a_falling_loss_falls_from_the_left_to_the_right() -> None:
    assert draw_curve([8.0, 4.0, 2.0, 1.0], 40, rows=2) == ["  8.000  █", "  1.000  █▇▃▁"]
    assert draw_curve([3.0, 2.0, 1.0], 40, rows=3, is_ascii=True) == ["  3.000  #", "         #:", "  1.000  ##."]


def test_many_steps_are_averaged_into_the_columns_that_there_are() -> None:
    losses = [10.0 - step / 100 for step in range(800)]
    lines = draw_curve(losses, 29)
    assert len(lines) == 4
    assert max(map(len, lines)) == 29
    assert lines[0].startswith("  9.805  █")
    assert lines[-1].startswith("  2.205  ")
    assert lines[-1].endswith("▁")


@pytest.mark.parametrize("losses", [[], [1.0], [math.nan] * 9], ids=["none", "one", "no numbers"])
def test_nothing_to_draw_is_no_line(losses: list[float]) -> None:
    assert draw_curve(losses, 80) == []


def test_what_is_not_finite_is_left_out_and_equal_losses_are_flat() -> None:
    assert draw_curve([2.0, math.nan, math.inf, 1.0], 80, rows=1) == ["  2.000  █▁"]
    assert draw_curve([2.0, 2.0], 80, rows=1) == ["  2.000  ▁▁"]


@pytest.mark.parametrize("width", [10, 11, 1000])
def test_no_line_is_wider_than_asked(width: int) -> None:
    for line in draw_curve([float(n % 7) for n in range(5000)], width):
        assert len(line) <= width
