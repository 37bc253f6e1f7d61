"""Of a conversation that is too long the fewest oldest turns are left out, in few tries; tested on lengths alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowvram.generate.truncation import drop_oldest, find_starts

ROLES = st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=30)


def linear(roles: list[str], lengths: list[int], room: int) -> int | None:
    """Drop one turn after another, and an assistant's that would stand first, until the rest fits."""
    start, last = 0, len(roles) - 1
    while sum(lengths[start:]) > room:
        if start == last:
            return None
        start += 1
        while start < last and roles[start] == "assistant":
            start += 1
    return start


@settings(max_examples=100, deadline=None)
@given(roles=ROLES, room=st.integers(0, 60), data=st.data())
def test_the_same_turns_are_kept_as_by_dropping_one_after_another(
    roles: list[str], room: int, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=len(roles), max_size=len(roles)))
    start, ids = drop_oldest(find_starts(roles), lambda start: [0] * sum(lengths[start:]), room)
    expected = linear(roles, lengths, room)
    assert (start if len(ids) <= room else None) == expected
    assert len(ids) == sum(lengths[start:])


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 60_000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_a_conversation_is_encoded_few_times_however_many_turns_it_has(count: int, share: float) -> None:
    tried = list[int]()

    def encode(start: int) -> list[int]:
        tried.append(start)
        return [0] * (count - start)

    room = round(count * share)
    start, ids = drop_oldest(find_starts(["user"] * count), encode, room)
    assert (start, len(ids)) == ((count - room, room) if room else (count - 1, 1))
    assert len(tried) <= 2 + math.log2(count)


def test_a_shorter_conversation_begins_with_a_user_or_is_the_last_turn() -> None:
    assert find_starts(["assistant", "user", "assistant", "assistant", "user", "assistant"]) == [0, 1, 4, 5]
    assert find_starts(["user", "assistant", "user"], first=1) == [1, 2]
    assert find_starts(["user"]) == [0]
