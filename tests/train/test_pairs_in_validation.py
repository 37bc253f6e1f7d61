"""Minimal pairs with each validation: the share that evaluation finds, and no bit of the weights changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowvram.cli.progress import TrainingScreen
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.evaluate.minimal_pairs import LENGTH_CONTROLLED, Pair, answer_pairs, choose_light_subset, read_pairs
from lowvram.train.events import Evaluated, Stopped
from lowvram.train.log import scalars
from tests.conftest import TURKISH
from tests.evaluate.scored import finish, write
from tests.tiny import prepare_home, tiny_run, trainer_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    prepare_home(folder)
    pairs = [{"good": text, "bad": text.replace("l", "r", 1) + " değil"} for text in TURKISH]
    pairs += [{"good": f"{text} Evet.", "bad": text} for text in TURKISH]
    write(folder / "pairs.jsonl", *map(json.dumps, [*pairs, {"good": "Aynı.", "bad": "Aynı."}]))
    return folder


def with_pairs(home: Path, run: str, pairs: Path | None) -> object:
    config = tiny_run(home, run=run)
    return trainer_of(config.model_copy(update={"run": config.run.model_copy(update={"pairs": pairs})}))


def test_each_validation_tells_the_share_that_evaluation_finds(home: Path) -> None:
    from lowvram.evaluate.scorer import Scorer

    trainer = with_pairs(home, "asked", home / "pairs.jsonl")
    told = [event for event in trainer.run() if isinstance(event, Evaluated)]  # type: ignore[attr-defined]
    assert len(told) == 2
    tokenizer = Tokenizer.load(home / "tok")
    pairs = [pair for pair in read_pairs(home / "pairs.jsonl") if pair.good != pair.bad]
    scorer = Scorer(trainer.state.model, torch.float32, tokenizer, 32)  # type: ignore[attr-defined]
    by_sum = finish(answer_pairs(scorer, pairs)).by_sum
    assert told[-1].pairs_right == sum(by_sum) / len(pairs)
    assert 0 < told[-1].pairs_right < 1
    assert scalars(told[-1])["valid/pairs_right"] == told[-1].pairs_right


def test_pairs_change_no_bit_of_what_is_learnt(home: Path) -> None:
    weights = []
    for run, pairs in (("with", home / "pairs.jsonl"), ("without", None)):
        trainer = with_pairs(home, run, pairs)
        told = [event for event in trainer.run() if isinstance(event, Evaluated)]  # type: ignore[attr-defined]
        assert {event.pairs_right is None for event in told} == {pairs is None}
        assert "valid/pairs_right" in scalars(told[0]) or pairs is None
        weights.append([weight.detach().clone() for weight in trainer.state.model.parameters()])  # type: ignore[attr-defined]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("words", ["MPS backend out of memory", "shapes do not fit"])
def test_a_run_goes_on_where_memory_runs_out_in_the_pairs_alone(
    words: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> object:
        raise RuntimeError(words)

    trainer = with_pairs(home, f"full-{len(words)}", home / "pairs.jsonl")
    monkeypatch.setattr("lowvram.evaluate.likelihood._read_out", fail)
    if "memory" not in words:
        with pytest.raises(RuntimeError, match=words):
            list(trainer.run())  # type: ignore[attr-defined]
        return
    events = list(trainer.run())  # type: ignore[attr-defined]
    told = [event for event in events if isinstance(event, Evaluated)]
    assert len(told) == 2
    assert all(event.pairs_right is None and "Memory ran out" in event.pairs_problem for event in told)
    assert isinstance(events[-1], Stopped)
    assert events[-1].is_finished
    screen = TrainingScreen(trainer)  # type: ignore[arg-type]
    for event in told:
        screen.show(event)
    assert capsys.readouterr().err.count("Memory ran out") == 1


def test_a_file_of_no_pairs_is_told_before_the_first_step(home: Path) -> None:
    file = write(home / "none.jsonl", '{"good": "Aynı.", "bad": "Aynı."}')
    with pytest.raises(DataError, match=r"no pair whose sentences differ\. run\.pairs names it"):
        with_pairs(home, "none", file)
    with pytest.raises(DataError, match="does not exist"):
        with_pairs(home, "nowhere", home / "nowhere.jsonl")


def test_a_light_subset_is_of_what_length_does_not_give_away() -> None:
    pairs = [Pair("a", "b", name) for name in (*LENGTH_CONTROLLED, "passives") for _ in range(10)]
    found = choose_light_subset(pairs, 18)
    assert sorted(pair.phenomenon for pair in found) == sorted(name for name in LENGTH_CONTROLLED for _ in range(2))
    assert {pair.phenomenon for pair in choose_light_subset(pairs[10:], 90)} == {*LENGTH_CONTROLLED[1:], "passives"}
