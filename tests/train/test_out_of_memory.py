"""A step that runs out of memory is made again with half the micro-batch, and nothing tells the two apart."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.errors import TrainingError
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.events import Event, Halved, Saved, StepDone
from lowvram.train.start import resolve_plan
from tests.tiny import prepare_home, tensors_of, tiny_run, trainer_of, unequal

NO_MEMORY = torch.OutOfMemoryError


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def run_of(home: Path, name: str, tokens: int = 6 * 256, **run: Any) -> RunConfig:
    """A mixture of experts with dropout: loads, balancing biases and masks could all betray a failed try."""
    what = tiny_run(home, "mla-moe", name, dropout=0.1, tokens=tokens)
    return what.model_copy(update={"run": what.run.model_copy(update={"prompts": (), **run})})


def fail_at(monkeypatch: pytest.MonkeyPatch, place: str, is_hit: Callable[[Batch], bool], times: int = 1) -> list[Any]:
    """Run out of memory in the first `times` micro-batches that are hit; returns weak references to what they held."""
    held: list[weakref.ref[Any]] = []
    failures = 0

    def loss_of(model: Any, batch: Batch, **options: Any) -> Loss:
        nonlocal failures
        assert [ref for ref in held if ref() is not None] == [], "the failed try's tensors are still alive"
        if batch.sample_B.is_meta or failures == times or not is_hit(batch):  # a rehearsal has all the memory it wants
            return causal_loss(model, batch, **options)
        failures += 1
        watch = [block.register_forward_hook(lambda _, __, out: hold(out[0])) for block in model.blocks]
        found = causal_loss(model, batch, **options)
        for handle in watch:
            handle.remove()
        for tensor in (batch.token_BT, found.total, found.loads):
            hold(tensor)
        if place == "forward":
            raise NO_MEMORY("CUDA out of memory. Tried to allocate 2.00 GiB")
        # Of all weights' gradients the head's norm's comes first, and the first layer's norm's last.
        weight = model.norm.weight if place == "early backward" else model.blocks[0].attention.norm.weight
        hook = weight.register_hook(lambda _: fail())

        def fail() -> None:
            hook.remove()
            assert place == "early backward" or model.blocks[1].ffn.router.weight.grad is not None
            raise NO_MEMORY("CUDA out of memory. Tried to allocate 2.00 GiB")

        return found

    def hold(tensor: Tensor) -> None:
        held.append(weakref.ref(tensor))

    monkeypatch.setattr("lowvram.train.step.causal_loss", loss_of)
    return held


def steps_of(events: list[Event]) -> list[tuple[float, float]]:
    return [(event.loss, event.gradient_norm) for event in events if isinstance(event, StepDone)]


@pytest.mark.parametrize("place", ["forward", "early backward", "late backward"])
@pytest.mark.parametrize("number", [0, 1], ids=["first micro-batch", "second micro-batch"])
def test_a_step_made_again_equals_one_that_never_failed(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str, number: int
) -> None:
    truth = trainer_of(run_of(home, f"truth-{place}-{number}"), 2)
    expected = list(truth.run())
    held = fail_at(monkeypatch, place, lambda batch: int(batch.sample_B[0]) == 4 * number)
    ours = trainer_of(run_of(home, f"ours-{place}-{number}"), 4)
    events = list(ours.run())
    assert len(held) == 5
    assert [event for event in events if isinstance(event, Halved)] == [Halved(0, 2, 4)]
    assert ours.plan == Plan(micro_batch=2, accumulate=4)
    assert steps_of(events) == steps_of(expected)
    assert unequal(tensors_of(truth), tensors_of(ours)) == []


@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_a_failed_recomputation_leaves_nothing_behind(
    home: Path, monkeypatch: pytest.MonkeyPatch, recompute: Any
) -> None:
    again = {"recompute": recompute}
    truth = trainer_of(run_of(home, f"truth-{recompute}"), 2)
    truth.plan = truth.plan.model_copy(update=again)
    list(truth.run())
    held = fail_at(monkeypatch, "late backward", lambda batch: int(batch.sample_B[0]) == 4)
    ours = trainer_of(run_of(home, f"ours-{recompute}"), 4)
    ours.plan = ours.plan.model_copy(update=again)
    events = list(ours.run())
    assert held
    assert [event for event in events if isinstance(event, Halved)] == [Halved(0, 2, 4)]
    assert ours.plan.recompute == recompute
    assert unequal(tensors_of(truth), tensors_of(ours)) == []


def test_memory_that_runs_out_in_the_middle_leaves_the_steps_before_as_they_were(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = run_of(home, "truth-middle")
    begun = trainer_of(truth, 8)
    for event in begun.run():
        if isinstance(event, StepDone) and event.step == 3:
            begun.stop()
    goes_on = trainer_of(truth, 4)
    list(goes_on.run())
    fail_at(monkeypatch, "late backward", lambda batch: int(batch.sample_B[0]) == 24)
    ours = trainer_of(run_of(home, "ours-middle"), 8)
    names = [type(event).__name__ for event in ours.run()]
    assert names[:6] == ["Started", "StepDone", "StepDone", "StepDone", "Halved", "StepDone"]
    assert unequal(tensors_of(goes_on), tensors_of(ours)) == []


def test_a_micro_batch_is_halved_until_it_fits(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, "forward", lambda batch: len(batch.sample_B) > 1, times=99)
    ours = trainer_of(run_of(home, "until"), 8)
    events = list(ours.run())
    halved = [event for event in events if isinstance(event, Halved)]
    assert halved == [Halved(0, 4, 2), Halved(0, 2, 4), Halved(0, 1, 8)]
    assert len(steps_of(events)) == 6


@pytest.mark.parametrize("where", ["gradients", "evaluate"], ids=["in a step", "in a validation"])
def test_what_was_learnt_is_saved_before_memory_ends_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    # Saving is due in ten minutes, and would come too late.
    trainer = trainer_of(run_of(home, f"rescued-{where}", validate_every=3), 1)
    events: list[Event] = []

    def fail(*_: object, **__: object) -> None:
        raise NO_MEMORY("CUDA out of memory.")

    def run() -> None:
        for event in trainer.run():
            events.append(event)
            if isinstance(event, StepDone) and event.step == 3 - (where == "gradients"):
                place = "step_launcher.sum_gradients" if where == "gradients" else "trainer.evaluate"
                monkeypatch.setattr(f"lowvram.train.{place}", fail)

    with pytest.raises(TrainingError, match="Nothing is lost: what was learnt is saved"):
        run()
    step = 2 if where == "gradients" else 3
    assert isinstance(events[-1], Saved)
    assert trainer.store.latest()[0].step == step
    monkeypatch.undo()
    goes_on = list(trainer_of(run_of(home, f"rescued-{where}", validate_every=3), 1).run())
    assert next(event.step for event in goes_on if isinstance(event, StepDone)) == step + 1


@pytest.mark.parametrize(
    "text, expected", [("CUDA error: out of memory", TrainingError), ("another fault", RuntimeError)]
)
def test_what_cannot_be_halved_ends_the_run_and_loses_no_checkpoint(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: type[Exception]
) -> None:
    trainer, done = trainer_of(run_of(home, f"ends-{text}", save_every_minutes=1e-9), 1), []

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    def run() -> None:
        for event in trainer.run():
            if isinstance(event, StepDone):
                done.append(event.step)
                if event.step == 2:
                    monkeypatch.setattr("lowvram.train.step_launcher.sum_gradients", fail)

    with pytest.raises(expected, match="in step 3, with one sequence" if expected is TrainingError else text):
        run()
    assert done == [1, 2]
    assert trainer.store.latest()[0].step == 2


@pytest.mark.parametrize(
    "text, expected", [("CUDA error: out of memory", TrainingError), ("another fault", RuntimeError)]
)
def test_an_update_is_never_tried_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: type[Exception]
) -> None:
    trainer, calls = trainer_of(run_of(home, f"update-{text}", save_every_minutes=1e-9), 4), []

    def fail(*_: object) -> None:
        calls.append(trainer.state.step)
        if len(calls) == 3:
            raise RuntimeError(text)

    trainer.state.optimizer.register_step_pre_hook(fail)
    with pytest.raises(expected, match=r"in the update of step 3\." if expected is TrainingError else text):
        list(trainer.run())
    assert calls == [0, 1, 2]
    assert trainer.store.latest()[0].step == 2


def test_a_halved_micro_batch_is_saved_with_the_checkpoint_and_found_where_the_plan_was_lost(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "forward", lambda batch: len(batch.sample_B) == 4)
    what = run_of(home, "saved")
    assert resolve_plan(what.run.dir, what.train).plan.micro_batch == 8
    trainer = trainer_of(what, 4)
    assert any(isinstance(event, Saved) for event in trainer.run())
    plan, reason, is_kept = resolve_plan(what.run.dir, what.train)
    assert (plan, reason, is_kept) == (trainer.plan, "this run's plan so far", True)
    assert plan == Plan(micro_batch=2, accumulate=4)
    assert not hasattr(trainer_of(what, 2).state, "plan")
    resumed = trainer_of(run_of(home, "saved", tokens=7 * 256), 2)
    list(resumed.run())
    assert not hasattr(resumed.state, "plan"), "a plan is no training state"
    assert find_checkpoint(what.run.dir)[0].step == 7


def test_the_command_says_so_writes_it_down_and_goes_on_with_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram.cli.train import train

    fail_at(monkeypatch, "late backward", lambda batch: int(batch.sample_B[0]) == 8)
    what = run_of(home, "typed")
    train(what, micro_batch=4, device="cpu", stop_at=3)
    told = " ".join(capsys.readouterr().err.split())
    assert "step 2 memory ran out: tried again, and continued, with 2 sequences × 4 a step" in told
    kept = json.loads((what.run.dir / "plan.json").read_bytes())
    assert (kept["micro_batch"], kept["accumulate"]) == (2, 4)
    rows = [json.loads(line) for line in (what.run.dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (row,) = [row for row in rows if row["event"] == "Halved"]
    assert (row["step"], row["micro_batch"], row["accumulate"]) == (1, 2, 4)
    train(what, device="cpu")
    assert "Plan: 2 sequences × 4 a step (this run's plan so far)." in capsys.readouterr().err
