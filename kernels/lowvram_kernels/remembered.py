"""Remembers choices whose arguments are values, since an op asks for the same ones at every launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

# Choices that are kept of one function: prompts and texts have many lengths.
_MOST_REMEMBERED = 4_096
Key = ParamSpec("Key")
Chosen = TypeVar("Chosen")


def remembered(choose: Callable[Key, Chosen]) -> Callable[Key, Chosen]:
    """Return a choice that is asked once for each of its arguments, which are values; compilers ask it as it is."""
    known: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(choose)
    def choose_once(*key: Key.args, **named: Key.kwargs) -> Chosen:
        if named or torch.compiler.is_compiling():
            return choose(*key, **named)
        try:
            chosen: Chosen = known[key]
        except KeyError:
            if len(known) >= _MOST_REMEMBERED:
                known.clear()
            chosen = known[key] = choose(*key, **named)
        return chosen

    return choose_once
