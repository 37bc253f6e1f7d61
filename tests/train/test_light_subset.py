"""What each validation asks: the figures that evaluation finds, bounded work, no bit of the weights changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.cli.progress import TrainingScreen
from lowvram.config.run import RunOptions
from lowvram.config.run_file import from_portable, to_portable
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.evaluate.minimal_pairs import LENGTH_CONTROLLED, Pair, answer_pairs, choose_light_subset, read_pairs
from lowvram.evaluate.multiple_choice import choose, read_items
from lowvram.evaluate.scorer import Scorer
from lowvram.evaluate.suffix_loss import measure_suffixes, read_sentences
from lowvram.finish import finish
from lowvram.train.events import Evaluated, Stopped
from lowvram.train.light_subset import MOST_BYTES, PAIRS, QUESTIONS, SENTENCES, measure_light_subset, read_light_subset
from lowvram.train.log import scalars
from lowvram.train.trainer import Trainer
from tests.conftest import TURKISH
from tests.evaluate.scored import scorer_of, write
from tests.tiny import prepare_home, tiny_run, trainer_of

GOLD = (
    "1\tEvde\tev\tNOUN\t_\tCase=Loc|Number=Sing|Person=3\t_\t_\t_\t_",
    "2\tokudum\toku\tVERB\t_\tNumber=Sing|Person=1|Polarity=Pos|Tense=Past\t_\t_\t_\t_",
    "",
)
LONG = json.dumps({"context": "a" * MOST_BYTES, "choices": ["b", "c"], "answer": 0})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    prepare_home(folder)
    pairs = [{"good": text, "bad": text.replace("l", "r", 1) + " değil"} for text in TURKISH]
    pairs += [{"good": f"{text} Evet.", "bad": text} for text in TURKISH]
    write(folder / "pairs.jsonl", *map(json.dumps, [*pairs, {"good": "Aynı.", "bad": "Aynı."}]))
    write(folder / "gold.conllu", *GOLD, *GOLD)
    items = [
        {"context": text, "choices": ["evet", "hayır", "belki"], "answer": n % 3} for n, text in enumerate(TURKISH)
    ]
    write(folder / "choices.jsonl", *map(json.dumps, items))
    return folder


def files_of(home: Path) -> dict[str, Path]:
    return {"pairs": home / "pairs.jsonl", "suffixes": home / "gold.conllu", "choices": home / "choices.jsonl"}


def with_files(home: Path, run: str, **files: Path) -> Trainer:
    config = tiny_run(home, run=run)
    return trainer_of(config.model_copy(update={"run": config.run.model_copy(update=files)}))


def test_each_validation_tells_what_evaluation_finds(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = with_files(home, "asked", **files_of(home))
    told = [event for event in trainer.run() if isinstance(event, Evaluated)]
    assert len(told) == 2
    scorer = Scorer(trainer.state.model, torch.float32, Tokenizer.load(home / "tok"), 32)
    pairs = [pair for pair in read_pairs(home / "pairs.jsonl") if pair.good != pair.bad]
    suffixes = finish(measure_suffixes(scorer, home, read_sentences(home / "gold.conllu")))
    choices = finish(choose(scorer, home, *read_items(home / "choices.jsonl")))
    event = told[-1]
    assert 0 < sum(finish(answer_pairs(scorer, pairs)).by_sum) / len(pairs) == event.pairs_right < 1
    assert event.suffix_bits == {row.name: row.bits_per_byte for row in suffixes.rows if row.count}
    assert set(event.suffix_bits) == {"stem", "case", "person", "tense, aspect, mood"}
    assert 0 < choices.per_byte == event.choices_right < 1
    charts = scalars(event)
    assert (charts["valid/pairs_right"], charts["valid/choices_right"]) == (event.pairs_right, event.choices_right)
    assert charts["valid/suffix_bits/case"] == event.suffix_bits["case"]
    TrainingScreen(trainer).show(event)
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{event.pairs_right:.1%} of the minimal pairs right, {event.choices_right:.1%} of the questions" in shown
    assert f"bits/byte of stem {event.suffix_bits['stem']:.2f}, case {event.suffix_bits['case']:.2f}, tense" in shown


def test_the_light_subset_changes_no_bit_of_what_is_learnt_and_is_the_same_after_a_resume(home: Path) -> None:
    weights, figures = [], []
    for run, files in (("with", files_of(home)), ("without", {}), ("stopped", files_of(home))):
        told = []
        trainer = with_files(home, run, **files)
        for event in trainer.run():
            told.append(event)
            if run == "stopped" and isinstance(event, Evaluated):
                trainer.stop()
        if run == "stopped":
            trainer = with_files(home, run, **files)
            told += list(trainer.run())
        looks = [event for event in told if isinstance(event, Evaluated)]
        assert {event.pairs_right is None for event in looks} == {not files}
        figures.append([(event.pairs_right, event.suffix_bits, event.choices_right) for event in looks])
        weights.append([weight.detach().clone() for weight in trainer.state.model.parameters()])
    for others in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))
    assert figures[0] == figures[2]
    assert figures[0][0] != figures[0][1]


@pytest.mark.parametrize("words", ["MPS backend out of memory", "shapes do not fit"])
def test_a_run_goes_on_where_memory_runs_out_in_the_light_subset_alone(
    words: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> object:
        raise RuntimeError(words)

    trainer = with_files(home, f"full-{len(words)}", **files_of(home))
    monkeypatch.setattr("lowvram.evaluate.likelihood._read_out", fail)
    if "memory" not in words:
        with pytest.raises(RuntimeError, match=words):
            list(trainer.run())
        return
    events = list(trainer.run())
    told = [event for event in events if isinstance(event, Evaluated)]
    assert len(told) == 2
    assert all((event.pairs_right, event.suffix_bits, event.choices_right) == (None,) * 3 for event in told)
    assert isinstance(events[-1], Stopped)
    assert events[-1].is_finished
    screen = TrainingScreen(trainer)
    for event in told:
        screen.show(event)
    shown = capsys.readouterr().err
    shown = " ".join(shown.split())
    assert shown.count("Memory ran out") == 3
    assert all(shown.count(f"while the {what} were") == 1 for what in ("minimal pairs", "suffixes", "questions"))


@pytest.mark.parametrize(
    ("key", "name", "line", "words"),
    [
        ("pairs", "none.jsonl", '{"good": "Aynı.", "bad": "Aynı."}', r"no pair whose sentences differ\. run\.pairs"),
        ("pairs", "nowhere.jsonl", None, "does not exist"),
        ("suffixes", "gold.tsv", "id\tform\n1\tEvde", "missing: lemma, upos, feats"),
        ("choices", "choices.jsonl", '{"question": "Kim?"}', "questions have one of"),
        ("choices", "long.jsonl", LONG, "run.choices names it"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_told_before_the_first_step(
    key: str, name: str, line: str | None, words: str, home: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    if line is not None:
        write(file, line)
    with pytest.raises(DataError, match=words):
        with_files(home, "refused", **{key: file})


def test_the_work_of_a_light_subset_is_bounded_whatever_the_files_hold(
    tmp_path: Path, small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: dict[str, int] = {}

    def count(self: Scorer, requests: Any) -> Any:
        scored[key] = sum(len(request.context) + len(request.continuation) - 1 for request in requests)
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(Scorer, "score", count)
    long = "Kuşlar öttü. " * 40
    asked = {"good": long, "bad": long.upper(), "context": long, "choices": [long] * 4, "answer": 1}
    files = {
        "pairs": write(tmp_path / "p.jsonl", *[json.dumps(asked)] * 300),
        "suffixes": write(tmp_path / "gold.conllu", *(GOLD[:2] * 50 + GOLD[2:]) * 100),
        "choices": write(tmp_path / "c.jsonl", *[json.dumps(asked)] * 100),
    }
    for key, file in files.items():
        run = RunOptions.model_validate({"dir": tmp_path, key: file})
        assert read_light_subset(run) == read_light_subset(run)
        measure_light_subset(run, scorer_of(small_tokenizer))
        # Each token has a byte at least; here, as in most text, some.
        assert 0 < scored[key] <= MOST_BYTES
    assert len(read_light_subset(RunOptions.model_validate({"dir": tmp_path} | files)).pairs) < PAIRS
    short = [
        json.dumps({"good": f"{n}", "bad": f"-{n}", "context": f"{n}", "choices": ["a", "b"], "answer": 0})
        for n in range(400)
    ]
    gold = write(tmp_path / "short.conllu", *GOLD * 600)
    file = write(tmp_path / "short.jsonl", *short)
    few = read_light_subset(RunOptions(dir=tmp_path, pairs=file, suffixes=gold, choices=file))
    assert [len(each) for each in few] == [PAIRS, SENTENCES, QUESTIONS]
    assert few.pairs[-1].good == "398", "they are spread over the whole file"


def test_the_files_are_named_relative_to_the_run_file(home: Path) -> None:
    config = tiny_run(home)
    config = config.model_copy(update={"run": config.run.model_copy(update=files_of(home))})
    moved = from_portable(to_portable(config, home / "run"), home / "elsewhere/run")
    assert {key: getattr(moved.run, key) for key in files_of(home)} == files_of(home / "elsewhere")


def test_a_light_subset_is_of_what_length_does_not_give_away() -> None:
    pairs = [Pair("a", "b", name) for name in (*LENGTH_CONTROLLED, "passives") for _ in range(10)]
    found = choose_light_subset(pairs, 18)
    assert sorted(pair.phenomenon for pair in found) == sorted(name for name in LENGTH_CONTROLLED for _ in range(2))
    assert {pair.phenomenon for pair in choose_light_subset(pairs[10:], 90)} == {*LENGTH_CONTROLLED[1:], "passives"}
