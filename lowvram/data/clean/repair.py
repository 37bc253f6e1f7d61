"""Repairs characters that a program spoilt: mojibake, invisible characters, white space; knows no words.

Each repair returns the text, unchanged where there is nothing to repair, and none takes a letter away.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from lowvram.data.nfc import nfc

_SPOILT_LETTERS = "çğıöşüÇĞİÖŞÜâîûÂÎÛ"
_SPOILT_SIGNS = "’‘“”„…–—•«»°·₺€"


def _spell_spoilt() -> dict[str, str]:
    """Return what UTF-8 became where it was read in an encoding of one byte a character, with the true character."""
    found: dict[str, str] = {}
    for character in _SPOILT_LETTERS + _SPOILT_SIGNS:
        for encoding in ("latin-1", "cp1252", "cp1254"):
            # Some bytes mean nothing in Windows' encodings; programs then kept the control character of that number.
            spoilt = "".join(_read_byte(byte, encoding) for byte in character.encode("utf-8"))
            found[spoilt] = character
    return found


def _read_byte(byte: int, encoding: str) -> str:
    try:
        return bytes([byte]).decode(encoding)
    except UnicodeDecodeError:
        return chr(byte)


# A pair such as Ã¼ stands in no word of any language, so that each one found is spoilt for certain.
_SPOILT = _spell_spoilt()
_ANY_SPOILT = re.compile("|".join(sorted(map(re.escape, _SPOILT), key=len, reverse=True)))
_SPOILT_HEADS = re.compile(f"[{re.escape(''.join(sorted({spoilt[0] for spoilt in _SPOILT} - {'â'})))}]|â[\x80\u20ac]")
# Turkish in ISO 8859-9 that was read as ISO 8859-1.
_LATIN = str.maketrans("ýþðÝÞÐ", "ışğİŞĞ")
_LATIN_LETTERS = re.compile("[ýþðÝÞÐ]")
# Letters of Turkish that cannot stand there then, and those of Icelandic, Faroese and Czech, which have ý, þ or ð.
_NOT_LATIN = re.compile("[ışğİŞĞáéíóúæÁÉÍÓÚÆěščřžůĚŠČŘŽŮ]")
_LEAST_LATIN = 5


def repair_mojibake(text: str) -> str:
    """Put back letters that were read in another encoding, where no other meaning of the characters is possible."""
    if _SPOILT_HEADS.search(text):
        text = _ANY_SPOILT.sub(lambda found: _SPOILT[found[0]], text)
    if _LATIN_LETTERS.search(text) and not _NOT_LATIN.search(text):
        is_turkish = any(letter in text for letter in "öüçÖÜÇ")
        if is_turkish and len(_LATIN_LETTERS.findall(text)) >= _LEAST_LATIN:
            text = text.translate(_LATIN)
    return text


# Control characters but tab and line feed, soft hyphens, zero-width spaces, marks of direction and byte order, tags.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
# Joiners shape letters of Persian and Indic scripts, and emoji; between Latin or Cyrillic letters they do nothing.
_JOINERS = re.compile("(?<=[A-Za-z\u00c0-\u024f\u0400-\u052f])[\u200c\u200d]+(?=[A-Za-z\u00c0-\u024f\u0400-\u052f])")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")


def remove_invisible(text: str) -> str:
    """Remove characters that show nothing; every kind of line end becomes a line feed."""
    text = _LINE_ENDS.sub("\n", text)
    text = _INVISIBLE.sub("", text)
    return _JOINERS.sub("", text)


_WIDE_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_BLANKS_AT_END = re.compile(" +(?=\n)")
_EMPTY_LINES = re.compile("\n{3,}")


def repair_spaces(text: str) -> str:
    """Turn every kind of blank into a space, and remove those at the end of lines, and empty lines but one in a row.

    Blanks at a line's beginning and inside it keep their number: they may be layout of a poem or a program.
    """
    text = _WIDE_SPACES.sub(" ", text)
    if " \n" in text:
        text = _BLANKS_AT_END.sub("", text)
    if "\n\n\n" in text:
        text = _EMPTY_LINES.sub("\n\n", text)
    return text.rstrip().lstrip("\n")


REPAIRS: dict[str, Callable[[str], str]] = {
    "mojibake": repair_mojibake,
    "composed": nfc,
    "invisible": remove_invisible,
    "spaces": repair_spaces,
}
_PLANE = 0x10000


def repair_texts(texts: Sequence[str], repairs: Collection[str]) -> tuple[list[str], dict[str, list[int]]]:
    """Return the texts repaired, and for each repair the indices of the texts that it changed.

    A repair is tried only where a text has a character that it may change; one pass over all characters finds these.
    """
    changed: dict[str, list[int]] = {name: [] for name in repairs}
    repaired = list(texts)
    for index, suspects in enumerate(_find_suspects(texts)):
        for bit, (name, repair) in enumerate(REPAIRS.items()):
            if name in changed and suspects >> bit & 1:
                text = repair(repaired[index])
                if name == "invisible" and "composed" in changed and text != repaired[index]:
                    # What stood between a letter and its mark is gone.
                    text = nfc(text)
                if text != repaired[index]:
                    repaired[index] = text
                    changed[name].append(index)
    return repaired, changed


def _find_suspects(texts: Sequence[str]) -> list[int]:
    """Return for each text which repairs may change it, as bits in their order."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    codes = np.frombuffer("".join(f"{text} " for text in texts).encode("utf-32-le"), "<u4")
    bits = _suspect_bits()[np.minimum(codes, _PLANE - 1).astype(np.uint16)]
    starts = np.cumsum(lengths + 1) - lengths - 1
    found: list[int] = np.bitwise_or.reduceat(bits, starts).tolist()
    return [suspects | _has_blanks(text) << 3 for suspects, text in zip(found, texts, strict=True)]


def _has_blanks(text: str) -> bool:
    """Return whether a text has blanks at the end of a line, or empty lines, which no character alone tells."""
    return " \n" in text or "\n\n\n" in text or text[:1] == "\n" or text[-1:].isspace()


@functools.cache
def _suspect_bits() -> NDArray[np.uint8]:
    mojibake = {spoilt[0] for spoilt in _SPOILT} - {"â"} | set("\x80€ýþðÝÞÐ")
    bits = np.zeros(_PLANE, np.uint8)
    bits[0x300:] |= 2
    bits[[ord(character) for character in mojibake]] |= 1
    # A surrogate is no character, and one is not encoded.
    all_characters = "".join(chr(code) for code in range(_PLANE) if not 0xD800 <= code < 0xE000)
    for pattern in (_INVISIBLE, _LINE_ENDS, re.compile("[\u200c\u200d]")):
        # What the repair of invisible characters makes of line ends may leave blanks before them.
        bits[[ord(found[0][0]) for found in pattern.finditer(all_characters)]] |= 12
    bits[[ord(found[0]) for found in _WIDE_SPACES.finditer(all_characters)]] |= 8
    bits[_PLANE - 1] |= 14  # stands for all characters beyond
    return bits
