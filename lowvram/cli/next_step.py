"""The last line of a command: the next command, quoted so that the user's shell takes it."""

from __future__ import annotations

from pathlib import Path

from lowvram.shell import quote_command


def next_step(*words: str | Path, why: str = "") -> str:
    """Return `Next: lowvram WORDS`, and in brackets why it is worth typing."""
    return f"Next: {quote_command('lowvram', *words)}" + (f"  ({why})" if why else "")
