"""The last lines of a command: the next command, quoted so that the user's shell takes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowvram.shell import quote_command

# As argparse takes it.
_SET = ("--set", "--se", "--s")


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


def with_assignment(typed: Sequence[str], key: str, value: str) -> list[str]:
    """Return the words of a command with `--set KEY=VALUE` at their end, and without what they assign to that key.

    key: its full name; one that is typed may leave out the name of its table.
    """
    words: list[str] = []
    place = 0
    while place < len(typed):
        option, is_joined, assignment = typed[place].partition("=")
        taken = [typed[place]]
        is_set = option in _SET
        if is_set and not is_joined and place + 1 < len(typed):
            assignment = typed[place + 1]
            taken.append(assignment)
        place += len(taken)
        if not (is_set and assignment.partition("=")[0].strip() in (key, key.rpartition(".")[2])):
            words += taken
    return [*words, "--set", f"{key}={value}"]
