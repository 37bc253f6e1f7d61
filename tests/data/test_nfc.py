"""NFC of any text is Python's own, and long runs of marks cost no square of their length."""

import random
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from lowvram.data.nfc import _TIBETAN_VOWELS, nfc

POINTS = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
MARKS = [c for c in POINTS if unicodedata.combining(unicodedata.normalize("NFD", c)[0])]
# Letters with marks of their own, Hangul that composes, marks that decompose into marks.
BASES = ["a", "S", "ı", "İ", "\u1e69", "é", "ᄀ", "ᅡ", "ᆨ", "가", "字", "\u0f71", "\u0f73", "\u0344", " "]


@given(st.text(st.sampled_from(BASES + random.Random(0).sample(MARKS, 40)), max_size=200))
def test_the_composed_form_is_pythons_own(text: str) -> None:
    assert nfc(text) == unicodedata.normalize("NFC", text)


def test_runs_of_every_mark_have_pythons_form() -> None:
    order = random.Random(1)
    for length in (29, 30, 31, 32, 300):
        for _ in range(20):
            text = "e" + "".join(order.choice(MARKS) for _ in range(length)) + "ş"
            assert nfc(text) == unicodedata.normalize("NFC", text)
    every = "".join(MARKS)
    assert nfc(every) == unicodedata.normalize("NFC", every)


def test_a_character_of_class_0_that_decomposes_into_marks_is_known() -> None:
    assert [c for c in MARKS if not unicodedata.combining(c)] == _TIBETAN_VOWELS.findall("".join(POINTS))


def test_every_character_below_the_first_mark_is_its_own_form() -> None:
    assert all(nfc(c) == unicodedata.normalize("NFC", c) == c for c in POINTS[:0x300])


def test_a_run_of_marks_is_sorted_before_python_sorts_it_by_insertion(monkeypatch) -> None:
    # Insertion moves each mark past all that belong behind it; a run in canonical order moves none.
    given_to_python: list[str] = []
    real = unicodedata.normalize

    class Watched:
        combining = staticmethod(unicodedata.combining)

        @staticmethod
        def normalize(form: str, text: str) -> str:
            given_to_python.append(text)
            return real(form, text)

    monkeypatch.setattr("lowvram.data.nfc.unicodedata", Watched)
    nfc("a" + "\u0301\u0323" * 50_000)
    classes = [unicodedata.combining(c) for c in given_to_python[-1]]
    assert len(classes) == 100_001
    assert classes == sorted(classes)


def test_no_step_sorts_the_marks_of_a_run_at_once_so_that_other_threads_may_run(monkeypatch) -> None:
    sizes: list[int] = []

    def watched(values):
        sizes.append(len(found := sorted(values)))
        return found

    monkeypatch.setattr("lowvram.data.nfc.sorted", watched, raising=False)
    order = random.Random(2)
    run = "".join(order.choices(MARKS, k=3000))
    assert nfc(f"a{run}b{run}") == unicodedata.normalize("NFC", f"a{run}b{run}")
    assert 1 < max(sizes) <= len(set(map(unicodedata.combining, MARKS)))
