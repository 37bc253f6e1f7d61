"""Words are read by the rules of grammar, and the reading that other words support is chosen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lowvram.data.morphology.analyses import Analyser, Lemma
from lowvram.data.morphology.learning import LetterCosts, WordModel
from lowvram.data.morphology.marking import Marker, count_words
from lowvram.data.morphology.rules import read_rules, shipped_languages
from lowvram.data.morphology.segmenter import Segmenter, learn_segmenter
from lowvram.data.text import documents
from lowvram.data.tokenizer import MARK, Tokenizer, train_tokenizer
from lowvram.errors import DataError
from lowvram.finish import finish

TURKISH = Analyser(read_rules("tr"))
KAZAKH = Analyser(read_rules("kk"))
# A word, its lemma, and its parts; each shows another rule.
READINGS = {
    "harmony": (TURKISH, "evlerimizden", "ev", "ev ler imiz den"),
    "rounded harmony": (TURKISH, "gözümüzün", "göz", "göz ümüz ün"),
    "assimilation": (TURKISH, "ağaçtan", "ağaç", "ağaç tan"),
    "softened p": (TURKISH, "kitabı", "kitap", "kitab ı"),
    "softened k": (TURKISH, "ayağına", "ayak", "ayağ ı na"),
    "softened nk": (TURKISH, "rengi", "renk", "reng i"),
    "lost vowel": (TURKISH, "burnu", "burun", "burn u"),
    "lost vowel, softened": (TURKISH, "kaybı", "kayıp", "kayb ı"),
    "lost vowel of the front": (TURKISH, "vakti", "vakit", "vakt i"),
    "softened verb of two letters": (TURKISH, "ediyor", "et", "ed iyor"),
    "doubled": (TURKISH, "hakkı", "hak", "hakk ı"),
    "irregular harmony": (TURKISH, "saatler", "saat", "saat ler"),
    "buffers": (TURKISH, "arabasını", "araba", "araba sı nı"),
    "raised": (TURKISH, "bekliyorum", "bekle", "bekli yor um"),
    "raised suffix": (TURKISH, "temizliyor", "temiz", "temiz li yor"),
    "negative": (TURKISH, "gelmiyordu", "gel", "gel m iyor du"),
    "impossible": (TURKISH, "yapamadıklarını", "yap", "yap a ma dık lar ı nı"),
    "softened suffix": (TURKISH, "geleceğimi", "gel", "gel eceğ im i"),
    "hard suffix": (TURKISH, "gelecekler", "gel", "gel ecek ler"),
    "relative": (TURKISH, "evdekiler", "ev", "ev de ki ler"),
    "question and person": (TURKISH, "misiniz", "mi", "mi siniz"),
    "question and copula": (TURKISH, "muydunuz", "mi", "mu ydu nuz"),
    "question and -DIr": (TURKISH, "müdür", "mi", "mü dür"),
    "apostrophe": (TURKISH, "ankara'daki", "ankara", "ankara da ki"),
    "Kazakh plural": (KAZAKH, "аттардың", "ат", "ат тар дың"),
    "Kazakh softened": (KAZAKH, "кітабым", "кітап", "кітаб ым"),
    "Kazakh neutral vowel": (KAZAKH, "көруге", "көр", "көр у ге"),
    "Kazakh verb": (KAZAKH, "бермедік", "бер", "бер ме ді к"),
    **{f"Kazakh question {word}": (KAZAKH, word, "ма", word) for word in ("ма", "ме", "ба", "бе", "па", "пе")},
}


@pytest.mark.parametrize(("analyser", "word", "lemma", "parts"), READINGS.values(), ids=READINGS)
def test_the_rules_allow_the_reading_that_grammar_gives(analyser: Analyser, word: str, lemma: str, parts: str) -> None:
    lengths = tuple(map(len, parts.split()))
    assert lemma in {found.lemma.text for found in analyser.read(word) if found.lengths == lengths}


@pytest.mark.parametrize(
    "parts",
    ["ev lar", "ağaç dan", "araba ı", "gel ecek i", "gel me yor", "gel di m ler", "ev de ler i", "göz imiz", "kaz lik"],
)
def test_a_reading_against_the_rules_is_not_made(parts: str) -> None:
    lengths = tuple(map(len, parts.split()))
    assert lengths not in {found.lengths for found in TURKISH.read(parts.replace(" ", ""))}


def test_a_question_has_only_its_own_spellings_and_endings() -> None:
    """Vowels agree within the particle, what is no ending of it makes another word, and an apostrophe follows none."""
    for word in ("misınız", "ma", "midi", "miler", "miyle", "minin", "miysa", "mi'ydi"):
        assert not [found for found in TURKISH.read(word) if found.lemma.state == "question"]
    assert not [found for found in KAZAKH.read("мең") if found.lemma.text == "ма"]


def test_a_noun_of_two_letters_is_not_softened() -> None:
    assert {found.lemma.text for found in TURKISH.read("adı") if found.lengths == (2, 1)} == {"ad"}


def test_every_analysis_has_all_letters_of_the_word() -> None:
    for word in ("a", "st", "kalemlerimizdekiler", "istanbul'un", "'", "o'", "çekoslovakyalılaştıramadıklarımızdan"):
        found = TURKISH.read(word)
        assert found
        assert {sum(one.lengths) for one in found} == {len(word.replace("'", ""))}


CONTRADICTIONS = {
    "a letter of two groups": ('"eiîöü" = "e"', '"aeiîöü" = "e"', "harmony.A lists a twice"),
    "a vowel of no group": ('A = { "aâıouû"', 'A = { "aâıoû"', "does not say what it is after u"),
    "a letter of two rules": (
        "\n[softening]\n",
        '\n[softening]\nA = { vowel = "a", other = "e" }\n',
        "chosen by two rules",
    ),
    "an unknown letter": ('form = "lAr", name = "plural"', 'form = "lXr", name = "plural"', "has X, which no rule"),
    "an unknown state": ('to = "plural" }', 'to = "plurale" }', "names plurale, which is no state"),
    "a state that nothing reaches": ("[states]", '[states]\nlost = "x"', "No suffix leads to the state lost"),
    "a state without an end": ("unfinished = [", 'unfinished = ["end", ', "state end can end"),
    "a particle among the stems": ('to = "question"', 'to = "noun"', "is in the state noun, in which stems are"),
    "a particle of an unknown letter": ('form = "mI"', 'form = "mX"', "mX (question) in particles has X"),
    "an unknown state that softens": (
        'softens_short = ["verb"]',
        'softens_short = ["verbs"]',
        "names verbs, which is no",
    ),
    "a particle twice": (
        "\n[groups]",
        '\n[[particles]]\nform = "mU"\nname = "question"\nlemma = "mi"\nto = "question"\n[groups]',
        "particles lists mi in the state question twice",
    ),
    "two ways for one suffix": (
        "plural = [\n",
        'plural = [\n  { form = "lAr", name = "plural", after = "noun", to = "case" },\n',
        "leads from noun to case and to plural",
    ),
    "a bracket that is open": ('"(I)m", name = "possessive', '"(Im", name = "possessive', "is no form"),
    "an unknown key": ("vowels =", "vovels =", "vowels cannot be used"),
    "no TOML": ("\n[harmony]", "\n[harmony", "cannot be read as TOML"),
}


@pytest.mark.parametrize(("old", "new", "says"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_rules_that_contradict_one_another_are_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = (Path(read_rules.__code__.co_filename).parent / "tr.toml").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "rules.toml"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rules(file)
    assert says in str(caught.value)


def test_a_language_without_rules_is_answered_with_the_known_ones() -> None:
    assert shipped_languages() == ["kk", "tr"]
    with pytest.raises(DataError, match="kk, tr"):
        read_rules("uz")


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    """Learnt from stems that occur with many suffixes, and words that only look as if they had one."""
    stems = ("ev", "okul", "masa", "kalem", "çocuk", "şehir", "deniz", "kadın", "doktor", "pencere")
    counts: Counter[str] = Counter()
    for stem in stems:
        for suffixes in ("", "lAr", "lArI", "lArdA", "lArdAn", "dA", "dAn", "lArA"):
            front = next(letter for letter in reversed(stem) if letter in "aeıioöuü") in "eiöü"
            counts[stem + suffixes.replace("A", "e" if front else "a").replace("I", "i" if front else "ı")] += 3
    return finish(learn_segmenter(counts, read_rules("tr")))


def test_stems_that_other_words_share_are_preferred(segmenter: Segmenter) -> None:
    assert segmenter.segment("Evlerden") == ["Ev", "ler", "den"]
    assert segmenter.segment("kadından")[0] == "kadın"
    assert segmenter.segment("MASALARDA") == ["MASA", "LAR", "DA"]
    assert segmenter.segment("Denizli'den") == [*segmenter.segment("Denizli'den")[:-1], "'den"]
    assert [part.name for part in segmenter.name_parts("okulda")] == ["stem", "locative"]


def know(language: str, *stems: Lemma) -> Segmenter:
    """A segmenter that knows these stems as equally probable, and nothing about suffixes."""
    model = WordModel(dict.fromkeys(stems, -1.0), {}, -20.0, LetterCosts({}, -5.0))
    return Segmenter(read_rules(language), model)


def test_a_stem_is_named_by_its_lemma_where_it_is_spelt_otherwise() -> None:
    nouns = ("kitap", "burun", "vakit", "hak", "ev")
    verbs = ("git", "et", "bekle", "gel")
    turkish = know("tr", *(Lemma(text, "noun") for text in nouns), *(Lemma(text, "verb") for text in verbs))
    words = ["Gidiyor", "ediyor", "KİTABIM", "burnu", "vakti", "hakkı", "bekliyorum"]
    stems = [turkish.name_parts(word)[0] for word in words]
    assert [stem.lemma for stem in stems] == ["git", "et", "kitap", "burun", "vakit", "hak", "bekle"]
    assert [stem.text for stem in stems] == ["Gid", "ed", "KİTAB", "burn", "vakt", "hakk", "bekli"]
    for word in ("Gelecek", "EVLERDE", "kitap", "Ev'de", "'", "x'", "x" * 500):
        assert {part.lemma for part in turkish.name_parts(word)} == {None}
    kazakh = know("kk", Lemma("кітап", "noun"), Lemma("орын", "noun"))
    assert [part.lemma for part in kazakh.name_parts("Кітабым")] == ["кітап", None]
    assert kazakh.name_parts("орны")[0] == ("орн", "stem", "stem", "орын")


def test_a_question_is_named_beside_a_noun_that_looks_like_one() -> None:
    turkish = know("tr", Lemma("mi", "question"), Lemma("müdür", "noun"))
    for word, parts in (
        ("misiniz", [("mi", "question", "particle", None), ("siniz", "person 2pl", "person", None)]),
        ("Muyum", [("Mu", "question", "particle", "mi"), ("yum", "person 1sg", "person", None)]),
        ("mı", [("mı", "question", "particle", "mi")]),
        ("müdür", [("müdür", "stem", "stem", None)]),
    ):
        assert turkish.name_parts(word) == parts
    assert turkish.segment("mıymışsınız") == ["mı", "ymış", "sınız"]
    assert know("kk", Lemma("ма", "end")).name_parts("бе") == [("бе", "question", "particle", "ма")]


def test_a_word_that_no_rule_reads_keeps_its_letters(segmenter: Segmenter) -> None:
    for word in ("TBMM'nin", "xyz", "İIiı'", "’", "", "a" * 500, "ab'cd'ef", "ǅ", "ﬁ"):
        assert "".join(segmenter.segment(word)) == word
        assert "".join(part.text for part in segmenter.name_parts(word)) == word


def test_what_was_saved_cuts_alike(segmenter: Segmenter, tmp_path: Path) -> None:
    segmenter.save(tmp_path / "a.json")
    loaded = Segmenter.load(tmp_path / "a.json")
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    for word in ("evlerde", "kadınları", "bilinmeyenlerden", "Ankara'dan"):
        assert loaded.segment(word) == segmenter.segment(word)
    (tmp_path / "a.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="holds no learnt morphology"):
        Segmenter.load(tmp_path / "a.json")


def test_no_words_are_refused() -> None:
    with pytest.raises(DataError, match="no words"):
        finish(learn_segmenter({"bir": 1}, read_rules("tr")))


def test_strict_merges_never_reach_over_a_morpheme(segmenter: Segmenter, tmp_path: Path) -> None:
    texts = ["evlerden okullarda masalardan kalemlerde çocuklardan şehirlerde"] * 30
    strict = train_tokenizer(iter(texts), 600, tmp_path / "strict", rewrite=Marker(segmenter, "strict").rewrite)
    plain = train_tokenizer(iter(texts), 600, tmp_path / "plain")
    assert len(plain.encode(texts[0])) == 6
    pieces = [strict.decode([id]).strip() for id in strict.encode(texts[0])]
    wanted = [part for word in texts[0].split() for part in segmenter.segment(word)]
    assert pieces == wanted
    assert MARK not in (tmp_path / "strict/tokenizer.json").read_text(encoding="utf-8")
    assert Tokenizer.load(tmp_path / "strict").decode(strict.encode("ev\ue000ler")) == "ev\ue000ler"


def test_soft_learns_from_whole_and_cut_words(segmenter: Segmenter) -> None:
    cut, whole = Marker(segmenter, "soft").rewrite("Evlerden, 'okul'a\ue000 2 masada.")
    assert whole == "Evlerden, 'okul'a 2 masada."
    assert cut == f"Ev{MARK}ler{MARK}den, 'okul{MARK}'a 2 masa{MARK}da."


def test_real_text_teaches_real_stems(shared_data: Path) -> None:
    counts = count_words(documents(shared_data / "text/tr_treebank.train.txt.gz"))
    learnt = finish(learn_segmenter(counts, read_rules("tr")))
    cut = {word: " ".join(learnt.segment(word)) for word in ("yapılan", "ülkelerin", "gözlerinin", "İstanbul'da")}
    assert cut == {
        "yapılan": "yap ıl an",
        "ülkelerin": "ülke ler in",
        "gözlerinin": "göz ler i nin",
        "İstanbul'da": "İstanbul 'da",
    }
