"""What the report shows of a text: a few hundred characters without private data; knows no rule.

Every example passes through here, because a rule that repairs, or is before the one for private data, or stands beside
it where that is off, would show what was never to be handed on.
"""

from __future__ import annotations

from lowvram.data.clean.private import KINDS, MARKS, replace_private
from lowvram.data.clean.repair import REPAIRS

_SHOWN_CHARACTERS = 300
# So much of a text is looked at on each side, so that what is shown is never cut inside an address.
_SEEN_CHARACTERS = 10_000


def show_text(text: str) -> str:
    """Return the beginning of a text without private data."""
    return _hide(text[:_SEEN_CHARACTERS])[:_SHOWN_CHARACTERS]


def show_change(before: str, after: str | None) -> dict[str, str]:
    """Return a text as it was (`before`) and, where a rule left something of it, became (`after`).

    They begin a little before the first change.  Where private data are all that changed, or were hidden by what was
    repaired, only the text with the marks that stand for them is shown, as `before`.
    """
    if after is None:
        return {"before": show_text(before)}
    change = _first_difference(before, after)
    start = max(0, change - _SEEN_CHARACTERS)
    old, new = (_hide(text[start : change + _SEEN_CHARACTERS]) for text in (before, after))
    # Behind the middle of what is seen they may differ only because one was shortened more.
    surely_seen = change - start + _SEEN_CHARACTERS // 2
    is_alike = old[:surely_seen] == new[:surely_seen]
    first = min((new.find(mark) for mark in MARKS.values() if mark in new), default=0)
    shown_from = max(0, (first if is_alike else _first_difference(old, new)) - _SHOWN_CHARACTERS // 3)
    shown = slice(shown_from, shown_from + _SHOWN_CHARACTERS)
    return {"before": new[shown]} if is_alike else {"before": old[shown], "after": new[shown]}


def _first_difference(one: str, other: str) -> int:
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))


def _hide(text: str) -> str:
    """Replace private data, also where they are found only in the repaired text, which is returned then."""
    hidden, found = replace_private(text, KINDS)
    for repair in REPAIRS.values():
        text = repair(text)
    repaired, more = replace_private(text, KINDS)
    return hidden if more == found else repaired
