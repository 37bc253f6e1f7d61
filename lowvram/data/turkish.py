"""Lower case by Turkish rules; knows no word."""

from __future__ import annotations


def lower_case(text: str) -> str:
    """Return the text in Turkish lower case, letter for letter: I becomes ı and İ becomes i."""
    return text.replace("İ", "i").replace("I", "ı").lower()
