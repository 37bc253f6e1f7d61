"""Runs too long to be words are left out of the training of a tokenizer, in linear time; all other text stays whole."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lowvram.data import long_words
from lowvram.data.long_words import LONGEST_WORD, without_long_words
from lowvram.data.tokenizer import train_tokenizer


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(st.sampled_from("aşZ中²_-. \n\u030105"), max_size=80) | st.text(st.sampled_from("ab1 "), max_size=120),
    longest=st.integers(2, 9),
)
@example(text="a" * 9 + "-" * 9 + "b" * 3 + " " * 9, longest=4)
def test_runs_are_left_out_as_a_plain_expression_finds_them(text: str, longest: int) -> None:
    expected = re.split(rf"[^\W\d_]{{{longest + 1},}}|[\W_]{{{longest + 1},}}", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_words, "LONGEST_WORD", longest)
        assert without_long_words(text) == [part for part in expected if part]


@pytest.mark.parametrize("sign", ["a", "ş", "中", " ", "\n", "-", "_"])
@pytest.mark.parametrize("before", [0, 1, 499, 500, 501], ids=lambda before: f"{before} digits before")
def test_a_run_at_the_limit_stays_and_a_longer_one_goes(sign: str, before: int) -> None:
    head = "1" * before
    at_limit = f"{head}{sign * LONGEST_WORD}2"
    assert without_long_words(at_limit) == [at_limit]
    for length in (LONGEST_WORD + 1, 100 * LONGEST_WORD):
        assert without_long_words(f"{head}{sign * length}2") == [part for part in (head, "2") if part]


def test_the_search_reads_each_character_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [0], long_words._end_of_run

    def counted(kind: re.Pattern[str], text: str, start: int, most: int) -> int:
        end = real(kind, text, start, most)
        read[0] += end - start + 1
        return end

    monkeypatch.setattr(long_words, "_end_of_run", counted)
    for length in (1, 499, 500, 999, 1_000, 1_001, 50_000, 300_000):
        text = ("a" * length + "-" * length) * (300_000 // length)
        read[0] = 0
        without_long_words(text)
        assert len(text) // 500 <= read[0] <= 4 * len(text), length


def test_a_word_of_any_length_changes_nothing_that_is_learnt_beside_it(
    turkish: tuple[str, ...], tmp_path: Path
) -> None:
    told: list[int] = []
    junk = ["qx" * 150_000, "😀" * 2_000, " " * 3_000]
    texts = [f"{text}5{junk[n % 3]}7{text}" for n, text in enumerate(turkish)]
    clean = [part for text in turkish for part in (f"{text}5", f"7{text}")]
    found = train_tokenizer(iter(texts), 512, tmp_path / "found", tell_left_out=told.append)
    expected = train_tokenizer(iter(clean), 512, tmp_path / "clean", tell_left_out=told.append)
    assert found == expected
    assert len(told) == 1
    assert sum(len(text.encode()) for text in texts) - told[0] == sum(len(text.encode()) for text in clean)


def test_real_text_stays_whole(shared_data: Path) -> None:
    for name in ("tr_mix_small.train", "tr_webforum.train", "kk_wiki.train"):
        text = gzip.decompress((shared_data / "text" / f"{name}.txt.gz").read_bytes()).decode()
        assert without_long_words(text) == [text]
