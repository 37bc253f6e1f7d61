"""Replaces e-mail addresses, telephone numbers, IBANs and Turkish national numbers; knows no other private data."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

# A mark of its own for each kind, so that a model learns that something stood there and not an address.
MARKS = {"email": "[E-POSTA]", "iban": "[IBAN]", "national_number": "[KİMLİK NO]", "phone": "[TELEFON]"}
KINDS = ("email", "phone", "iban", "national_number")

_EMAIL = re.compile(r"(?<![\w.+-])[\w+-]+(?:\.[\w+-]+)*@(?:[\w-]+\.)+[^\W\d_]{2,}(?![\w-])")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}[ ]?[0-9]{2}(?:[ -]?[A-Z0-9]){11,30}(?!\w)")
_DIGITS_11 = re.compile(r"(?<![\w.,/-])[1-9][0-9]{10}(?![\w/-]|[.,][0-9])")
# Mobile numbers begin with 5 and area codes with 2, 3 or 4, behind +90 or 0; numbers without either are too common.
_SEVEN = r"[ ./-]?[0-9]{3}[ .-]?[0-9]{2}[ .-]?[0-9]{2}"
_PHONE = re.compile(
    r"(?<![\w.,/+-])(?:"
    rf"(?:(?:\+|00) ?90[ .-]?|0) ?\(?[2-5][0-9]{{2}}\)?{_SEVEN}"
    rf"|\(0[2-5][0-9]{{2}}\){_SEVEN}"
    r"|\+[1-9][0-9]{0,2}[ .-](?:\(?[0-9]{2,4}\)?[ .-]?){2,4}[0-9]{2,4}"
    r")(?![\w/-])"
)
_ANY_LONG = re.compile(r"[0-9](?:[ ().-]{0,2}[0-9]){9}")
_LEAST_DIGITS = 10
# Lengths of the IBANs of the countries with most of them; others are of 15 to 34 characters.
_IBAN_LENGTHS = {"TR": 26, "DE": 22, "GB": 22, "FR": 27, "NL": 18, "AT": 20, "BE": 16, "CH": 21, "AZ": 28, "KZ": 20}


def is_iban(text: str) -> bool:
    """Return whether letters and digits are an IBAN: its number modulo 97 is 1.  Source: ISO 13616, ISO 7064."""
    compact = re.sub("[ -]", "", text)
    length = _IBAN_LENGTHS.get(compact[:2])
    if not 15 <= len(compact) <= 34 or (length is not None and len(compact) != length):
        return False
    return int("".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])) % 97 == 1


def is_national_number(text: str) -> bool:
    """Return whether eleven digits are a Turkish national number (T.C. kimlik numarası), by its two check digits.

    The tenth digit is (7 × the sum of the odd places − the sum of the even ones) modulo 10, the eleventh the sum of the
    first ten modulo 10.  Source: the check that Turkish authorities publish (Nüfus ve Vatandaşlık İşleri).
    """
    if len(text) != 11 or not text.isdecimal() or text[0] == "0":
        return False
    digits = [int(digit) for digit in text]
    odd, even = sum(digits[0:9:2]), sum(digits[1:8:2])
    return (7 * odd - even) % 10 == digits[9] and sum(digits[:10]) % 10 == digits[10]


def _has_long_numbers(text: str) -> bool:
    """Return whether a text has as many digits, near to each other, as the shortest number that is replaced."""
    # Counting is much faster than searching, and most texts have few digits.
    return sum(map(text.count, "0123456789")) >= _LEAST_DIGITS and _ANY_LONG.search(text) is not None


def replace_private(text: str, kinds: Collection[str]) -> tuple[str, dict[str, int]]:
    """Return a text with private data replaced by marks, and how many of each kind there were."""
    has_numbers = _has_long_numbers(text)
    found: dict[str, int] = {}

    def mark(kind: str, is_one: Callable[[str], bool]) -> Callable[[re.Match[str]], str]:
        def replace(match: re.Match[str]) -> str:
            if not is_one(match[0]):
                return match[0]
            found[kind] = found.get(kind, 0) + 1
            return MARKS[kind]

        return replace

    if "email" in kinds and "@" in text:
        text = _EMAIL.sub(mark("email", bool), text)
    if has_numbers:
        if "iban" in kinds:
            text = _replace_ibans(text, mark("iban", bool))
        if "national_number" in kinds:
            text = _DIGITS_11.sub(mark("national_number", is_national_number), text)
        if "phone" in kinds:
            text = _PHONE.sub(mark("phone", bool), text)
    return text, found


def _replace_ibans(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Replace IBANs; a match may have caught capitals behind one, so it is tried by the length of its country."""
    parts: list[str] = []
    done = start = 0
    while match := _IBAN.search(text, start):
        end = _end_of_iban(match[0])
        start = match.start() + 1
        if end and (whole := re.compile(re.escape(match[0][:end])).match(text, match.start())):
            parts += [text[done : match.start()], replace(whole)]
            done = start = whole.end()
    return "".join([*parts, text[done:]])


def _end_of_iban(text: str) -> int:
    """Return where an IBAN at the beginning of `text` ends, 0 where there is none."""
    length = _IBAN_LENGTHS.get(text[:2])
    if length is None:
        return len(text) if is_iban(text) else 0
    places = [index for index, letter in enumerate(text) if letter not in " -"]
    if len(places) < length:
        return 0
    end = places[length - 1] + 1
    is_cut = end < len(text) and text[end] not in " -"
    return end if not is_cut and is_iban(text[:end]) else 0
