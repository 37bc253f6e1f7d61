"""What a user typed, or a program sent, as text that a model can read: UTF-8, in NFC; knows no model."""

from __future__ import annotations

import re

from lowvram.data.nfc import nfc
from lowvram.errors import PromptError

# How Python hands over the bytes of an input or an argument that are not UTF-8 (errors="surrogateescape").
_STRANGE_BYTES = re.compile("[\udc80-\udcff]")
_OTHERS = re.compile("[\x80-\ud7ff\ue000-\U0010ffff]")
_SHOWN = 20


def read_typed(text: str) -> str:
    """Return the text in NFC, as the model learnt; raises PromptError where its bytes were not UTF-8."""
    strange = _STRANGE_BYTES.search(text)
    if strange is None:
        return nfc(text)
    what = f"The text is not UTF-8: byte 0x{ord(strange[0]) - 0xDC00:02X} at position {strange.start()}."
    # Where other letters than ASCII's were read as UTF-8, it is UTF-8 with a fault, and no other encoding.
    meant = None if _OTHERS.search(text) else _decode_turkish(text)
    if meant is None:
        raise PromptError(what, "That byte is damaged, or of another encoding.", "Send UTF-8, or leave it out.")
    around = meant[max(0, strange.start() - _SHOWN) : strange.start() + _SHOWN].strip()
    raise PromptError(
        what,
        f"It is probably windows-1254 (ISO-8859-9, Latin-5), in which it reads “{around}”.",
        "Set your terminal or editor to UTF-8, or convert the text: iconv -f WINDOWS-1254 -t UTF-8",
    )


def _decode_turkish(text: str) -> str | None:
    try:
        return text.encode("utf-8", "surrogateescape").decode("cp1254")
    except UnicodeError:
        return None
