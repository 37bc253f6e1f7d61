"""Which documents the rules remove: hashes of words, length, symbols, repetition, offensive words, evaluation items."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lowvram.config.cleaning import CleaningRules, ContaminationRule, load_rules
from lowvram.data.clean.batch import Batch, hash_sequences
from lowvram.data.clean.contamination import build_index
from lowvram.data.clean.document_rules import DocumentRules
from lowvram.data.clean.signature import BANDS, band_keys, sign, similarity
from lowvram.data.clean.toxicity import ToxicWords, read_words
from lowvram.errors import ConfigError, DataError

PROSE = (
    "Kışın köyde geceler uzundur; herkes sobanın çevresinde oturur ve eski günlerden söz eder. Dedem tütününü sarar, "
    "ninem örgüsünü alır, biz çocuklar da patlayan kestanelerin kokusunu bekleriz. Dışarıda kar sessizce yağar, "
    "köpekler uzaktan havlar, rüzgâr kapıyı yoklar ama içerisi sıcaktır ve kimse yerinden kalkmak istemez."
)


def removed_by(text: str, *sets: str) -> str:
    """Which rule removes a document; "" where none does."""
    outcome = DocumentRules(load_rules(sets=sets)).apply([PROSE, text])
    assert outcome.removed.total() == 2 - len(outcome.kept)
    return "".join(rule for rule, count in outcome.removed.items() if count)


def test_words_are_told_apart_as_a_reader_does() -> None:
    batch = Batch(["Işık ılık, IŞIK!", "", "İzmir izmir iz_mir", "ev 42 ev42"])
    assert batch.word_counts.tolist() == [3, 0, 4, 3]
    words = batch.words
    assert words[0] == words[2] != words[1]
    assert words[3] == words[4]
    assert len(np.unique(words)) == 2 + 3 + 3
    assert batch.document_hashes[0] == Batch(["\n ışık. ILIK ışık"]).document_hashes[0]
    assert batch.document_hashes[0] != Batch(["ılık ışık ışık"]).document_hashes[0]


def test_a_sequence_has_the_same_hash_wherever_it_stands() -> None:
    words = PROSE.split()
    batch = Batch([PROSE, " ".join(words[3:]), "\n".join(words)])
    documents, sequences = batch.sequences(5)
    first, second, third = (sequences[documents == number] for number in range(3))
    assert (first == third).all()
    assert (first[3:] == second).all()
    assert hash_sequences(Batch([PROSE]).words[:5], np.array([5]))[0] == first[0]
    assert batch.line_hashes[1 + 4] == Batch([words[3]]).line_hashes[0]
    assert [len(batch.sequences(9)[1]), len(Batch(["üç kısa söz"]).sequences(4)[1])] == [3 * len(words) - 3 - 24, 0]


@pytest.mark.parametrize(
    "text, rule",
    [
        (PROSE, ""),
        ("kısa", "length"),
        ("tektekbirkelime" * 3, "length"),
        ("çokuzunkelimelerdenoluşan anlamsızkarakterdizileri bilgisayarçıktısıdır", "length"),
        ("<<<>>> ### $$$ === +++ a b c ~~~ ||| ^^^ {{{ }}}", "symbols"),
        ("1234 5678 9012 3456 7890 ve 1234 5678 9012", "symbols"),
        ("Çok güzeeeeeel hem de haaaaaarika !!!!!!!! ben çok sevdim", "repetition"),
        ("\n".join(["Bu satır sürekli yinelenir ve hiç bitmez."] * 12), "repetition"),
        (" ".join(["bu söz hep yinelenir durur işte"] * 20), "repetition"),
        ("bu şerefsiz pezevenk herif geldi", "toxicity"),
        ("Bana sıkıcı geldi; sıkıntıdan götürdüm, sık sık ama amca sikke topladı.", ""),
    ],
)
def test_a_document_is_removed_by_the_rule_that_it_breaks(text: str, rule: str) -> None:
    assert removed_by(text) == rule
    if rule:
        assert removed_by(text, f"{rule}.on=false") != rule


def test_a_document_is_counted_by_the_first_of_the_rules_that_it_breaks() -> None:
    assert removed_by("1 2") == "length"
    assert removed_by("1 2", "length.on=false") == "symbols"


def test_a_document_that_is_too_long_is_removed_before_it_costs_memory() -> None:
    assert removed_by(PROSE, "length.most_characters=100") == "length"


LISTED = """piç piçler piçin orospunun pezevengi yarrağı götünü götten siktir siktiğimin"""
INNOCENT = """
piçak sıkıntı sık sikke siklet siklon götürü götürmek götürüyordu ama amca aqua amper shıttake cunta gavota ibrik pickup
sikinti taşakır kaltakli
"""


@pytest.mark.parametrize(
    "word, is_listed", [(word, words is LISTED) for words in (LISTED, INNOCENT) for word in words.split()]
)
def test_a_listed_word_counts_whole_and_with_suffixes_that_follow_its_vowels(word: str, is_listed: bool) -> None:
    assert ToxicWords().is_listed(word) is is_listed


def test_words_of_the_user_take_suffixes_and_texts_typed_without_dotless_letters_are_not_accused(
    tmp_path: Path,
) -> None:
    (tmp_path / "words.txt").write_text("# benim\nDANGALAK!\n\niki kelime\n", encoding="utf-8")
    toxic = ToxicWords(read_words(tmp_path / "words.txt"))
    batch = Batch(["Dangalaklar dangalağın dangalakça iki", "Cok sikildim sikiyor", "Işık yok, sikiyor"])
    assert toxic.mark(batch).tolist() == [True, True, True, False, False, False, False, False, False, True]
    (tmp_path / "signs.txt").write_text("salak\nC++\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"has the line C\+\+"):
        read_words(tmp_path / "signs.txt")
    (tmp_path / "none.txt").write_text("# yok\n", encoding="utf-8")
    for name in ("none.txt", "missing.txt"):
        with pytest.raises(DataError, match=name):
            read_words(tmp_path / name)


def test_lines_of_web_pages_are_left_out_and_a_poem_of_one_line_stays() -> None:
    page = f"Ana sayfa\n{PROSE}\nTüm hakları saklıdır.\nYORUM YAP"
    outcome = DocumentRules(CleaningRules()).apply([page, "Devamını oku", "üye ol\ngiriş yap"])
    assert outcome.texts[0] == PROSE
    assert outcome.kept == [0]
    assert outcome.parts["boilerplate"] == 5
    assert (outcome.removed["boilerplate"], outcome.removed["length"]) == (1, 1)
    added = DocumentRules(load_rules(sets=['boilerplate.lines="Bizim Site"'])).apply([f"BİZİM SİTE\n{PROSE}"])
    assert added.texts == [PROSE]


def test_documents_with_items_of_an_evaluation_set_are_found_and_passages_are_not_compared(tmp_path: Path) -> None:
    words = [f"söz{number}" for number in range(60)]
    long, short, tiny = " ".join(words[:20]), " ".join(words[30:39]), " ".join(words[40:47])
    passage = " ".join(words[47:])
    rows = [{"soru": long, "context": f"Önce {passage} sonra", "yanıt": passage}, {"seçenekler": [short, tiny]}]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    index = build_index(ContaminationRule(), [tmp_path / "set.jsonl"])
    assert (index.items, index.short) == (3, 1)
    texts = [
        f"Önce {' '.join(words[5:18]).upper()}, sonra.",
        f"Önce {' '.join(words[5:17])} değil.",
        f"Evet {short}!",
        f"Evet {tiny} ve {passage}",
        PROSE,
    ]
    assert (index.count(Batch(texts)) > 0).tolist() == [True, False, True, False, False]
    (tmp_path / "tiny.tsv").write_text(f"a\tb\n{tiny}\t1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"No item of .*tiny\.tsv has 8 words"):
        build_index(ContaminationRule(), [tmp_path / "tiny.tsv"])


def test_evaluation_sets_of_every_kind_are_read_and_what_cannot_be_is_told_in_words(tmp_path: Path) -> None:
    item = " ".join(f"söz{number}" for number in range(13))
    table = pyarrow.table({"soru": [item]})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    readable = {
        "a.parquet": buffer.getvalue(),
        "a.parquet.gz": gzip.compress(buffer.getvalue()),
        "a.csv": f'id;soru\n1;"{item}"\n2;{"x" * 200_000}\n'.encode(),
        "b.csv": f"soru\n{item.replace('söz', 'şöz')}\n".encode("cp1254"),
        "a.txt": f"\ufeff{item}\n\n".encode(),
        "a.json": f'\ufeff{{"soru": "{item}"}}\n'.encode(),
    }
    for name, data in readable.items():
        (tmp_path / name).write_bytes(data)
        text = item.replace("söz", "şöz") if name == "b.csv" else item
        assert build_index(ContaminationRule(), [tmp_path / name]).count(Batch([text])).tolist() == [1], name
    damaged = {
        "c.csv": (f'soru\n"{item}\n'.encode(), "c.csv:2 opens a quotation mark"),
        "d.csv": (f"soru,id\n{item}\n".encode(), "d.csv:2 has 1 columns"),
        "c.jsonl": (b'{"soru": "bir\0"}\n', "c.jsonl:1 is not text"),
        "c.parquet": (b"PAR1 torn", "is not a Parquet file"),
        "c.pdf": (b"%PDF-1.7", "is no evaluation set"),
    }
    for name, (data, message) in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            build_index(ContaminationRule(), [tmp_path / name])
    with pytest.raises(DataError, match="is a data set"):
        build_index(ContaminationRule(), [Path("hf:owner/name")])


def test_a_signature_estimates_the_share_of_common_sequences() -> None:
    generator = random.Random(7)
    words = [f"w{number}" for number in range(400)]
    texts, shared = [], []
    for changed in (0, 10, 40, 100, 400):
        other = list(words)
        for place in generator.sample(range(400), changed):
            other[place] = f"x{place}"
        texts += [" ".join(words), " ".join(other)]
        sets = [set(zip(each, each[1:], each[2:], strict=False)) for each in (words, other)]
        shared.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    which, signatures = sign(Batch([*texts, "iki söz"]), 3)
    assert which.tolist() == list(range(10))
    estimated = similarity(signatures[0::2], signatures[1::2])
    assert np.abs(estimated - shared).max() < 0.14  # three standard deviations of 126 functions
    assert estimated[0] == 1.0
    assert estimated[-1] == 0.0
    equal = [band_keys(signatures, band)[0] == band_keys(signatures, band)[1] for band in range(BANDS)]
    assert all(equal)


@pytest.mark.parametrize(
    "sets, message",
    [
        (["lenght.least_words=5"], "there is no rule lenght. Did you mean length?"),
        (["length.least_word=5"], "length has no key least_word. Did you mean least_words?"),
        (["length.least_words=-5"], "length.least_words is -5; it takes 0 or more"),
        (["toxicity.most_share=7"], "toxicity.most_share is 7; it takes 1 or less"),
        (["length.on=maybe"], "length.on is 'maybe'; it takes true or false."),
        (["toxicity=false"], "is not an assignment. Write length.least_words=5."),
    ],
)
def test_a_rule_or_value_that_does_not_exist_is_named(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rules(sets=sets)
    assert message in str(caught.value)


def test_a_file_of_rules_is_read_and_assignments_are_laid_over_it(tmp_path: Path) -> None:
    file = tmp_path / "rules.toml"
    file.write_text(
        '[length]\nleast_words = 7\n[toxicity]\nwords = "a.txt"\n[language]\nkeep = "tr"\n', encoding="utf-8"
    )
    rules = load_rules(file, ["length.least_characters=1", "symbols.on=false"])
    assert (rules.length.least_words, rules.length.least_characters, rules.symbols.on) == (7, 1, False)
    assert rules.toxicity.words == tmp_path.resolve() / "a.txt"
    assert rules.language.keep == ("tr",)
    for text, message in (("[length", "is not TOML"), ("toxicity = false\n", "toxicity is False, not a table")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            load_rules(file)
    with pytest.raises(ConfigError, match="There is no file of rules"):
        load_rules(tmp_path / "missing.toml")
