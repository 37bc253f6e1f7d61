"""A run that diverges: what is saved, what is kept, what is said; and a sample that cannot be written ends nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.config.run import RunConfig
from lowvram.errors import TrainingError
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.divergence import MOST_SKIPPED, explain_broken_weights, explain_divergence, find_not_finite
from lowvram.train.events import Event, Sampled, Saved, Started, StepDone, Stopped
from lowvram.train.trainer import Trainer
from tests.tiny import prepare_home, tensors_of, tiny_run, trainer_of, unequal


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def run_of(home: Path, name: str, steps: int = 90, **options: Any) -> RunConfig:
    """Return a run that saves after every step, unless it must not."""
    what = tiny_run(home, run=name, tokens=steps * 256)
    options = {"save_every_minutes": 1e-9, "validate_every": 1000, "prompts": ()} | options
    return what.model_copy(update={"run": what.run.model_copy(update=options)})


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[range], None]:
    """Return what makes the losses of some steps (counted from 0) NaN."""

    def make(steps: range) -> None:
        def bad_loss(model: Any, batch: Batch, **settings: Any) -> Loss:
            loss = causal_loss(model, batch, **settings)
            return loss._replace(total=loss.total * (math.nan if int(batch.sample_B[0]) // 8 in steps else 1.0))

        monkeypatch.setattr("lowvram.train.step.causal_loss", bad_loss)

    return make


def steps_of(events: list[Event], kind: type) -> list[int]:
    return [event.step for event in events if isinstance(event, kind)]


def steps_kept(what: RunConfig) -> list[int]:
    return sorted(int(path.name[5:]) for path in what.run.dir.glob("step-*"))


def follow(trainer: Trainer, events: list[Event], stop_at: int | None = None) -> None:
    """Run a trainer to its end, noting its events."""
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == stop_at:
            trainer.stop()


def test_nothing_is_saved_while_steps_are_skipped_and_every_skipped_step_is_told(home: Path, poison: Any) -> None:
    poison(range(3, 99))
    what, events = run_of(home, "lost", keep=2), list[Event]()
    message = r"25 steps in a row .* step 28\. The checkpoint of step 3 is from before that, unless .* \(now 0\.001\)"
    with pytest.raises(TrainingError, match=message):
        follow(trainer_of(what), events)
    assert MOST_SKIPPED == 25
    assert sum(event.is_skipped for event in events if isinstance(event, StepDone)) == 25
    assert steps_of(events, Saved) == [1, 2, 3]
    assert steps_kept(what) == [2, 3]


def test_a_run_that_recovers_saves_again(home: Path, poison: Any) -> None:
    poison(range(2, 4))
    what, events = run_of(home, "recovers", steps=6, keep=9), list[Event]()
    follow(trainer_of(what), events)
    assert steps_of(events, Saved) == [1, 2, 5, 6]


def test_a_stop_among_skipped_steps_is_saved_beside_the_checkpoint_from_before_them(home: Path, poison: Any) -> None:
    poison(range(3, 99))
    what, events = run_of(home, "stopped", keep=1), list[Event]()
    trainer = trainer_of(what)
    follow(trainer, events, stop_at=5)
    assert events[-1] == Stopped(5, is_finished=False)
    assert steps_kept(what) == [3, 5], "keep = 1, and the one from before that"
    assert find_checkpoint(what.run.dir)[0].numbers()["skipped_in_row"] == 2
    again = trainer_of(what)
    follow(again, events, stop_at=7)
    assert steps_kept(what) == [3, 7]
    # What is learnt afterwards needs no protection any more.
    poison(range(0))
    healed = trainer_of(what)
    follow(healed, events, stop_at=8)
    assert steps_kept(what) == [8]
    assert unequal(tensors_of(healed), tensors_of(trainer)) != []


def test_a_resume_among_skipped_steps_names_the_checkpoint_from_before_them(home: Path, poison: Any) -> None:
    poison(range(3, 99))
    what, events = run_of(home, "again", keep=1), list[Event]()
    follow(trainer_of(what), events, stop_at=5)
    with pytest.raises(TrainingError, match=r"step 28\. The checkpoint of step 3 is from before that"):
        follow(trainer_of(what), events)
    assert steps_kept(what) == [3, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", ["a weight", "a state"])
def test_a_state_that_is_not_finite_is_never_saved(home: Path, value: float, place: str) -> None:
    what = run_of(home, f"broken-{value}-{place}", keep=1)
    trainer, events = trainer_of(what), list[Event]()

    def break_at_step_3() -> None:
        for event in trainer.run():
            events.append(event)
            if isinstance(event, StepDone) and event.step == 3:
                weight = trainer.state.model.norm.weight
                broken = weight if place == "a weight" else trainer.state.optimizer.state[weight]["exp_avg"]
                broken.detach()[3] = value

    with pytest.raises(TrainingError, match=r"norm\.weight holds numbers that are not finite after step 3, so") as e:
        break_at_step_3()
    assert "The checkpoint of step 2 is the newest that can be used." in str(e.value)
    assert (steps_of(events, Saved), steps_kept(what)) == ([1, 2], [2])
    assert next(iter(trainer_of(what).run())).step == 2


def test_a_sample_of_broken_numbers_is_told_and_training_goes_on(home: Path) -> None:
    what = run_of(home, "sample", steps=6, prompts=("Kış", "Su"), sample_every=2, save_every_minutes=1000.0)
    trainer, events = trainer_of(what), list[Event]()
    weight = trainer.state.model.norm.weight
    for event in trainer.run():
        events.append(event)
        with torch.no_grad():
            if isinstance(event, StepDone) and event.step == 4:
                whole = weight.clone()
                weight.fill_(math.nan)
            elif isinstance(event, Sampled) and event.step == 4 and event.prompt == "Su":
                weight.copy_(whole)
    samples = [event for event in events if isinstance(event, Sampled)]
    assert [(event.step, event.prompt) for event in samples] == [(s, p) for s in (2, 4, 6) for p in ("Kış", "Su")]
    assert [event.problem for event in samples] == ["", "", *["The model's greatest logit is nan."] * 2, "", ""]
    assert [event.text for event in samples][2:4] == ["", ""]
    assert events[-1] == Stopped(6, is_finished=True)
    assert not any(event.is_skipped for event in events if isinstance(event, StepDone))
    assert isinstance(events[0], Started)


def test_the_first_tensor_that_is_not_finite_is_named_and_great_numbers_are_finite() -> None:
    fine = {
        "greatest": torch.tensor([3.4e38, -3.4e38]),
        "bf16": torch.tensor([[3.3e38, 1e-40]], dtype=torch.bfloat16),
        "fp16": torch.tensor([65504.0], dtype=torch.float16),
        "codes": torch.tensor([255], dtype=torch.uint8),
        "empty": torch.ones(0, 4),
        "scalar": torch.tensor(2.0),
    }
    assert find_not_finite(fine) is None
    assert find_not_finite({}) is None
    for value in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensor = torch.zeros(3, 5, dtype=dtype)
            tensor[1, 2] = value
            assert find_not_finite({**fine, "broken": tensor, "later": tensor}) == "broken"
    both = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert find_not_finite({"both": both}) == "both"


def test_where_nothing_was_saved_before_no_checkpoint_is_promised() -> None:
    for error in (explain_divergence(25, 25, None, 0.1), explain_broken_weights("norm.weight", 3, None, 0.1)):
        assert "There is no checkpoint from before that. Lower optimizer.lr (now 0.1)" in str(error)
