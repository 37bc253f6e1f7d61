"""Turkish sentences as items need them, and which vowels suffixes look at; knows no suffix."""

from __future__ import annotations

from lowvram.data.turkish import lower_case

VOWELS = "aeıioöuüâîû"


def lower_first(text: str) -> str:
    """Return a sentence with its first letter in lower case, as it stands behind a conjunction.

    A word in capitals alone stays, since it is a name or an abbreviation.
    """
    word = text.split(maxsplit=1)[0] if text.strip() else ""
    return text if len(word) > 1 and word.isupper() else lower_case(text[:1]) + text[1:]
