"""What must be true before a run begins or goes on: a free directory, the same question, a plan, first weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.config.architecture import Window, Yarn
from lowvram.config.plan import Plan, choose_plan
from lowvram.config.run import Corpus, RunConfig
from lowvram.config.train import TrainConfig
from lowvram.data.shards import pack
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import BusyError, CheckpointError, ConfigError
from lowvram.model.transformer import Transformer
from lowvram.storage.checkpoint import Checkpoint, find_checkpoint
from lowvram.train.events import Started, StepDone
from lowvram.train.prepare import prepare
from lowvram.train.schedule import learning_rate
from lowvram.train.settings import RunSettings
from lowvram.train.start import keep_plan, lock_run, refuse_changes, resolve_plan
from lowvram.train.state import load_weights
from lowvram.train.trainer import Trainer
from tests.tiny import prepare_home, tiny_run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    list(trainer_of(tiny_run(place, run="done")).run())
    return place


@pytest.fixture
def done(home: Path) -> Checkpoint:
    return find_checkpoint(home / "done")[0]


def trainer_of(what: RunConfig) -> Trainer:
    return prepare(RunSettings(what, choose_plan(what.train, 8)[0], torch.device("cpu")))


def changed(what: RunConfig, section: str, **values: Any) -> RunConfig:
    return what.model_copy(update={section: getattr(what, section).model_copy(update=values)})


def test_a_locked_run_names_its_owner_and_is_free_again_afterwards(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with lock_run(run):
        with pytest.raises(BusyError, match=rf"training in {run}\. Its process id is {os.getpid()}\."):
            lock_run(run).__enter__()
        assert (run / "owner").read_text() == f"{os.getpid()}\n", "the one who was refused must not take the sign down"
    assert not (run / "owner").exists()
    with lock_run(run):
        pass


def test_a_lock_is_freed_by_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock_run(tmp_path):
        raise ZeroDivisionError
    with lock_run(tmp_path):
        pass


def test_a_changed_recipe_is_refused_with_both_values(home: Path, done: Checkpoint) -> None:
    what = tiny_run(home, run="done", optimizer={"name": "adamw", "lr": 0.25}, seed=9)
    message = r"optimizer\.lr was 0\.001 and is now 0\.25; .*train\.seed was 0 and is now 9.*choose a new run\.dir"
    with pytest.raises(ConfigError, match=message):
        refuse_changes(what, {}, done)


@pytest.mark.parametrize(
    "section, values",
    [
        ("train", {"tokens": 99 * 256}),
        ("run", {"keep": 7, "validate_every": 1, "prompts": ()}),
        ("data", {"valid": None}),
        ("data", {"tokenizer": Path("/elsewhere/tok")}),
        ("data", {"train": (Corpus(path=Path("/elsewhere/shards")),)}),
    ],
    ids=["tokens", "what is kept and told", "validation", "moved tokenizer", "moved shards"],
)
def test_what_leaves_the_question_alone_may_change(
    home: Path, done: Checkpoint, section: str, values: dict[str, Any]
) -> None:
    refuse_changes(changed(tiny_run(home, run="done"), section, **values), done.manifest["hashes"], done)


@pytest.mark.parametrize("name", ["training data", "tokenizer"])
def test_other_contents_are_refused_by_name(home: Path, done: Checkpoint, name: str) -> None:
    hashes = done.manifest["hashes"] | {name: "0" * 64}
    with pytest.raises(ConfigError, match=f"the {name} has other contents"):
        refuse_changes(tiny_run(home, run="done"), hashes, done)


def test_other_weights_of_the_corpora_are_refused(home: Path, done: Checkpoint) -> None:
    corpora = (Corpus(path=home / "shards/train", weight=2.0),)
    with pytest.raises(ConfigError, match=r"data\.train were \[1\.0\] and are now \[2\.0\]"):
        refuse_changes(changed(tiny_run(home, run="done"), "data", train=corpora), {}, done)


def test_shards_of_other_text_stop_a_resume_and_harm_nothing(home: Path, done: Checkpoint) -> None:
    tokenizer = Tokenizer.load(home / "tok")
    pack([home / "valid.txt"], tokenizer, home / "shards/other", processes=1)
    what = changed(tiny_run(home, run="done"), "data", train=(Corpus(path=home / "shards/other"),))
    with pytest.raises(ConfigError, match="the training data has other contents"):
        list(trainer_of(what).run())
    assert find_checkpoint(home / "done")[0].manifest == done.manifest


def test_a_run_starts_from_another_runs_weights_with_a_fresh_optimizer_and_schedule(
    home: Path, done: Checkpoint
) -> None:
    what = tiny_run(home, run="next", start_from=home / "done", optimizer={"name": "adamw", "lr": 0.5})
    trainer = trainer_of(what)
    events = trainer.run()
    assert next(events) == Started(0, 6, None, (), done.directory)
    weights = trainer.state.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in done.weights().items())
    assert trainer.state.tensors()[1] == {}
    assert (trainer.state.step, trainer.state.tokens) == (0, 0)
    first = next(events)
    assert isinstance(first, StepDone)
    assert first.learning_rate == learning_rate(what.train, 0) == 0.5


def test_a_resumed_run_no_longer_needs_what_it_started_from(home: Path) -> None:
    what = tiny_run(home, run="begun", start_from=home / "done")
    trainer = trainer_of(what)
    trainer.stop()
    list(trainer.run())
    (home / "done").rename(home / "gone")
    try:
        steps = [event.step for event in trainer_of(what).run() if isinstance(event, StepDone)]
    finally:
        (home / "gone").rename(home / "done")
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_cannot_start_from_another_model(home: Path) -> None:
    what = tiny_run(home, "gqa-alibi", "other", start_from=home / "done")
    what = changed(what, "model", dim=48)
    with pytest.raises(ConfigError, match=r"is another model: model\.dim was 32 and is now 48; .*was 'rope'"):
        list(trainer_of(what).run())
    assert list((home / "other").glob("step-*")) == []


def test_equal_shapes_with_another_meaning_are_another_model(home: Path) -> None:
    what = tiny_run(home, run="heads", start_from=home / "done")
    heads = what.model.attention.model_copy(update={"heads": 2, "kv_heads": 1, "head_dim": 16})
    with pytest.raises(ConfigError, match=r"model\.attention\.heads was 4 and is now 2"):
        list(trainer_of(changed(what, "model", attention=heads)).run())


def test_a_stage_may_stretch_positions_and_slide_windows(home: Path) -> None:
    what = tiny_run(home, run="stretched", start_from=home / "done")
    positions = what.model.positions.model_copy(update={"yarn": Yarn(factor=2.0, original_len=32)})
    trainer = trainer_of(changed(what, "model", positions=positions, window=Window(size=8)))
    assert next(trainer.run()).began_from == home / "done" / "step-00000006"


def test_another_tokenizer_of_the_same_size_is_no_beginning(home: Path) -> None:
    trainer = trainer_of(tiny_run(home, run="tokens", start_from=home / "done"))
    trainer.hashes = trainer.hashes | {"tokenizer": "0" * 64}
    with pytest.raises(ConfigError, match="its tokenizer is another one"):
        next(trainer.run())


def test_weights_of_other_names_or_shapes_are_refused(home: Path, done: Checkpoint) -> None:
    model = Transformer(tiny_run(home, "gqa-alibi").model.model_copy(update={"dim": 48}))
    with pytest.raises(CheckpointError, match=r"holds another model .*\d+ tensors differ .* first is blocks\.0"):
        load_weights(model, done)


def test_a_refused_start_leaves_the_plan_alone(home: Path) -> None:
    from lowvram.cli.train import train

    what = changed(tiny_run(home, run="planned"), "train", tokens=512)
    train(what, micro_batch=2, device="cpu")
    with pytest.raises(ConfigError, match="batch_tokens"):
        train(changed(what, "train", batch_tokens=512), device="cpu")
    assert resolve_plan(what.run.dir, what.train)[0].micro_batch == 2


def test_a_run_cannot_start_from_nothing(home: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no directory"):
        list(trainer_of(tiny_run(home, run="none", start_from=home / "nowhere")).run())


def test_a_corrupt_origin_is_named_and_the_one_before_it_is_taken(home: Path) -> None:
    what = changed(tiny_run(home, run="origin"), "run", save_every_minutes=1e-9, prompts=())
    list(trainer_of(what).run())
    with open(home / "origin/step-00000006/weights.safetensors", "ab") as file:
        file.write(b"x")
    started = next(iter(trainer_of(tiny_run(home, run="heir", start_from=home / "origin")).run()))
    assert isinstance(started, Started)
    assert "step-00000006" in str(started.passed_over[0])
    assert started.resumed_from is None


RECIPE = TrainConfig(tokens=10**6, seq_len=512, batch_tokens=512 * 24)


@pytest.mark.parametrize(
    "seq_len, samples, micro, accumulate",
    [(512, 24, 8, 3), (512, 7, 7, 1), (512, 13, 1, 13), (4096, 6, 1, 6), (8192, 3, 1, 3), (32, 96, 96, 1)],
)
def test_a_plan_takes_the_most_sequences_that_fit_and_divide_the_step(
    seq_len: int, samples: int, micro: int, accumulate: int
) -> None:
    plan, reason = choose_plan(TrainConfig(tokens=10**6, seq_len=seq_len, batch_tokens=seq_len * samples))
    assert (plan.micro_batch, plan.accumulate) == (micro, accumulate)
    assert reason == f"the most sequences of {seq_len} within 4096 tokens that divide the step's {samples}"


def test_a_plan_does_as_it_is_asked() -> None:
    assert choose_plan(RECIPE, 6) == (Plan(micro_batch=6, accumulate=4), "you asked for it")


@pytest.mark.parametrize("asked", [0, -3, 5, 48])
def test_a_micro_batch_that_does_not_divide_the_step_is_answered_with_those_that_do(asked: int) -> None:
    with pytest.raises(ConfigError, match=rf"is {asked}\. A step has 24 .*Possible: 1, 2, 3, 4, 6, 8, 12, 24\."):
        choose_plan(RECIPE, asked)


def test_a_run_keeps_its_plan_until_another_is_asked_for(tmp_path: Path) -> None:
    four = Plan(micro_batch=4, accumulate=6)
    assert resolve_plan(tmp_path, RECIPE, 4) == (four, "you asked for it", False)
    assert not resolve_plan(tmp_path, RECIPE).is_kept, "nothing is kept before the run begins"
    keep_plan(tmp_path, four)
    assert resolve_plan(tmp_path, RECIPE) == (four, "this run's plan so far", True)
    assert resolve_plan(tmp_path, RECIPE, 12)[0].micro_batch == 12
    assert resolve_plan(tmp_path, RECIPE)[0].micro_batch == 4


def test_what_is_not_asked_for_stays_as_it_was(tmp_path: Path) -> None:
    kept = Plan(micro_batch=4, accumulate=6, recompute="attention", loss_chunk=700, compile=True)
    keep_plan(tmp_path, kept)
    assert resolve_plan(tmp_path, RECIPE, 8).plan == kept.model_copy(update={"micro_batch": 8, "accumulate": 3})
    assert resolve_plan(tmp_path, RECIPE, recompute="block").plan == kept.model_copy(update={"recompute": "block"})
    assert resolve_plan(tmp_path, RECIPE, recompute="none").plan == kept.model_copy(update={"recompute": "none"})
    assert resolve_plan(tmp_path, RECIPE, compiled=False).plan == kept.model_copy(update={"compile": False})


def test_a_new_run_is_planned_by_whom_it_is_told_around_what_was_asked_for(tmp_path: Path) -> None:
    fitted = Plan(micro_batch=2, accumulate=12, recompute="block"), "the fastest that fits"
    asked: list[tuple[int | None, str | None]] = []

    def choose(micro_batch: int | None, recompute: Any) -> tuple[Plan, str]:
        asked.append((micro_batch, recompute))
        return fitted

    assert resolve_plan(tmp_path, RECIPE, choose=choose) == (*fitted, False)
    compiled = fitted[0].model_copy(update={"compile": True})
    assert resolve_plan(tmp_path, RECIPE, compiled=True, choose=choose).plan == compiled
    again = fitted[0].model_copy(update={"recompute": "attention"})
    assert resolve_plan(tmp_path, RECIPE, recompute="attention", choose=choose).plan == again
    six = fitted[0].model_copy(update={"micro_batch": 6, "accumulate": 4})
    assert resolve_plan(tmp_path, RECIPE, 6, choose=choose).plan == six
    assert asked == [(None, None), (None, None), (None, "attention"), (6, None)]
    keep_plan(tmp_path, again)
    assert resolve_plan(tmp_path, RECIPE, choose=choose).plan == again
    assert len(asked) == 4, "a run that has a plan needs no other"
    with pytest.raises(ConfigError, match="`micro_batch` is 7"):
        resolve_plan(tmp_path / "new", RECIPE, 7, choose=choose)


@pytest.mark.parametrize("numbers", [{}, {"plan": {"micro_batch": 8, "mood": "good"}}], ids=["older", "newer"])
def test_a_checkpoint_of_another_version_names_no_plan(
    home: Path, monkeypatch: pytest.MonkeyPatch, numbers: dict[str, Any]
) -> None:
    what = tiny_run(home, run="done")
    assert resolve_plan(what.run.dir, what.train).is_kept
    monkeypatch.setattr(Checkpoint, "numbers", lambda _: numbers)
    assert not resolve_plan(what.run.dir, what.train).is_kept


def test_a_plan_that_no_longer_makes_up_the_step_is_chosen_anew(tmp_path: Path) -> None:
    keep_plan(tmp_path, Plan(micro_batch=12, accumulate=2))
    larger = RECIPE.model_copy(update={"batch_tokens": 512 * 32})
    assert resolve_plan(tmp_path, larger)[0] == Plan(micro_batch=8, accumulate=4)


def test_a_wrong_micro_batch_leaves_the_plan_as_it_was(tmp_path: Path) -> None:
    keep_plan(tmp_path, Plan(micro_batch=4, accumulate=6))
    with pytest.raises(ConfigError):
        resolve_plan(tmp_path, RECIPE, 5)
    assert resolve_plan(tmp_path, RECIPE)[0].micro_batch == 4


@pytest.mark.parametrize("text", ["", "{", '{"micro_batch": 4}', "[]", '{"a":' * 9_999], ids=lambda text: text[:9])
def test_a_plan_that_cannot_be_read_is_the_last_checkpoints_or_chosen_anew(
    home: Path, tmp_path: Path, text: str
) -> None:
    what = tiny_run(home, run="done")
    shutil.copytree(home / "done", tmp_path / "run")
    for directory, kept, says in (
        (
            tmp_path / "run",
            True,
            "this run's plan so far; plan.json cannot be read, so it is that of the last checkpoint",
        ),
        (tmp_path, False, "; plan.json cannot be read, so it is chosen anew"),
    ):
        (directory / "plan.json").write_text(text, encoding="utf-8")
        found = resolve_plan(directory, what.train)
        assert found.is_kept == kept
        assert found.reason.endswith(says)
        assert found.plan.micro_batch * found.plan.accumulate == 8
