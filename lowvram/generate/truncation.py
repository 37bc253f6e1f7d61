"""Which turns of a conversation are left out where it is too long; knows neither model nor template.

Whole turns go, the oldest first, until the rest fits, and what is left begins with what a user said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def find_starts(roles: Sequence[str], first: int = 0) -> list[int]:
    """Return the turns from `first` on at which a shorter conversation may begin: `first`, users' turns, the last."""
    last = len(roles) - 1
    return [first, *(turn for turn in range(first + 1, len(roles)) if roles[turn] != "assistant" or turn == last)]


def drop_oldest(starts: Sequence[int], encode: Callable[[int], list[int]], room: int) -> tuple[int, list[int]]:
    """Return the earliest start from which the conversation has at most `room` tokens, and its ids.

    starts: as `find_starts` returns them.  encode: ids of the turns from a start on; it is called at most
    2 + log2(len(starts)) times, with ever shorter conversations while they are too long.
    Where none fits, the last start and its ids, which are longer than `room`.
    """
    ids = encode(starts[0])
    if len(ids) <= room:
        return starts[0], ids
    too_long, fitting = 0, len(starts)
    found: list[int] | None = None
    while fitting - too_long > 1:
        middle = (too_long + fitting) // 2
        ids = encode(starts[middle])
        if len(ids) <= room:
            fitting, found = middle, ids
        else:
            too_long = middle
    # The last start was tried if no other fits, so `ids` are its own.
    return (starts[-1], ids) if found is None else (starts[fitting], found)
