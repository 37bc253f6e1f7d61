"""`lowvram tokenizer compare` and `show`: figures of a known tokenizer, tables, JSON, the chart, and wrong input."""

from __future__ import annotations

import builtins
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from lowvram.api import LowvramError, compare_tokenizers, tokenizer_comparing
from lowvram.api.tokenizer_comparing import shorten
from lowvram.cli import console
from lowvram.cli.tokenizer_compare import show_share
from lowvram.cli.tokenizer_show import show_piece
from lowvram.data.tokenizer import Tokenizer
from tests.flows.typed import typed, write_home

# By hand: 8 words, of which "ev" is known whole, "evler" in two pieces, "EV" and "ÇAY" not at all.
TEXT = "ev evler ev EV\n\nÇAY ev\nev evler\n"
PIECES = {"[UNK]": 0, "ev": 1, "##ler": 2}
# The same sentences: in tr 2 + 1 tokens of PIECES, in kk (where the letter й is decomposed) 4 + 3, in ru 1 + 1.
SAME = "id\ttr\tkk\tru\n1\tevler\tevlerler ev\tдом\n2\tev\tu\u0308\u0438\u0306 ev ev\tev\n3\tev\t \tдом\n4\tev\t\t\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of ours with stems, one that loses text, texts and gold."""
    folder = tmp_path_factory.mktemp("home")
    write_home(folder)
    learn = ("tokenizer", "train", folder / "train.txt", "--vocab", 400, "--morphology", "strict")
    assert typed(*learn, "--out", folder / "tok").code == 0
    small = Library(models.WordPiece(PIECES, unk_token="[UNK]"))
    small.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    small.save(str(folder / "small.json"))
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    gold = "form\tsegmentation\tcount\nevler\tev ler\t3\nevde\tev de\t1\n"
    (folder / "gold.tsv").write_text(gold, encoding="utf-8")
    (folder / "same.tsv").write_text(SAME, encoding="utf-8")
    return folder


def test_the_figures_are_those_that_were_counted_by_hand(home: Path) -> None:
    found = compare_tokenizers(home / "small.json", {"tr": home / "text.txt"}, gold={"tr": home / "gold.tsv"})
    [text], [tokenizer] = found.texts, found.tokenizers
    assert (text.documents, text.lines, text.words, text.distinct_words) == (2, 3, 8, 4)
    assert (text.characters, text.text_bytes, text.is_whole) == (29, 30, True)
    assert (tokenizer.name, tokenizer.kind, tokenizer.size) == ("small.json", "WordPiece", 3)
    figures = tokenizer.figures["tr"]
    assert figures.tokens == 10
    assert figures.characters_per_token == 2.9
    assert figures.bytes_per_token == 3.0
    assert figures.tokens_per_word == 10 / 8
    assert figures.continued == 2 / 8
    assert figures.exact_lines == figures.exact_documents == 0.0
    assert (figures.equal_words, figures.equal_lines) == (2, 0)
    assert figures.speed.mb_per_s > 0
    assert figures.speed.library is None
    assert figures.boundaries is not None
    # evler is cut as the gold says; evde is one unknown token.
    assert figures.boundaries.by_type.recall == 1 / 2
    assert figures.boundaries.by_token.recall == 3 / 4
    assert figures.boundaries.unplaced == 0
    assert [notice.text for notice in found.notices] == [
        "small.json does not give every text back (tr); it is measured all the same."
    ]


def test_ours_loses_nothing_and_is_timed_beside_the_library(home: Path) -> None:
    found = compare_tokenizers([home / "tok", home / "small.json"], home / "valid.txt")
    figures = found.tokenizers[0].figures["text"]
    assert figures.is_lossless
    assert (figures.equal_words, figures.equal_lines) == (0, 0)
    own = Tokenizer.load(home / "tok")
    documents = (home / "valid.txt").read_text(encoding="utf-8").split("\n\n")
    assert figures.tokens == sum(len(own.encode(text)) for text in documents)
    assert figures.speed.ratio == figures.speed.mb_per_s / (figures.speed.library or 0.0)
    assert figures.boundaries is None


def keys_of(value: Any) -> Any:
    """The names in a JSON value, without its numbers."""
    if isinstance(value, dict):
        return {name: keys_of(inner) for name, inner in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) else ""


def test_the_form_of_the_json_stays(home: Path) -> None:
    words = ("tokenizer", "compare", home / "tok", "--text", f"tr={home / 'valid.txt'}", "--gold", home / "gold.tsv")
    rates = ("precision", "recall", "f1", "macro_precision", "macro_recall", "macro_f1", "over", "under", "exact")
    score = dict.fromkeys(("words", *rates), "")
    names = (
        "tokens characters_per_token bytes_per_token tokens_per_word continued exact_lines exact_documents equal_words "
        "equal_lines mb_per_s library_mb_per_s ratio"
    )
    boundaries = {"boundaries": {"by_type": score, "by_token": score, "unplaced": ""}}
    figures = {"tr": {**dict.fromkeys(names.split(), ""), **boundaries}}
    texts = "language documents lines words distinct_words characters text_bytes is_whole"
    answer = typed(*words, "--json")
    assert answer.code == 0, answer.err
    assert keys_of(json.loads(answer.out)) == {
        "texts": [dict.fromkeys(texts.split(), "")],
        "parallel": "",
        "tokenizers": [{**dict.fromkeys(("name", "path", "kind", "size", "parity"), ""), "figures": figures}],
    }
    told = json.loads(typed(*words, "--json", "--parallel", home / "same.tsv", "--languages", "tr", "kk").out)
    by_language = {"tr": "", "kk": ""}
    names = ("path", "sentences", "left_out", "is_whole")
    assert keys_of(told["parallel"]) == {**dict.fromkeys(names, ""), "languages": [""], "text_bytes": by_language}
    parity = dict.fromkeys(("tokens", "parity", "bytes_per_token", "exact"), "")
    assert keys_of(told["tokenizers"][0]["parity"]) == dict.fromkeys(by_language, parity)


def test_a_table_of_each_language_fits_80_columns_and_the_next_step_shows_where_it_cuts(home: Path) -> None:
    texts = (f"tr={home / 'valid.txt'}", home / "text.txt", f"kk={home / 'train.txt'}")
    words = ("tokenizer", "compare", home / "tok", home / "small.json", "--gold", f"tr={home / 'gold.tsv'}")
    answer = typed(*words, "--text", *texts, "--size", "1kB")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    tables = [line for line in lines if re.match(r"(tok |small|tr:|kk:)", line)]
    assert [line.split()[0] for line in tables] == ["tr:", "tok", "small.json", "kk:", "tok", "small.json"]
    assert all(len(line) <= 80 for line in tables)
    assert "100%" in tables[1]
    assert re.search(r"\d \(\d+\.\d×\) +\d\.\d{3}", tables[1])
    assert lines[-1].startswith("Next: lowvram tokenizer show 'Evlerimizdekilerden misiniz?' --tokenizer ")
    assert "Of kk the first 1000 B are read; --size changes that." in answer.err
    assert "small.json does not give every text back (tr, kk)" in answer.err
    assert (show_share(1.0), show_share(0.99999), show_share(0.5)) == ("100%", "99.9%", "50.0%")


def test_the_chart_is_a_picture(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parity = ("--parallel", home / "same.tsv", "--languages", "tr", "kk")
    words = ("tokenizer", "compare", home / "tok", home / "small.json", *parity)
    measured = ("--text", f"tr={home / 'text.txt'}", "--gold", home / "gold.tsv")
    # Seven panels in four rows, or parity alone.
    for options, inches in ((measured, 3.2 * 4 + 0.4), ((), 3.2 + 0.4)):
        assert typed(*words, *options, "--chart", tmp_path / "a.png").code == 0
        picture = (tmp_path / "a.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = (int.from_bytes(picture[place : place + 4], "big") for place in (16, 20))
        assert (width, height) == (1200, round(120 * inches))


def test_a_chart_without_matplotlib_or_of_another_kind_is_refused_before_anything_is_read(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("tokenizer", "compare", home / "tok", "--text", "missing.txt", "--chart")
    answer = typed(*words, "a.svg")
    assert (answer.code, answer.out) == (1, "")
    assert "--chart is a.svg. A chart is written as PNG" in answer.err
    assert "Write --chart chart.png." in typed(*words, ".").err
    load = builtins.__import__

    def refuse(name: str, *given: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "pip install -e '.[chart]'" in typed(*words, "a.png").err


@pytest.mark.parametrize(
    "words, says",
    [
        (("TOK", "--text", "tr=TEXT", "tr=TEXT"), "--text names tr twice"),
        (("TOK", "--text", "tr="), "--text tr= names no file"),
        (("TOK", "TOK", "--text", "TEXT"), "are the same tokenizer"),
        (("TOK", "--text", "EMPTY"), "holds no document"),
        (("TOK", "--text", "tr=TEXT", "--gold", "kk=GOLD"), "gold segmentations are of 'kk', of which there is no"),
        (("TOK", "--text", "tr=TEXT", "--gold", "GOLD", "tr=GOLD"), "--gold names tr twice"),
        (("TOK", "--text", "tr=TEXT", "--gold", "GOLD", "GOLD"), "--gold names 2 files of one language"),
        (("TOK", "--text", "tr=TEXT", "--gold", "TEXT"), "neither JSON lines nor a table"),
        (("TOK", "--text", "tr=TEXT", "--gold", "BAD"), "do not add up to 'evler'"),
        (("nowhere", "--text", "tr=TEXT"), "There is no tokenizer nowhere"),
    ],
)
def test_what_cannot_be_compared_is_told(words: tuple[str, ...], says: str, home: Path) -> None:
    (home / "empty.txt").touch()
    (home / "bad.tsv").write_text("form\tsegmentation\nevler\tev le\n", encoding="utf-8")
    files = {"TOK": "tok", "TEXT": "text.txt", "EMPTY": "empty.txt", "GOLD": "gold.tsv", "BAD": "bad.tsv"}
    pattern = re.compile("|".join(files))
    answer = typed("tokenizer", "compare", *(pattern.sub(lambda m: str(home / files[m[0]]), word) for word in words))
    assert (answer.code, answer.out) == (1, "")
    assert says in answer.err.replace("\n", " ")


def test_parity_is_the_tokens_of_the_same_sentences_over_those_of_the_first_language(home: Path) -> None:
    found = compare_tokenizers(home / "small.json", parallel=home / "same.tsv", languages=["tr", "kk", "ru"])
    assert found.texts == ()
    assert found.parallel is not None
    assert (found.parallel.sentences, found.parallel.left_out, found.parallel.is_whole) == (2, 2, True)
    # "üй" is six bytes, in NFC four.
    assert found.parallel.text_bytes == {"tr": 7, "kk": 11 + 10, "ru": 8}
    parity = found.tokenizers[0].parity or {}
    assert [parity[name].tokens for name in ("tr", "kk", "ru")] == [3, 7, 2]
    assert [parity[name].parity for name in ("tr", "kk", "ru")] == [1.0, 7 / 3, 2 / 3]
    assert [parity[name].bytes_per_token for name in ("tr", "kk", "ru")] == [7 / 3, 21 / 7, 4.0]
    assert [parity[name].exact for name in ("tr", "kk", "ru")] == [0.5, 0.0, 0.5]
    assert [said.text for said in found.notices] == [
        f"Left out: 2 of 4 rows of {home / 'same.tsv'}, where a language is empty (kk 2, ru 1).",
        "small.json gives back only a part of the sentences as they were (tr 50.0%, kk 0.0%, ru 50.0%): what is lost "
        "costs few tokens, so its parity says little there.",
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.parquet", "nested.jsonl"])
def test_sentences_are_read_from_every_format_with_columns(name: str, home: Path, tmp_path: Path) -> None:
    rows = [{"tr": "evler", "kk": "ev, ev"}, {"tr": None, "kk": "ev"}, {"tr": "ev", "kk": "ev"}]
    languages = ("tr", "kk")
    if name == "nested.jsonl":
        rows, languages = [{"translation": row} for row in rows], ("translation.tr", "translation.kk")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "a.csv":
        (tmp_path / name).write_text('kk;tr\n"ev, ev";evler\nev;\nev;ev\n', encoding="utf-8")
    elif name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    found = compare_tokenizers(home / "small.json", parallel=tmp_path / name, languages=languages)
    assert [figures.tokens for figures in (found.tokenizers[0].parity or {}).values()] == [3, 3]
    assert "(tr 1)" in found.notices[0].text.replace("translation.", "")


def test_the_screen_has_languages_side_by_side_in_80_columns(home: Path, tmp_path: Path) -> None:
    names = [f"l{letter}" for letter in "abcdefgh"]
    row = "\t".join(["evler evler ev"] * 8)
    (tmp_path / "eight.tsv").write_text("\t".join(names) + f"\n{row}\n" * 2, encoding="utf-8")
    words = ("tokenizer", "compare", home / "tok", home / "small.json", "--parallel", tmp_path / "eight.tsv")
    answer = typed(*words, "--languages", *names)
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert max(map(len, lines[:-1])) <= 80, "the last one is a command"
    assert [line.split() for line in lines if re.match(r" +l", line)] == [names[:6], names[6:]]
    assert [line.rstrip() for line in lines if re.match("[tpb]", line)][:3] == ["tokens", "parity", "bytes/token"]
    assert [line.split()[2:] for line in lines if "small" in line][:3] == [["10"] * 6, ["1.000"] * 6, ["2.80"] * 6]
    assert "MB/s" not in answer.out
    both = typed(*words[:4], "--text", f"lh={home / 'valid.txt'}", f"la={home / 'valid.txt'}", *words[4:])
    assert both.out.count("MB/s") == 3
    assert "parity: tokens over those of the same sentences in lh." in both.out


def test_sentences_are_read_up_to_a_size_and_rows_with_a_fault_as_text_is(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("tr\tkk\nev\tev\nev\nev\tevler\nev\tev\n", encoding="utf-8")
    words = ("tokenizer", "compare", home / "tok", "--parallel", tmp_path / "a.tsv", "--languages", "tr", "kk")
    answer = typed(*words)
    assert (answer.code, answer.out) == (1, "")
    assert "a.tsv:3 has 1 columns, and the header 2." in answer.err
    assert "--on-bad-row skip" in answer.err
    answer = typed(*words, "--on-bad-row", "skip", "--size", "7")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("a.tsv: 2 sentences in each language, cut there\n")
    assert "Skipped 1 of 3 rows" in answer.err
    assert "the first 7 B of a language are read; --size changes that." in answer.err


@pytest.mark.parametrize(
    "words, says",
    [
        ("--parallel SAME --languages tr az", "has no field 'az'. Fields there: id, tr, kk, ru. The sentences of each"),
        ("--parallel SAME --languages tr", "There is one language: tr. Parity compares the same sentences in at"),
        ("--parallel SAME --text TEXT", "There is one language: text."),
        ("--parallel SAME", "There is no language."),
        ("--parallel SAME --languages tr tr", "--languages names tr twice."),
        ("--parallel HEADER --languages tr kk", "header.tsv holds no sentences."),
        ("--parallel HALF --languages tr kk", "No row of half.tsv holds a sentence in each of tr, kk. Empty are kk 1."),
        ("--parallel TEXT --languages tr kk", "text.txt is no table."),
        ("--parallel nowhere.tsv --languages tr kk", "nowhere.tsv does not exist."),
        ("--text tr=TEXT --languages tr kk", "Name that file with --parallel FILE."),
        ("--parallel SAME --languages tr kk --gold GOLD", "There is no text. Tokenizers are measured on text."),
        ("", "Name some, as tr=valid.txt, or sentences with --parallel."),
    ],
)
def test_what_has_no_parity_is_told(words: str, says: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "header.tsv").write_text("tr\tkk\n", encoding="utf-8")
    (home / "half.tsv").write_text("tr\tkk\nev\t\n", encoding="utf-8")
    names = {"SAME": "same", "HEADER": "header", "HALF": "half", "GOLD": "gold"}
    for word, name in names.items():
        words = words.replace(word, f"{name}.tsv")
    answer = typed("tokenizer", "compare", "small.json", *words.replace("TEXT", "text.txt").split())
    assert (answer.code, answer.out) == (1, "")
    assert says in answer.err.replace("\n", " ")
    with pytest.raises(LowvramError, match="`languages`"):
        compare_tokenizers("small.json", parallel="same.tsv", languages="tr")  # type: ignore[arg-type]


def test_a_long_document_is_cut_at_a_line_and_names_are_as_short_as_they_can_be(home: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("bir iki\n" * 100, encoding="utf-8")
    found = compare_tokenizers(home / "tok", tmp_path / "long.txt", size=100)
    assert (found.texts[0].text_bytes, found.texts[0].lines, found.texts[0].is_whole) == (96, 12, False)
    with pytest.raises(LowvramError, match=r"`size` is 0"):
        compare_tokenizers(home / "tok", tmp_path / "long.txt", size=0)
    with pytest.raises(LowvramError, match="no language's name"):
        compare_tokenizers(home / "tok", {"t r": tmp_path / "long.txt"})
    with pytest.raises(LowvramError, match="There is no text"):
        compare_tokenizers(home / "tok", {})
    names = shorten([Path("a/x/tok"), Path("b/x/tok"), Path("b/y/tok"), Path("other")])
    assert names == ["a/x/tok", "b/x/tok", "y/tok", "other"]
    assert tokenizer_comparing.DEFAULT_SIZE == 20 << 20


def test_tokens_are_shown_with_bars_or_ids_and_control_characters_as_numbers(home: Path, tmp_path: Path) -> None:
    text = "Kış\x1b[31m\tev 𝕏\nson\u202e"
    show = ("tokenizer", "show", "--tokenizer", home / "tok")
    answer = typed(*show, text)
    assert answer.code == 0, answer.err
    assert not re.search("[\x1b\t\u202e]", answer.out)
    assert "\\u001b" in answer.out
    assert "\\t" in answer.out
    assert "\\xf0│\\x9d│\\x95│\\x8f" in answer.out, "a character that is cut"
    assert show_piece("\u202eson\r".encode()) == "\\u202eson\\r"
    assert answer.out.count("\n") == 2
    own = Tokenizer.load(home / "tok")
    ids = own.encode(text)
    assert answer.out.count("│") == len(ids) - 1
    assert [int(id) for id in re.findall(r"\[(\d+)\](?:│|\n|$)", typed(*show, "--ids", text).out)] == ids
    told = json.loads(typed(*show, "--json", "Kış", "evi").out)
    assert "".join(token["text"] for token in told["tokens"]) == "Kış evi"
    (tmp_path / "a.txt").write_text("Kış evi", encoding="utf-8")
    assert typed(*show, "--file", tmp_path / "a.txt").out == typed(*show, "Kış evi").out


def test_a_terminal_gets_colours_and_no_bars(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "out", Console(force_terminal=True, color_system="standard", width=60, soft_wrap=True))
    shown = typed("tokenizer", "show", "Kış evi", "--tokenizer", home / "tok").out
    assert "│" not in shown
    assert {"\x1b[30;106m", "\x1b[30;103m"} <= set(re.findall(r"\x1b\[[\d;]+m", shown))
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == "Kış evi\n"


def test_words_are_shown_as_stem_and_suffixes(home: Path) -> None:
    words = ("tokenizer", "show", "--morphology", "Evlerde 12 Ankara'da")
    shown = typed(*words, "--tokenizer", home / "tok")
    assert shown.code == 0, shown.err
    assert [line.split()[0] for line in shown.out.splitlines()] == ["Ev+ler+de", "Ankara+'da"]
    assert "ler (plural)  de (locative)" in shown.out
    learnt = typed(*words, "--tokenizer", "none", "--text", home / "train.txt", "--json")
    assert learnt.code == 0, learnt.err
    [first, second] = json.loads(learnt.out)["words"]
    assert "".join(part["text"] for part in first) == "Evlerde"
    assert second[-1] == {"text": "'da", "name": "locative", "kind": "case", "lemma": None}


def test_a_stem_is_shown_with_its_lemma_where_that_is_spelt_otherwise(tmp_path: Path) -> None:
    words = "git gitti gitmek gitsin gidiyor gidecek giden gider mi mı mu mü misiniz mısınız musunuz miyim muyum miydi"
    (tmp_path / "text.txt").write_text(f"{words}\n" * 2, encoding="utf-8")
    show = ("tokenizer", "show", "--morphology", "Gidiyor musunuz?", "--text", tmp_path / "text.txt")
    shown = typed(*show)
    assert shown.code == 0, shown.err
    assert shown.out.splitlines() == [
        "Gid+iyor  Gid (stem: git)  iyor (progressive)",
        "mu+sunuz  mu (question: mi)  sunuz (person 2pl)",
    ]
    [first, second] = json.loads(typed(*show, "--json").out)["words"]
    assert first[0] == {"text": "Gid", "name": "stem", "kind": "stem", "lemma": "git"}
    assert second[0] == {"text": "mu", "name": "question", "kind": "particle", "lemma": "mi"}


@pytest.mark.parametrize(
    "words, says",
    [
        ((), "There is no text"),
        (("Kış", "--file", "text.txt"), "There are a text and a file"),
        ((" ",), "The text is empty"),
        (("Kış", "--language", "tr"), "are about stems and suffixes"),
        (("Kış", "--morphology", "--ids"), "--ids are of tokens"),
        (("Kış", "--morphology", "--tokenizer", "small.json"), "no stems to split words with"),
        (("Kış", "--morphology", "--language", "kk"), "holds stems of 'tr', not of 'kk'"),
        (("Kış", "--morphology", "--language", "xx"), "xx"),
        (("Kış", "--tokenizer", "nowhere"), "There is no tokenizer nowhere"),
        (("Kış\ud800",), "half a character"),
    ],
)
def test_what_cannot_be_shown_is_told(
    words: tuple[str, ...], says: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    answer = typed("tokenizer", "show", *words)
    assert (answer.code, answer.out) == (1, "")
    assert says in answer.err.replace("\n", " ")
