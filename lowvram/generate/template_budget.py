"""Limits the work and memory that one rendering of a chat template may take; knows sizes of values and no Jinja.

A template comes from a stranger, and a thread cannot be stopped inside one operation of Python.  So every operation is
checked before it runs, by the sizes of its operands, and the operations are counted.
"""

from __future__ import annotations

import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from typing import TypeVar

_Value = TypeVar("_Value")
_CONTAINERS = (list, tuple, dict, KeysView, ValuesView, ItemsView)

# The largest templates of published models have about 30,000 characters.
MOST_SOURCE_CHARACTERS = 65_536
# Loop iterations, calls, filters, operators and outputs; a published template takes 5 to 30 steps for a message.
MOST_STEPS, STEPS_PER_MESSAGE = 1_000_000, 200
# Characters of all strings and elements of all lists that are made, intermediate ones too.
MOST_CHARACTERS, CHARACTERS_PER_MESSAGE = 4 << 20, 2_048
# Characters and elements of one value, each counted as many times as printing the value would show it.
MOST_OF_ONE_VALUE = 1 << 20
MOST_LEVELS = 100
MOST_INTEGER_BITS = 1_024
# CPU time of the rendering thread.  The counts end most templates within 2 s; this is for work that they underestimate.
MOST_CPU_S = 10.0
# Steps between two readings of the clock; one step takes 10 ms at most.
_STEPS_BETWEEN_LOOKS = 64
# A search for one text in another can cost the product of their lengths.
_MOST_COMPARISONS = 1 << 24


class BudgetError(Exception):
    """A template exceeds its budget; the text is a sentence that names the limit."""


class Budget:
    """What is left of one rendering's steps, characters and processor time."""

    def __init__(self, messages: int = 0) -> None:
        self._most_steps = self._steps = MOST_STEPS + STEPS_PER_MESSAGE * messages
        self._most_characters = self._characters = MOST_CHARACTERS + CHARACTERS_PER_MESSAGE * messages
        self._next_look = self._steps - _STEPS_BETWEEN_LOOKS
        self._ends_at_s = time.thread_time() + MOST_CPU_S
        # By id: the container itself (so that its id is not used again), its size and its depth.
        self._measured: dict[int, tuple[object, int, int]] = {}

    def step(self, count: int = 1) -> None:
        """Count steps; raises BudgetError where the steps or the time are used up."""
        self._steps -= count
        if self._steps <= self._next_look:
            self._look()

    def _look(self) -> None:
        if self._steps < 0:
            raise BudgetError(f"It takes more than {self._most_steps:,} steps (loops, calls, operators, outputs).")
        if time.thread_time() > self._ends_at_s:
            raise BudgetError(f"It takes more than {MOST_CPU_S:g} s of processor time.")
        self._next_look = max(self._steps - _STEPS_BETWEEN_LOOKS, -1)

    def take(self, characters: int) -> None:
        """Count characters or elements that were made, and one step."""
        self._characters -= characters
        self._steps -= 1
        if self._characters < 0:
            raise BudgetError(f"It makes more than {self._most_characters:,} characters of text.")
        if self._steps <= self._next_look:
            self._look()

    def check_size(self, characters: int) -> None:
        """Raise BudgetError where an operation's result would be too large; called before it runs."""
        if characters > MOST_OF_ONE_VALUE:
            raise BudgetError(f"It makes a value of more than {MOST_OF_ONE_VALUE:,} characters.")
        if characters > self._characters:
            raise BudgetError(f"It makes more than {self._most_characters:,} characters of text.")

    def check_bits(self, bits: int) -> None:
        """Raise BudgetError where an integer would have more bits than allowed."""
        if bits > MOST_INTEGER_BITS:
            raise BudgetError(f"It computes an integer of more than {MOST_INTEGER_BITS:,} bits.")

    def check_search(self, text: str, sought: object) -> None:
        """Raise BudgetError where looking for `sought` in `text` could take long."""
        if isinstance(sought, str) and len(text) * len(sought) > _MOST_COMPARISONS:
            raise BudgetError(f"It looks for a text of {len(sought):,} characters in one of {len(text):,}.")

    def new(self, value: _Value) -> _Value:
        """Count a value that an operation made, and return it."""
        if isinstance(value, str):
            self.check_size(len(value))
            self.take(len(value))
        elif isinstance(value, list | tuple | dict):
            if id(value) not in self._measured:
                self.take(len(value))
                self.size(value)
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        return value

    def join(self, parts: tuple[object, ...]) -> tuple[object, ...]:
        """Count values that are about to be joined to one string, and return them."""
        size = sum(map(self.size, parts))
        self.check_size(size)
        self.take(size)
        return parts

    def read(self, value: _Value) -> _Value:
        """Count an operation that reads all of a value, and return the value."""
        self.step(1 + (self.size(value) >> 6))
        return value

    def size(self, value: object) -> int:
        """Return how many characters and elements printing a value would show; raises BudgetError above the limit."""
        if isinstance(value, str):
            return len(value)
        return self.measure(value)[0]

    def measure(self, value: object, depth: int = 0) -> tuple[int, int]:
        """Return size and depth of a value.  Lists may share elements, so that few bytes can print as gigabytes."""
        if isinstance(value, str):
            return len(value), 0
        if not isinstance(value, _CONTAINERS):
            return (len(value) if isinstance(value, range) else 1), 0
        known = self._measured.get(id(value))
        if known is not None:
            return known[1:]
        if depth > MOST_LEVELS:
            raise BudgetError(f"It nests values deeper than {MOST_LEVELS} levels.")
        self.step(1 + (len(value) >> 3))
        size, inner_depth = 1, 0
        for element in (*value, *value.values()) if isinstance(value, Mapping) else value:
            if type(element) is str:
                size += len(element) + 1
            elif type(element) is int:
                size += 2
            else:
                element_size, element_depth = self.measure(element, depth + 1)
                size += element_size + 1
                inner_depth = max(inner_depth, element_depth)
            if size > MOST_OF_ONE_VALUE:
                raise BudgetError(f"It makes a value of more than {MOST_OF_ONE_VALUE:,} characters.")
        if inner_depth >= MOST_LEVELS:
            raise BudgetError(f"It nests values deeper than {MOST_LEVELS} levels.")
        self._measured[id(value)] = (value, size, inner_depth + 1)
        return size, inner_depth + 1
