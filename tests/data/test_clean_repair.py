"""Characters that a program spoilt are repaired where that is certain, private data are replaced, and nothing else."""

from __future__ import annotations

import unicodedata

import pytest

from lowvram.data.clean.private import MARKS, is_iban, is_national_number, replace_private
from lowvram.data.clean.repair import REPAIRS, remove_invisible, repair_mojibake, repair_spaces, repair_texts

TURKISH = "Işığı gören çocuk “şöyle” dedi: Öğretmenim, İzmir'in güneşi — ne güzel! 5 °C… 10 ₺"


@pytest.mark.parametrize("encoding", ["cp1254", "cp1252", "latin-1"])
def test_utf8_that_was_read_as_one_byte_a_character_is_read_again(encoding: str) -> None:
    spoilt = "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in TURKISH.encode("utf-8"))
    assert spoilt != TURKISH
    assert repair_mojibake(spoilt) == TURKISH


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Güneþin ýþýðý denize düþtü.", "Güneşin ışığı denize düştü."),
        ("Það er góð þýðing á íslensku, þetta ýtir öllu.", None),
        ("Güneþ", None),
        ("Þý þð, ýþýðý ışık öyle", None),
        ("kâğıt, hâlâ, rüzgâr; Ångström, São Paulo, Ähre, naïve", None),
        (TURKISH, None),
    ],
    ids=["latin-1 for latin-5", "Icelandic", "too few", "beside the true letters", "true letters", "Turkish"],
)
def test_letters_are_repaired_only_where_no_other_meaning_is_possible(text: str, expected: str | None) -> None:
    assert repair_mojibake(text) == (expected or text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a\u200bb\ufeffc\u00add\u202ee", "abcde"),
        ("ka\u200dlem", "kalem"),
        ("👨\u200d👩\u200d👧 ve می\u200cخواهم", "👨\u200d👩\u200d👧 ve می\u200cخواهم"),
        ("bir\r\niki\rüç\u2028dört\x85beş", "bir\niki\nüç\ndört\nbeş"),
        ("a\x00\x07\x1b[31mb\tc", "a[31mb\tc"),
    ],
    ids=["zero width", "joiner in a word", "joiner of emoji and Persian", "line ends", "controls"],
)
def test_what_shows_nothing_is_removed_and_what_shapes_letters_stays(text: str, expected: str) -> None:
    assert remove_invisible(text) == expected


def test_blanks_are_repaired_and_indentation_stays() -> None:
    assert repair_spaces("\n\n  if a:\u00a0b  \n\n\n\n    c\u3000d \n") == "  if a: b\n\n    c d"


def test_a_repair_is_tried_wherever_it_would_change_something() -> None:
    hard = [
        "",
        "a",
        "a ",
        "\na",
        "a \nb",
        "a\n\n\nb",
        "Ä±",
        "e\u0301",
        "\u00a0",
        "a\u200bb",
        "\r",
        "a\r\nb",
        "😀\ufe0f",
        "a\x85b",
    ]
    hard += ["â€œ", "Güneþ ýþýðý öðretmen þey", "\U000e0041x", "a \r\nb", "x\u2028\n\ny", TURKISH]
    expected = []
    for text in hard:
        for repair in REPAIRS.values():
            text = repair(text)
        expected.append(text)
    assert repair_texts(hard, REPAIRS)[0] == expected
    only, changed = repair_texts(hard, ["composed"])
    assert only == [unicodedata.normalize("NFC", text) for text in hard]
    assert changed == {"composed": [7]}


# Numbers that were made for these tests; the IBANs are the published examples of their countries.
@pytest.mark.parametrize(
    "text, kinds",
    [
        ("yaz: ali.veli+x@ornek.com.tr!", {"email": 1}),
        ("a@b ya da @kullanici ya da 3@4.5", {}),
        ("TR33 0006 1005 1978 6457 8413 26 numaralı", {"iban": 1}),
        ("TR330006100519786457841326", {"iban": 1}),
        ("TR33 0006 1005 1978 6457 8413 27 yanlış", {}),
        ("DE89 3704 0044 0532 0130 00 VE GB82 WEST 1234 5698 7654 32", {"iban": 2}),
        ("no 10000000146 olan", {"national_number": 1}),
        ("no 10000000147 olan", {}),
        ("0532 123 45 67, +90 (212) 555 12 34, 0(312)4445566, +49 30 1234567", {"phone": 4}),
        ("2020-2021, 5237 sayılı, 26/9/2004, 1.234.567.890,00 TL, 1923 1938", {}),
        ("0.532 123 45 67 oranı ve 12345678901234567890", {}),
    ],
)
def test_private_data_are_replaced_where_their_form_or_check_digits_say_so(text: str, kinds: dict[str, int]) -> None:
    replaced, found = replace_private(text, set(MARKS))
    assert found == kinds
    assert sum(replaced.count(MARKS[kind]) for kind in kinds) == sum(kinds.values())
    assert replace_private(text, set()) == (text, {})


def test_one_wrong_digit_is_no_number_of_a_person_and_no_iban() -> None:
    for number, check in (("10000000146", is_national_number), ("TR330006100519786457841326", is_iban)):
        assert check(number)
        for place in range(2, len(number)):
            for digit in "0123456789":
                if digit != number[place]:
                    assert not check(number[:place] + digit + number[place + 1 :]), (place, digit)


def test_a_mark_behind_an_invisible_character_is_composed_with_its_letter() -> None:
    assert repair_texts(["gu\u00ad\u0308n"], ["composed", "invisible"])[0] == ["gün"]
    assert repair_texts(["gu\u00ad\u0308n"], ["invisible"])[0] == ["gu\u0308n"]
