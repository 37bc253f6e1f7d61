"""Guesses the encoding of bytes that are not UTF-8, and advises what to do; knows no file."""

from __future__ import annotations

import re
from typing import NamedTuple

_HIGH = re.compile(rb"[\x80-\xff]")
_SEQUENCE = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# The letters by which the older encodings of Turkish text are recognised.
_LETTERS = "çğıöşüâîûÇĞİÖŞÜÂÎÛ"
_OLDER_ENCODINGS = {"WINDOWS-1254": "cp1254", "CP857": "cp857", "MACTURKISH": "mac_turkish"}
# In text of an older encoding, few pairs of bytes look like a character of UTF-8; in damaged UTF-8, most characters are
# whole.
_LEAST_WHOLE = 0.1
_LEAST_LETTERS = 0.8


# Windows-1254 is certain where so many bytes of such a share are letters and marks of Turkish text, and some of them
# letters that Latin-1 has not.
_LEAST_CERTAIN = 20
_CERTAIN_SHARE = 0.98
_LEAST_OWN = 4
_OWN = set("ğışĞİŞ".encode("cp1254"))
_MARKS = "€‚„…‘’“”•–—™ «»°·§©®½¼²³éèÉñäÄß´`"


class Advice(NamedTuple):
    """Why bytes are not UTF-8, and what to do, as two sentences."""

    why: str
    fix: str


def explain_not_utf8(sample: bytes) -> Advice:
    """Return advice on a file that is not UTF-8.  sample: the bad line, and other lines of the file if available."""
    whole = len(_SEQUENCE.findall(sample))
    others = _HIGH.findall(_SEQUENCE.sub(b"", sample))
    if whole >= _LEAST_WHOLE * (whole + len(others)):
        why = "Most of the file is UTF-8, so this place is damaged; converting the file would ruin the rest."
        return Advice(why, "Mend or delete that line.")
    shares = {name: _share_of_letters(_HIGH.findall(sample), codec) for name, codec in _OLDER_ENCODINGS.items()}
    name = max(shares, key=shares.__getitem__)
    if shares[name] >= _LEAST_LETTERS:
        return Advice(f"Its letters are Turkish if read as {name}.", f"Convert it: iconv -f {name} -t UTF-8")
    return Advice("Its encoding could not be guessed.", "Find out which it is, and convert it with iconv -t UTF-8")


def is_windows_1254(sample: bytes) -> bool:
    """Return whether bytes that are not UTF-8 are Turkish text in Windows-1254 for certain."""
    high = _HIGH.findall(sample)
    whole = len(_SEQUENCE.findall(sample))
    if len(high) < _LEAST_CERTAIN or whole >= _LEAST_WHOLE * len(high):
        return False
    known = set((_LETTERS + _MARKS).encode("cp1254"))
    others = max(_share_of_letters(high, codec) for codec in ("cp857", "mac_turkish"))
    return (
        sum(byte[0] in known for byte in high) >= _CERTAIN_SHARE * len(high)
        and sum(byte[0] in _OWN for byte in high) >= _LEAST_OWN
        and others < _LEAST_LETTERS
    )


def _share_of_letters(high: list[bytes], codec: str) -> float:
    known = set(_LETTERS.encode(codec, "ignore"))
    return sum(byte[0] in known for byte in high) / max(1, len(high))
