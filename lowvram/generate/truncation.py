"""Chooses which turns of a conversation are left out where it is too long; knows neither model nor template.

Whole turns are dropped, the oldest first, until the rest fits, and the rest begins with a user's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def find_starts(roles: Sequence[str], first: int = 0) -> list[int]:
    """Return the turns, from `first` on, with which a conversation may begin: `first`, users' turns, the last."""
    last = len(roles) - 1
    return [first, *(turn for turn in range(first + 1, len(roles)) if roles[turn] != "assistant" or turn == last)]


def drop_oldest(starts: Sequence[int], encode: Callable[[int], list[int]], room: int) -> tuple[int, list[int]]:
    """Return the earliest start from which the conversation has at most `room` tokens, and its ids.

    starts: as `find_starts` returns them.  encode: returns the ids of the turns from a start on; it is called at most
    2 + log2(len(starts)) times, with ever shorter conversations while they are too long.
    Where none fits, returns the last start and its ids, which are longer than `room`.
    """
    ids = encode(starts[0])
    if len(ids) <= room:
        return starts[0], ids
    too_long, fitting = 0, len(starts)
    fitting_ids: list[int] | None = None
    while fitting - too_long > 1:
        middle = (too_long + fitting) // 2
        ids = encode(starts[middle])
        if len(ids) <= room:
            fitting, fitting_ids = middle, ids
        else:
            too_long = middle
    # The last start was tried if no other fits, so `ids` are its own.
    return (starts[-1], ids) if fitting_ids is None else (starts[fitting], fitting_ids)
