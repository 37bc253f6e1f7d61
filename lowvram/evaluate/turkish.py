"""Turkish letters: lower case, and which vowels and consonants suffixes look at; knows no suffix."""

from __future__ import annotations

_LOWER = str.maketrans({"I": "ı", "İ": "i"})
VOWELS = "aeıioöuüâîû"


def lower_case(text: str) -> str:
    """Return the text in Turkish lower case, letter for letter: I becomes ı and İ becomes i."""
    return text.translate(_LOWER).lower()


def lower_first(text: str) -> str:
    """Return a sentence with its first letter in lower case, as it stands behind a conjunction.

    A word in capitals alone stays, since it is a name or an abbreviation.
    """
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    return text if len(word) > 1 and word.isupper() else lower_case(text[:1]) + text[1:]
