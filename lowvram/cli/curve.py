"""A loss curve in a few lines of text; reads no file and prints nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_ASCII = " .:#"  # for a pipe, whose reader may know no other letters
_LABEL_CELLS = 9


def draw_curve(losses: Sequence[float], width: int, rows: int = 4, is_ascii: bool = False) -> list[str]:
    """Return a curve of `rows` lines and at most `width` columns, the largest and the smallest mean beside it.

    Each column stands for the mean of its share of the losses; what is not finite is left out, and so is a column of
    nothing else.  Empty for fewer than two columns.
    """
    means = _average(losses, width - _LABEL_CELLS)
    if len(means) < 2:
        return []
    letters = _ASCII if is_ascii else _BLOCKS
    least, most = min(means), max(means)
    steps = rows * (len(letters) - 1)
    # The smallest still has one step, so that a column is never mistaken for a missing one.
    heights = [1 + round((mean - least) / ((most - least) or 1) * (steps - 1)) for mean in means]
    lines = []
    for row in reversed(range(rows)):
        filled = [min(len(letters) - 1, max(0, height - row * (len(letters) - 1))) for height in heights]
        label = f"{most:7.3f}" if row == rows - 1 else f"{least:7.3f}" if row == 0 else ""
        lines.append(f"{label:<{_LABEL_CELLS}}{''.join(letters[level] for level in filled)}".rstrip())
    return lines


def _average(losses: Sequence[float], columns: int) -> list[float]:
    """Return the means of equal shares of the losses."""
    count = min(columns, len(losses))
    means = []
    for column in range(count):
        share = losses[column * len(losses) // count : (column + 1) * len(losses) // count]
        finite = [loss for loss in share if math.isfinite(loss)]
        if finite:
            means.append(sum(finite) / len(finite))
    return means
