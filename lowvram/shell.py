"""A command quoted so that the user's shell takes it, and the words that start this program; knows no command."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import lowvram

# Letters of every language are literal in every shell.  `~` is not: some shells expand it at the start of a word.
_PLAIN_POSIX = re.compile(r"[\w@%+=:,./-]+")
# cmd.exe splits at `,` `;` and `=`, and PowerShell gives `@` and `,` a meaning; `\` is the separator of paths there.
_PLAIN_WINDOWS = re.compile(r"[\w+:.\\/-]+")


def quote_command(*words: str | Path, is_windows: bool = sys.platform == "win32") -> str:
    """Return words as one line of a POSIX shell, or of both cmd.exe and PowerShell.

    A path that begins with `-` gets `./` before it, because it would be read as an option; `-` alone stays.
    """
    return " ".join(_quote(_as_argument(word), is_windows) for word in words)


def own_command(directory: Path) -> list[str]:
    """Return the words that run this lowvram with this Python in a directory.

    The directory is not searched for modules, where a user's `queue.py` would be taken for Python's own, unless lowvram
    itself lies there.
    """
    is_here = Path(lowvram.__file__).resolve().parents[1] == directory
    return [sys.executable, *([] if is_here else ["-P"]), "-m", "lowvram"]


def _as_argument(word: str | Path) -> str:
    text = str(word)
    return f"./{text}" if isinstance(word, Path) and text.startswith("-") and text != "-" else text


def _quote(word: str, is_windows: bool) -> str:
    plain = _PLAIN_WINDOWS if is_windows else _PLAIN_POSIX
    if plain.fullmatch(word):
        return word
    if not is_windows:
        return shlex.quote(word)
    # The C runtime reads `\"` as a quotation mark, so backslashes before one, also before the closing one, are doubled.
    escaped = re.sub(r'(\\*)("|\Z)', lambda found: found[1] * 2 + found[2].replace('"', r"\""), word)
    return f'"{escaped}"'
