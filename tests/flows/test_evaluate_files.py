"""`lowvram evaluate` with files: all measures in one command, the same from Python; faults in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowvram.api import LowvramError, evaluate
from tests.evaluate.scored import write
from tests.flows.typed import Output, fill_home, typed

GOLD = ("sent_id\tid\tform\tlemma\tupos\tfeats", "1\t1\tEvde\tev\tNOUN\tCase=Loc", "1\t2\t.\t.\tPUNCT\t_")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    assert typed("train", folder / "run.toml", "--device", "cpu").code == 0
    pairs = [{"good": f"Kuş {word}.", "bad": f"Kuşlar {word}mişti.", "phenomenon": "x"} for word in ("öttü", "uçtu")]
    write(folder / "pairs.jsonl", *map(json.dumps, [*pairs, {"good": "Aynı.", "bad": "Aynı.", "phenomenon": "x"}]))
    write(folder / "choices.jsonl", json.dumps({"question": "Ne?", "choices": ["çay", "su"], "answer": 0}))
    write(folder / "gold.tsv", *GOLD)
    return folder


def words_of(home: Path) -> tuple[object, ...]:
    files = {"text": "valid.txt", "pairs": "pairs.jsonl", "choices": "choices.jsonl", "suffixes": "gold.tsv"}
    named = [word for option, name in files.items() for word in (f"--{option}", home / name)]
    return ("evaluate", home / "run", *named, "--samples", 2, "--device", "cpu")


def evaluated(home: Path, *words: object) -> Output:
    answer = typed(*words_of(home), *words)
    assert answer.code == 0, answer.err
    return answer


def test_all_measures_are_one_table_each_and_the_next_command(home: Path) -> None:
    lines = evaluated(home).out.splitlines()
    assert lines[0] == f"{home / 'run/step-00000006'}, weights in fp32"
    heads = [line.split("  ")[0] for line in lines]
    assert [
        name for name in ("text", "minimal pairs, in %", "multiple choice, in %", "class") if name not in heads
    ] == []
    assert f"{home / 'pairs.jsonl'}; 1 pair of identical sentences left out." in lines
    assert any("chance lies within the interval" in line for line in lines)
    assert [line for line in lines if line.startswith("Kış …")] == ["Kış …"] * 2
    assert lines[-1].startswith("Next: lowvram chat ")
    assert max(map(len, lines)) < 400, "without a terminal no table is folded"


def test_json_and_python_say_the_same(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(evaluated(home, "--json").out)
    found = evaluate(
        home / "run",
        text=home / "valid.txt",
        pairs=[home / "pairs.jsonl"],
        choices=home / "choices.jsonl",
        suffixes=home / "gold.tsv",
        samples=2,
        device="cpu",
    )
    assert json.loads(json.dumps(found.as_dict())) == told
    assert list(told) == ["checkpoint", "step", "precision", "text", "pairs", "choices", "suffixes", "samples"]
    assert found.data is None
    assert found.measured.pairs[0].identical == 1
    shards = evaluate(home / "run", device="cpu")
    assert found.measured.text[0].bits_per_byte == shards.bits_per_byte, "the same text, packed"
    assert capsys.readouterr() == ("", "")


def test_shards_are_measured_too_where_they_are_named(home: Path) -> None:
    words = ("--data", home / "shards/valid", "--items", 1)
    told = json.loads(evaluated(home, *words, "--json").out)
    assert told["bits_per_byte"] == pytest.approx(told["text"][0]["bits_per_byte"])
    assert told["pairs"][0]["rows"][0]["count"] == 1
    shown = evaluated(home, *words).out
    assert "bigram model" in shown
    assert "minimal pairs" in shown


@pytest.mark.parametrize(
    "option, name, text, says",
    [
        ("pairs", "p.jsonl", '{"good": "Bir"}', r"p\.jsonl:1 is not of the form"),
        ("pairs", "same.jsonl", '{"good": "Bir", "bad": "Bir"}', "both sentences of each are the same"),
        ("choices", "c.jsonl", '{"question": "Ne?"}', r"c\.jsonl:1 is not of the form"),
        ("suffixes", "s.tsv", "form\tlemma\nev\tev", "missing: id, upos, feats"),
        ("text", "t.doc", "Bir", "unknown ending"),
    ],
    ids=["pairs", "identical pairs", "choices", "suffixes", "text"],
)
def test_a_file_of_another_form_is_told_and_nothing_is_printed(
    option: str, name: str, text: str, says: str, home: Path
) -> None:
    write(home / name, text)
    answer = typed("evaluate", home / "run", f"--{option}", home / name, "--device", "cpu")
    assert (answer.code, answer.out) == (1, "")
    with pytest.raises(LowvramError, match=says):
        evaluate(home / "run", device="cpu", **{option: home / name})
    assert answer.err.replace("\n", " ").count("Error:") == 1


def test_training_text_is_called_that_and_another_encoding_is_told(home: Path) -> None:
    for words in (("--data", home / "shards/train"), ("--text", home / "shards/train")):
        answer = typed("evaluate", home / "run", *words, "--device", "cpu")
        assert "shards/train is training text of this run" in answer.err.replace("\n", " ")
        assert "held-out" not in answer.err + answer.out
    (home / "old.txt").write_bytes(("Ağaç ışık şeker. " * 20).encode("cp1254"))
    (home / "wide.txt").write_bytes("Ağaç ışık şeker.".encode("utf-16"))
    answer = typed("evaluate", home / "run", "--text", home / "old.txt", home / "wide.txt", "--device", "cpu")
    assert f"Read as Windows-1254: {home / 'old.txt'}." in answer.err
    assert f"Read as UTF-16: {home / 'wide.txt'}." in answer.err


def test_samples_alone_say_whose_they_are(home: Path) -> None:
    lines = typed("evaluate", home / "run", "--samples", 1, "--device", "cpu").out.splitlines()
    assert lines[0] == f"{home / 'run/step-00000006'}, weights in fp32"


@pytest.mark.parametrize(
    ("words", "of"),
    [
        (("--items", 3), "--pairs, --choices, --suffixes and --harness"),
        (("--tokens", 100, "--samples", 1), "--data and --text"),
        (("--field", "body"), "--text"),
    ],
    ids=["items", "tokens", "field"],
)
def test_an_option_that_belongs_to_nothing_is_refused(words: tuple[object, ...], of: str, home: Path) -> None:
    answer = typed("evaluate", home / "run", *words, "--device", "cpu")
    assert answer.code == 1
    assert f"{words[0]} is given, and nothing that it belongs to. It is an option of {of}." in answer.err


@pytest.mark.parametrize("asked", [{"pairs": 3}, {"samples": 0}, {"items": -1}, {"text": []}, {"field": None}])
def test_arguments_that_cannot_be_meant_are_refused(asked: dict[str, object], home: Path) -> None:
    with pytest.raises(LowvramError, match=f"`{next(iter(asked))}`"):
        evaluate(home / "run", **asked)  # type: ignore[arg-type]
