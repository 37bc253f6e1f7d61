"""The generated Turkish: exact forms, harmony over random stems, and what a stream of text promises."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from lowvram.data import sample
from lowvram.data.sample import (
    attach,
    conjugate,
    inflect,
    number_words,
    sample_documents,
    spoken_number,
    write_document,
)
from lowvram.data.sample_words import ADJECTIVES, NOUNS, PHRASES, PLANS, POOLS, VERBS

LETTERS = set("abcçdefgğhıijklmnoöprsştuüvyzâ" + "ABCÇDEFGĞHIİJKLMNOÖPRSŞTUÜVYZÂ")
OTHERS = set("0123456789 .,;:!?'\"–\n")

NOUN_FORMS = """
    kitap acc kitabı | kitap loc kitapta | kitap pl,1s,abl kitaplarımdan | ağaç gen ağacın
    ağaç pl,dat ağaçlara | renk/~ acc rengi | renk/~ pl,gen renklerin | köpek acc köpeği | köpek abl köpekten
    çocuk 3s,dat çocuğuna | şehir/- dat şehre | şehir/- loc şehirde | burun/- acc burnu | burun/- 1s burnum
    ağız/- 2s,abl ağzından | vakit/- acc vakti | oğul/- 3s oğlu | göğüs/- 1s göğsüm | akıl/- acc aklı
    karın/- 3p karınları | saat/^ pl saatler | saat/^ acc saati | saat/^ loc saatte | hayal/^ 1s hayalim
    rol/^ acc rolü | kalp/^~ 3s kalbi | su/y acc suyu | su/y gen suyun | su/y 1s suyum | su/y loc suda
    su/y pl sular | su/y ins suyla | su/y 3s suyu | sır/= acc sırrı | hak/= 1s hakkım | his/= loc histe
    kurt/~ acc kurdu | kurt/~ loc kurtta | armut/~ gen armudun | merak/! acc merakı | top acc topu
    saç 1s saçım | sepet acc sepeti | avukat dat avukata | genç/~ dat gence | anne 1s annem
    anne 3s,dat annesine | anne 3p,acc annelerini | anne 1p,ins annemizle | kapı acc kapıyı | kapı gen kapının
    kapı 3s,loc kapısında | göz pl,2p gözleriniz | gül ins gülle | köprü abl köprüden
    okul_bahçe/3 - okul_bahçesi | okul_bahçe/3 dat okul_bahçesine | okul_bahçe/3 pl,loc okul_bahçelerinde
    okul_bahçe/3 1p,loc okul_bahçemizde | meyve_su/y3 acc meyve_suyunu | buzdolap/3 loc buzdolabında
    İstanbul/' abl İstanbul'dan | Ayşe/' dat Ayşe'ye | Ayşe/' gen Ayşe'nin | Mehmet/' gen Mehmet'in
    Mehmet/' loc Mehmet'te | Sinop/' gen Sinop'un | Zonguldak/' acc Zonguldak'ı | Kemal/'^ dat Kemal'e
    Muş/' abl Muş'tan | Gül/' ins Gül'le | Van_Göl/3' loc Van_Gölü'nde | Kuşada/3' dat Kuşadası'na
    İzmir/' li İzmirli | Bursa/' li,am Bursalıyım | ben dat bana | ben gen benim | sen ins seninle
    biz gen bizim | bu/n acc bunu | o/n dat ona | o ins onunla | kim ins kiminle | biri/n acc birini
    kendi/n 1s,acc kendimi | kendi/n dat kendine | sen siz sensiz | sen loc,q sende_mi | güzel was güzeldim
    öğretmen dir öğretmendir | meşgul/^ were meşguldü | taş dir taştır | tuz siz tuzsuz | göz lik gözlük
    süt ci sütçü | balık ci balıkçı | ev loc,ki evdeki | araba da araba_da | uçak q uçak_mı | göl q göl_mü
"""
VERB_FORMS = """
    git/~ prog,1s gidiyorum | git/~ past,3s gitti | git/~ aor,3p giderler | git/~ not,dik,1s,acc gitmediğimi
    git/~ ip gidip | başla prog,3s başlıyor | bekle prog,1p bekliyoruz | söyle prog,2s söylüyorsun
    oyna prog,3p oynuyorlar | oku prog,3s okuyor | ye prog,3s yiyor | ye fut,3s yiyecek | ye ince yiyince
    ye abil,aor,3s yiyebilir | ye not,past,1s yemedim | ye pas,aor,3s yenir | de prog,3s diyor
    de fut,1s diyeceğim | de ip deyip | de ince deyince | de an diyen | de arak diyerek
    oku not,dik,1s okumadığım | oku acak,3s,acc okuyacağını | oku ma,dat okumaya | oku mak,abl okumaktan
    oku ken okurken | gel/i aor,1s gelirim | gel/i not,aor,1s gelmem | gel/i not,aor,3s gelmez
    gel/i not,aor,1p gelmeyiz | gel/i not,aor,2p gelmezsiniz | al/i aor,3s alır | kal/i cond,2s kalırsan
    gör/i hab,1p görürdük | yap aor,3s yapar | çalış aor,3s çalışır | ver/i pas,aor,3s verilir
    bil/i past,2s,q bildin_mi | yap prog,2s,q yapıyor_musun | gör/i fut,2p,q görecek_misiniz
    git/~ hab,2s,q gider_miydin | gel/i not,aor,1s,q gelmez_miyim | oku evid,3p,q okumuşlar_mı
    gel/i let1p,q gelelim_mi | otur aor,2s,q oturur_musun | yaz cannot,prog,3s yazamıyor
    yaz cannot,aor,3s yazamaz | yaz plup,1s yazmıştım | yaz pcont,3p yazıyorlardı | yaz must,1s yazmalıyım
    yaz imp2p yazın | ye imp2p yiyin | yaz sa,1s yazsam | git/~ let1p gidelim | koş dikca koştukça
    gül madan gülmeden | bin ali bineli | seyret/~a aor,3s seyreder | yardım_et/~ aor,1s yardım_ederim
    doğra pas,aor,3s doğranır | bul/i pas,past,3s bulundu | düşün evid,3s düşünmüş | dön arak dönerek
    süpür hab,3p süpürürlerdi | unut not,imp2p unutmayın | çık fut,1p çıkacağız
"""


def _rows(table: str) -> list[tuple[str, tuple[str, ...], str]]:
    rows = [row.split() for line in table.strip().splitlines() for row in line.split("|")]
    return [
        (stem.replace("_", " "), () if tags == "-" else tuple(tags.split(",")), form.replace("_", " "))
        for stem, tags, form in rows
    ]


@pytest.fixture(scope="module")
def text() -> str:
    return "\n\n".join(sample_documents(0, 1_000_000))


def _lower(text: str) -> str:
    return text.replace("İ", "i").replace("I", "ı").lower()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", _lower(text))


@pytest.mark.parametrize("stem, tags, form", _rows(NOUN_FORMS), ids=lambda value: str(value) if value else "bare")
def test_a_noun_takes_its_suffixes_as_spelled(stem: str, tags: tuple[str, ...], form: str) -> None:
    assert inflect(stem, tags) == form


@pytest.mark.parametrize("stem, tags, form", _rows(VERB_FORMS), ids=lambda value: str(value))
def test_a_verb_takes_its_suffixes_as_spelled(stem: str, tags: tuple[str, ...], form: str) -> None:
    assert conjugate(stem, tags) == form


def test_attach_takes_suffixes_in_archiphonemes() -> None:
    assert attach("kitap", "lAr", "(I)m", "DA") == "kitaplarımda"
    assert attach("göz", "lIk", "CI", "lAr", "DAn") == "gözlükçülerden"
    assert attach("ev") == "ev"


@pytest.mark.parametrize(
    "number, form",
    [(4, "4'te"), (9, "9'da"), (10, "10'da"), (20, "20'de"), (30, "30'da"), (200, "200'de"), (1998, "1998'de"),
     (2000, "2000'de"), (2016, "2016'da"), (1970, "1970'te")],
)  # fmt: skip
def test_digits_take_the_suffix_of_their_last_spoken_word(number: int, form: str) -> None:
    assert inflect(spoken_number(number), ("loc",)) == form


@pytest.mark.parametrize("number, words", [(2, "iki"), (10, "on"), (42, "kırk iki"), (99, "doksan dokuz")])
def test_numbers_are_written_in_words(number: int, words: str) -> None:
    assert number_words(number) == words


def test_an_unknown_tag_is_refused() -> None:
    with pytest.raises(KeyError, match="nominative"):
        inflect("kitap", ("nominative",))
    with pytest.raises(KeyError, match="perfect"):
        conjugate("yap", ("perfect", "1s"))


def _breaks_harmony(stem: str, form: str) -> bool:
    """Whether a vowel after the stem differs in frontness from the one before it (-iyor and -ken aside)."""
    vowels = [letter for letter in _lower(form) if letter in "aıoueiöü"]
    start = sum(letter in "aıoueiöü" for letter in _lower(stem))
    pairs = zip(vowels[start - 1 :], vowels[start:], strict=False)
    return any((before in "aıou") != (after in "aıou") or after in "oö" for before, after in pairs)


CASES = ("acc", "dat", "loc", "abl", "gen", "ins")


def test_no_suffix_of_a_random_stem_breaks_vowel_harmony() -> None:
    rng = random.Random("harmony")
    for _ in range(3000):
        vowels = rng.choice(("aıou", "eiöü"))
        stem = "".join(rng.choice("bdgklmnrstvyz") + rng.choice(vowels) for _ in range(rng.randint(1, 3)))
        stem += rng.choice(("", "k", "t", "n", "p", "ş", "l"))
        plural = rng.choice(((), ("pl",)))
        owner = rng.choice(((), ("1s",), ("2s",), ("3s",), ("1p",), ("2p",), ("3p",)))
        form = inflect(stem, (*plural, *owner, rng.choice(CASES)))
        assert not _breaks_harmony(stem, form), (stem, form)


def test_the_harmony_check_sees_a_broken_form() -> None:
    assert _breaks_harmony("kitap", "kitapde")
    assert _breaks_harmony("göz", "gözlar")
    assert not _breaks_harmony("kitap", "kitabımızdan")


def test_a_compound_takes_the_pronominal_n_before_every_case() -> None:
    compounds = [noun for nouns in NOUNS.values() for noun in nouns if "3" in noun.partition("/")[2]]
    assert len(compounds) >= 15
    for noun in compounds:
        bare = inflect(noun)
        assert bare[-1] in "ıiuü"
        for case in ("acc", "dat", "loc", "abl"):
            assert inflect(noun, (case,)).startswith(f"{bare}n"), noun
        assert "n" not in inflect(noun, ("ins",))[len(bare) :], noun


def test_a_proper_name_keeps_its_spelling_before_the_apostrophe() -> None:
    for kind in sample.PROPER:
        for noun in sample._CLASSES[kind]:
            for case in CASES:
                name, apostrophe, ending = inflect(noun, (case,)).partition("'")
                assert apostrophe, noun
                assert ending, noun
                assert name == inflect(noun)


def test_a_softened_consonant_returns_before_a_consonant() -> None:
    for stem in ("kitap", "ağaç", "köpek", "renk/~", "kurt/~"):
        text = stem.partition("/")[0]
        assert not inflect(stem, ("acc",)).startswith(text)
        assert inflect(stem, ("pl",)).startswith(text)
        assert inflect(stem, ("loc",)).startswith(f"{text}t")


def test_a_suffix_is_voiceless_after_a_voiceless_consonant_only() -> None:
    for last in "çfhkpsşt":
        assert inflect(f"ba{last}", ("loc",)) == f"ba{last}ta"
    for last in "bcdgğjlmnrvyz":
        assert inflect(f"ba{last}", ("loc",)) == f"ba{last}da"


def test_every_listed_noun_softens_or_keeps_its_end_but_never_loses_its_beginning() -> None:
    for kind, nouns in NOUNS.items():
        for noun in nouns:
            stem = noun.partition("/")[0]
            form = inflect(noun, ("pl", "1s", "dat")) if kind != "pronoun" else inflect(noun, ("dat",))
            assert form.startswith(stem[:-1]), (noun, form)


def test_every_verb_conjugates_in_every_tense_and_person() -> None:
    tenses = ("prog", "aor", "past", "evid", "fut", "must", "sa", "cond", "hab", "pcont", "plup")
    persons = ("1s", "2s", "3s", "1p", "2p", "3p")
    for verb in VERBS:
        forms = {conjugate(verb, (tense, person)) for tense in tenses for person in persons}
        assert len(forms) == len(tenses) * len(persons), verb
        assert all(set(form) <= LETTERS | {" "} for form in forms)


def test_every_template_names_words_that_exist() -> None:
    known = {*NOUNS, *ADJECTIVES, *POOLS, *sample._NUMBERS, "vp", "again", "when", "S", "too"}
    for templates in (*POOLS.values(), *PHRASES.values()):
        for template in templates:
            before, arrow, verb = template.partition(">")
            assert not arrow or sample._find_verb(verb), template
            for piece in re.findall(r"\{([^{}]+)\}", before):
                head = re.sub(r"\d$", "", piece.split("+")[0])
                if head[0] == "*":
                    assert sample._find_verb(head[1:]), template
                else:
                    assert head in known or (head[0] == "=" and head[1:] in sample._STEMS), (piece, template)


def test_the_lexicon_has_the_promised_size() -> None:
    places = sum(len(NOUNS[kind]) for kind in ("city", "district", "river", "sea"))
    common = {noun for kind, nouns in NOUNS.items() if kind not in sample.PROPER for noun in nouns}
    assert len(common) >= 250
    assert len(set(VERBS)) >= 120
    assert len({word for words in ADJECTIVES.values() for word in words}) >= 80
    assert len(set(NOUNS["name"])) >= 60
    assert places >= 50
    assert sum(len(templates) for templates in POOLS.values()) >= 60
    assert len(PLANS) >= 10


def test_a_seed_gives_the_same_bytes_everywhere() -> None:
    head = "\n\n".join(sample_documents(0, 10_000)).encode()[:10_000]
    assert hashlib.sha256(head).hexdigest() == "69e0cc58bdc7c54ab1f583df3c6049801274a096548490f7a6190a1064987720"


def test_the_text_does_not_depend_on_the_hash_seed() -> None:
    code = "from lowvram.data.sample import write_document; print(ascii([write_document(9, n) for n in range(30)]))"
    path = os.pathsep.join(filter(None, sys.path))
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {ascii([write_document(9, number) for number in range(30)]) + "\n"}


@pytest.mark.parametrize("plan", PLANS, ids=[f"{plan[1].split()[0]}-{plan[4].split()[0]}" for plan in PLANS])
def test_every_plan_is_told_in_each_of_its_settings_and_moods(plan: tuple[int, str, str, str, str]) -> None:
    for setting in plan[1].split():
        for mood in plan[2].split():
            rng = random.Random(f"{setting}/{mood}")
            for _ in range(5):
                document = sample._Story(rng, (1, setting, mood, plan[3], plan[4])).write()
                assert len(document.split()) >= 15, document


def test_a_question_line_is_followed_by_an_answer(text: str) -> None:
    for document in text.split("\n\n"):
        lines = document.split("\n")
        asked = [number for number, line in enumerate(lines) if line.startswith("–") and line.endswith("?")]
        assert all(lines[number + 1].startswith("–") for number in asked if number + 1 < len(lines)), document


def test_documents_do_not_depend_on_those_before_them() -> None:
    documents = list(sample_documents(3, 5_000))
    assert [write_document(3, number) for number in reversed(range(len(documents)))] == documents[::-1]


def test_two_seeds_share_no_document() -> None:
    assert not set(sample_documents(1, 100_000)) & set(sample_documents(2, 100_000))


@pytest.mark.parametrize("characters", [0, 1, 777, 12_345])
def test_a_stream_ends_with_the_document_that_reaches_the_length(characters: int) -> None:
    documents = list(sample_documents(5, characters))
    assert sum(map(len, documents)) >= characters
    assert sum(map(len, documents[:-1])) < max(characters, 1)


def test_a_document_has_sentences_and_no_blank_line() -> None:
    for document in sample_documents(4, 300_000):
        lines = document.split("\n")
        assert all(line and line == line.strip() for line in lines), document
        assert len(re.findall(r"[.!?]", document)) >= 3, document


def test_a_line_begins_with_a_capital_and_quotes_close(text: str) -> None:
    for line in filter(None, text.split("\n")):
        assert re.match(r'(– )?"?[A-ZÇĞİÖŞÜ0-9]', line), line
        assert line.count('"') % 2 == 0, line


def test_text_is_nfc_and_holds_only_turkish_letters_digits_and_punctuation(text: str) -> None:
    assert unicodedata.is_normalized("NFC", text)
    assert set(text) <= LETTERS | OTHERS


def test_no_space_is_doubled_or_stands_before_punctuation(text: str) -> None:
    assert not re.search(r"  | [,.!?;:]|,,|\.\.|[{}+=*/~^|<>_]", text)


def test_a_megabyte_has_many_words_and_no_sentence_rules_it(text: str) -> None:
    assert len(set(_words(text))) > 5_000
    sentences = Counter(re.split(r"(?<=[.!?])\s+|\n+", text))
    sentence, count = sentences.most_common(1)[0]
    assert count <= 0.005 * sum(sentences.values()), sentence


def test_every_case_tense_and_apostrophe_appears_in_the_text(text: str) -> None:
    for pattern in (
        r"[A-ZÇĞİÖŞÜ]\w+'n[ıiuü]n\b", r"[A-ZÇĞİÖŞÜ]\w+'[dt][ae]n\b", r"\w+[ıiuü]yor\b", r"\w+[ae]c[ae][kğ]",
        r"\w+m[ıiuü]ş\b", r"\w+m[ae]z\b", r"\b(mi|mı|mu|mü)\?", r"\bm[iıuü]s[iıuü]n\b", r"\w+rs[ae]\w\b", r"\w+ken\b",
        r"\w+[dt][ıiuü]ğ[ıiuü]", r"\w+[ıiuü]nc[ae]\b", r"\bdaha\b", r"\ben\b", r"\d+'[dt][ae]\b",
        r"\w+m[ae]d[ae]n önce", r"\w+[ıiuü]p\b",
    ):  # fmt: skip
        assert len(re.findall(pattern, text)) >= 20, pattern


def test_most_words_occur_in_real_turkish(text: str, shared_data: Path) -> None:
    path = shared_data / "text" / "tr_mix_small.train.txt.gz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}, which is not here")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        known = set(_words(file.read()))
    counts = Counter(_words(text))
    missing = [word for word, _ in counts.most_common() if word not in known]
    share = sum(count for word, count in counts.items() if word in known) / counts.total()
    assert share >= 0.8, f"{share:.3f} known; most frequent missing: {missing[:100]}"
