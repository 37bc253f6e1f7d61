"""Words cut by their gold analyses, and what stems and suffixes cost, against sums over bytes by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.evaluate.suffix_loss import measure_suffixes, read_sentences
from lowvram.evaluate.turkish_suffixes import CLASSES, cut_word, read_features
from tests.evaluate.scored import finish, scorer_of, write

DATA = Path(__file__).parents[3] / "shared/data/morph/ud_tr_morph.tsv.gz"
SHORT = {
    "p": "plural",
    "o": "possessive",
    "c": "case",
    "t": "tense, aspect, mood",
    "r": "person",
    "d": "derivation",
}
# form cut by hand, each suffix with its class; lemma; part of speech; features
WORDS = [
    ("ev", "ev", "NOUN", "Case=Nom|Number=Sing|Person=3"),
    ("ev ler/p imiz/o den/c", "ev", "NOUN", "Case=Abl|Number=Plur|Number[psor]=Plur|Person=3|Person[psor]=1"),
    ("kitab ı/c", "kitap", "NOUN", "Case=Acc|Number=Sing|Person=3"),
    ("kitab ı/o", "kitap", "NOUN", "Case=Nom|Number=Sing|Number[psor]=Sing|Person=3|Person[psor]=3"),
    ("kitab ı/o nda/c", "kitap", "NOUN", "Case=Loc|Number=Sing|Number[psor]=Sing|Person=3|Person[psor]=3"),
    ("kitab ın/o da/c", "kitap", "NOUN", "Case=Loc|Number=Sing|Number[psor]=Sing|Person=3|Person[psor]=2"),
    ("RENG İ/o NE/c", "renk", "NOUN", "Case=Dat|Number=Sing|Number[psor]=Sing|Person=3|Person[psor]=3"),
    ("burn u/o nu/c", "burun", "NOUN", "Case=Acc|Number=Sing|Number[psor]=Sing|Person=3|Person[psor]=3"),
    ("hakk ı/o", "hak", "NOUN", "Case=Nom|Number=Sing|Number[psor]=Sing|Person=3|Person[psor]=3"),
    ("Iğdır' ın/c", "Iğdır", "PROPN", "Case=Gen|Number=Sing|Person=3"),
    ("İzmir' de/c ki/d", "İzmir", "ADJ", "Case=Loc|Number=Sing|Person=3"),
    ("o nu/c", "o", "PRON", "Case=Acc|Number=Sing|Person=3|PronType=Prs"),
    ("kitap çı/d lar/p", "kitap", "NOUN", "Case=Nom|Number=Plur|Person=3"),
    ("gel di/t m/r", "gel", "VERB", "Aspect=Perf|Mood=Ind|Number=Sing|Person=1|Polarity=Pos|Tense=Past"),
    ("gel me/t yecek/t siniz/r", "gel", "VERB", "Mood=Ind|Number=Plur|Person=2|Polarity=Neg|Tense=Fut"),
    ("başl ıyor/t lar/r", "başla", "VERB", "Aspect=Prog|Number=Plur|Person=3|Polarity=Pos|Tense=Pres"),
    ("ed er/t im/r", "et", "VERB", "Aspect=Hab|Number=Sing|Person=1|Polarity=Pos|Tense=Pres"),
    ("yap a/t lım/r", "yap", "VERB", "Mood=Opt|Number=Plur|Person=1|Polarity=Pos|Tense=Pres"),
    ("gel sin/r", "gel", "VERB", "Mood=Imp|Number=Sing|Person=3|Polarity=Pos"),
    ("yaz ıl/d mış/t tı/t", "yaz", "VERB", "Number=Sing|Person=3|Polarity=Pos|Tense=Pqp|Voice=Pass"),
    ("aç abil/t ir/t", "aç", "VERB", "Aspect=Hab|Mood=GenPot|Number=Sing|Person=3|Tense=Pres"),
    (
        "oyna yacağ/d ımız/o",
        "oyna",
        "VERB",
        "Number[psor]=Plur|Person[psor]=1|Polarity=Pos|Tense=Fut|VerbForm=Part",
    ),
    ("de rken/d", "de", "VERB", "Aspect=Hab|Polarity=Pos|VerbForm=Conv"),
    ("42", "42", "NUM", "NumType=Card"),
]


@pytest.mark.parametrize("cut, lemma, category, features", WORDS, ids=[word[0].replace(" ", "-") for word in WORDS])
def test_a_word_is_cut_as_a_grammarian_would(cut: str, lemma: str, category: str, features: str) -> None:
    stem, *suffixes = cut.split(" ")
    expected = [(len(stem), "stem")]
    expected += [(len(text), SHORT[kind]) for text, _, kind in (suffix.partition("/") for suffix in suffixes)]
    form = "".join(part.partition("/")[0] for part in [stem, *suffixes])
    assert cut_word(form, lemma, category, read_features(features)) == expected


@pytest.mark.parametrize(
    "form, lemma, category, features",
    [
        ("sabah", "yavaş", "NOUN", "Case=Nom"),
        ("evde", "ev", "NOUN", "Case=Acc"),
        ("ev", "ev", "NOUN", "Case=Loc"),
        ("evlerx", "ev", "NOUN", "Number=Plur"),
        ("geldik", "gel", "VERB", "Number=Sing|Person=1|Tense=Past"),
        ("ama", "fakat", "CCONJ", "_"),
    ],
    ids=["another lemma", "another case", "no case", "a rest", "another person", "another conjunction"],
)
def test_a_word_that_its_analysis_does_not_explain_is_left_whole(
    form: str, lemma: str, category: str, features: str
) -> None:
    assert cut_word(form, lemma, category, read_features(features)) is None


CONLLU = """\
# sent_id = 1
1\tKitabı\tkitap\tNOUN\t_\tCase=Acc|Number=Sing|Person=3\t0\t_\t_\t_
2\t,\t,\tPUNCT\t_\t_\t0\t_\t_\tSpaceAfter=No
3\t"\t"\tPUNCT\t_\t_\t0\t_\t_\tSpaceAfter=No
4-5\tevdeydi\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No
4\tevde\tev\tNOUN\t_\tCase=Loc|Number=Sing|Person=3\t0\t_\t_\t_
5\tydi\ti\tAUX\t_\tNumber=Sing|Person=3|Tense=Past\t0\t_\t_\t_
6\t.\t.\tPUNCT\t_\t_\t0\t_\t_\t_

1\tŞöyle\tböyle\tADV\t_\t_\t0\t_\t_\t_

"""


def test_sentences_are_written_out_with_the_class_of_each_byte(tmp_path: Path) -> None:
    file = tmp_path / "gold.conllu"
    file.write_text(CONLLU, encoding="utf-8")
    first, second = read_sentences(file)
    assert first.text == 'Kitabı ,"evdeydi.'
    names = [CLASSES[kind] for kind in first.kind_T]
    tense = "tense, aspect, mood"
    expected = ["stem"] * 5 + ["case"] * 2 + ["other"] * 3 + ["stem"] * 2 + ["case"] * 2 + [tense] * 3 + ["other"]
    assert names == expected
    assert (first.words, first.unexplained) == (2, 0)
    counts = dict(zip(CLASSES, first.parts.tolist(), strict=True))
    assert counts == dict.fromkeys(CLASSES, 0) | {"stem": 2, "case": 2, tense: 1}
    assert (second.text, second.words, second.unexplained) == ("Şöyle", 1, 1)
    assert set(second.kind_T) == {CLASSES.index("other")}


def test_a_table_without_spacing_is_written_as_turkish_is(tmp_path: Path) -> None:
    words = ["Dedi", ":", '"', "Gel", '"', "(", "bugün", ")", ".", "'", "Olur", "'"]
    rows = [
        f"s{1 + (number > 8)}\t{number}\t{word}\t{word}\t{'X' if word[0].isalpha() else 'PUNCT'}\t_"
        for number, word in enumerate(words)
    ]
    file = write(tmp_path / "gold.tsv", "sent_id\tid\tform\tlemma\tupos\tfeats", *rows)
    assert [sentence.text for sentence in read_sentences(file)] == ['Dedi: "Gel" (bugün).', "'Olur'"]


def test_the_cost_of_each_class_is_the_sum_over_its_bytes(tmp_path: Path, small_tokenizer: Tokenizer) -> None:
    file = tmp_path / "gold.conllu"
    file.write_text(CONLLU, encoding="utf-8")
    scorer, sentences = scorer_of(small_tokenizer), read_sentences(file)
    nats, sizes = dict.fromkeys(CLASSES, 0.0), dict.fromkeys(CLASSES, 0)
    for sentence in sentences:
        ids = small_tokenizer.encode(sentence.text)
        found = finish(scorer.score([scorer.encode("", sentence.text)]))[0]
        place = 0
        for id, cost in zip(ids, found.nat_T, strict=True):
            size = len(small_tokenizer.token_bytes(id))
            for _ in range(size):
                nats[CLASSES[sentence.kind_T[place]]] += cost / size
                sizes[CLASSES[sentence.kind_T[place]]] += 1
                place += 1
    report = finish(measure_suffixes(scorer, file, sentences))
    assert (report.sentences, report.words, report.unexplained, report.cut) == (2, 3, 1, 0)
    for row in report.rows:
        assert row.text_bytes == sizes[row.name]
        if row.text_bytes:
            assert row.bits_per_byte == pytest.approx(nats[row.name] / math.log(2) / sizes[row.name], rel=1e-6)
        else:
            assert row.bits_per_byte is None
    whole = sum(nats.values()) / math.log(2) / sum(sizes.values())
    assert report.bits_per_byte == pytest.approx(whole, rel=1e-6)
    stem = report.rows[0]
    assert stem.bits_each == pytest.approx(nats["stem"] / math.log(2) / 2, rel=1e-6)


@pytest.mark.parametrize(
    "row, says",
    [
        ("1\tev\tev\tNOUN\tCase", r"'Case' is no list of features"),
        ("1-x\tev\tev\tNOUN\t_", "id is '1-x', neither a number"),
        ("1\tev\tev", r"It has 3 columns, and the table has 5: id, form, lemma, upos, feats\."),
        ("1\t\tev\tNOUN\t_", "form is empty"),
    ],
    ids=["features", "id", "columns", "form"],
)
def test_gold_of_another_form_is_refused_with_its_line(row: str, says: str, tmp_path: Path) -> None:
    file = write(tmp_path / "gold.tsv", "id\tform\tlemma\tupos\tfeats", "1\tev\tev\tNOUN\t_", row)
    with pytest.raises(DataError, match=says) as error:
        read_sentences(file)
    assert "gold.tsv:3" in str(error.value)


def test_gold_without_its_columns_or_rows_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "gold.tsv", "form\tsegmentation", "evler\tev ler")
    with pytest.raises(DataError, match=r"need the columns id, form, .*missing: id, lemma, upos, feats"):
        read_sentences(file)
    with pytest.raises(DataError, match="holds no items"):
        read_sentences(write(tmp_path / "empty.tsv", "id\tform\tlemma\tupos\tfeats"))
    with pytest.raises(DataError, match="neither JSON lines nor a table"):
        read_sentences(write(tmp_path / "gold.csv", "id,form"))


@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not beside the checkout")
@pytest.mark.nightly
def test_gold_analyses_explain_nearly_all_words_of_the_treebanks() -> None:
    sentences = read_sentences(DATA)
    assert sum(sentence.unexplained for sentence in sentences) < 0.05 * sum(sentence.words for sentence in sentences)
    assert sum(len(sentence.kind_T) for sentence in sentences) == sum(len(s.text.encode()) for s in sentences)
    counts = np.sum([sentence.parts for sentence in sentences], axis=0)
    assert all(count > 5000 for count, name in zip(counts, CLASSES, strict=True) if name != "other")
