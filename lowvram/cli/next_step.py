"""The last lines of a command: the next command, quoted so that the user's shell takes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowvram.shell import quote_command


def next_step(*words: str | Path, why: str = "") -> str:
    """Return `Next: lowvram WORDS`, and in brackets why it is worth typing."""
    return _say("Next:", words, why)


def or_step(*words: str | Path, why: str = "") -> str:
    """Return the line for another command that may come next, below that of `next_step`."""
    return _say("or:  ", words, why)


def _say(before: str, words: Sequence[str | Path], why: str) -> str:
    return f"{before} {quote_command('lowvram', *words)}" + (f"  ({why})" if why else "")


def with_value(typed: Sequence[str], option: str, value: str) -> list[str]:
    """Return the words of a command with another value of an option that they hold, spelt out or shortened."""
    words: list[str] = []
    is_value = False
    for word in typed:
        name, is_joined, _ = word.partition("=")
        is_option = len(name) > len("--") and option.startswith(name)
        if is_value:
            words.append(value)
        elif is_option and is_joined:
            words.append(f"{name}={value}")
        else:
            words.append(word)
        is_value = is_option and not is_joined
    return words
