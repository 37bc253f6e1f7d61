"""Memory that runs out, and a card that is lost: what was learnt is kept, and the same command ends the same.

Forward, backward, each micro-batch and the update: tests/train/test_out_of_memory.py; updates during backward:
tests/train/test_during_backward.py; recorded passes: tests/train/test_cuda_graph.py; every spelling of the errors:
tests/train/test_oom.py.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.config.plan import choose_plan
from lowvram.errors import TrainingError
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.events import Halved, StepDone
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from tests.faults.rule import (
    STEPS,
    expect_newest_used,
    expect_same_end,
    expect_same_weights,
    faulty_run,
    make_trainer,
    rows_of,
    train,
)
from tests.flows.typed import RUN_FILE, typed
from tests.tiny import tensors_of, unequal

LOST = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported"


def no_memory(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.default_cases("write_sample")
@pytest.mark.parametrize("place", ["evaluate", "write_sample"])
def test_memory_that_runs_out_beside_training_saves_the_step_and_a_restart_ends_the_same(
    home: Path, whole: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = faulty_run(home, f"no-memory-{place}", options={"save_every_minutes": 1000.0})
    with monkeypatch.context() as patch:
        patch.setattr(f"lowvram.train.trainer.{place}", no_memory)
        with pytest.raises(TrainingError, match=r"Memory ran out after step 3, while .* Nothing is lost"):
            train(what)
    assert find_checkpoint(what.run.dir)[0].step == 3
    events = train(what)
    expect_newest_used(events, 3)
    assert [row["step"] for row in rows_of(what.run.dir, "StepDone")] == list(range(1, STEPS + 1))
    # The validation that failed is not made up for: the next one is due three steps later.
    expect_same_weights(whole, what.run.dir)


def test_a_lost_card_saves_nothing_ends_with_75_and_the_same_command_ends_the_same(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "lost.toml").write_text(RUN_FILE, encoding="utf-8")
    options = ("--device", "cpu", "--micro-batch", 4, "--set", "prompts=[]", "--set", "save_every_minutes=1e-9")

    def command(name: str) -> tuple[object, ...]:
        return ("train", home / "lost.toml", *options, "--set", f"run.dir={home / name}")

    assert typed(*command("kept-card")).code == 0
    saves: list[int] = []
    real = make_trainer(faulty_run(home, "lost-card")).store.save.__func__

    def lose(model: Any, batch: Batch, **settings: Any) -> Loss:
        if not batch.sample_B.is_meta and int(batch.sample_B[0]) == 3 * 8 + 4:  # the second micro-batch of step 4
            raise RuntimeError(LOST)
        return causal_loss(model, batch, **settings)

    def save(self: Any, *arguments: Any, **more: Any) -> Any:
        saves.append(int(arguments[2]["step"]))
        return real(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("lowvram.train.step.causal_loss", lose)
        patch.setattr("lowvram.storage.checkpoint.Store.save", save)
        answer = typed(*command("lost-card"))
    assert answer.code == 75
    assert "The device failed: CUDA error: unspecified launch failure. The last checkpoint is of step 3" in answer.err
    assert saves == [1, 2, 3], "nothing is read from a context that is broken"
    assert typed(*command("lost-card")).code == 0
    assert rows_of(home / "lost-card", "Started")[-1]["step"] == 3
    expect_same_end(home / "kept-card", home / "lost-card")


@pytest.mark.nightly
def test_no_tensor_of_a_failed_step_is_alive_when_it_is_made_again_with_half(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def loss_of(model: Any, batch: Batch, **settings: Any) -> Loss:
        alive.append(sum(ref() is not None for ref in held))
        held.clear()
        found = causal_loss(model, batch, **settings)
        if len(batch.sample_B) > 2 and int(batch.sample_B[0]) >= 16:
            held.extend(weakref.ref(tensor) for tensor in (batch.token_BT, found.total))
            no_memory()
        return found

    monkeypatch.setattr("lowvram.train.step.causal_loss", loss_of)
    trainer = make_trainer(faulty_run(home, "halved-twice"), micro_batch=8)
    halved = [event for event in trainer.run() if isinstance(event, Halved)]
    assert [(event.step, event.micro_batch) for event in halved] == [(2, 4), (2, 2)]
    assert max(alive) == 0
    gc.collect()
    truth = make_trainer(faulty_run(home, "halved-truth"), micro_batch=8)
    for event in truth.run():
        if isinstance(event, StepDone) and event.step == 2:
            truth.stop()
    rest = make_trainer(faulty_run(home, "halved-truth"), micro_batch=2)
    monkeypatch.setattr("lowvram.train.step.causal_loss", causal_loss)
    list(rest.run())
    assert unequal(tensors_of(rest), tensors_of(trainer)) == []


@pytest.mark.nightly
def test_compiled_blocks_are_compiled_again_once_after_memory_ran_out_and_never_without_end(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.train.compilation.BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    graphs: dict[int, int] = {}
    failed = [False]

    def loss_of(model: Any, batch: Batch, **settings: Any) -> Loss:
        found = causal_loss(model, batch, **settings)
        if int(batch.sample_B[0]) >= 24 and not failed[0]:
            failed[0] = True
            no_memory()
        return found

    monkeypatch.setattr("lowvram.train.step.causal_loss", loss_of)
    what = faulty_run(home, "compiled", steps=9, kind="gqa-rope", options={"validate_every": 1000, "prompts": ()})
    plan, _ = choose_plan(what.train, 4)
    trainer = prepare(RunSettings(what, plan.model_copy(update={"compile": True}), torch.device("cpu")))
    for event in trainer.run():
        if isinstance(event, StepDone):
            graphs[event.step] = counters["stats"]["unique_graphs"]
    assert failed == [True]
    assert graphs[1] == graphs[3] > 0
    assert graphs[4] == 2 * graphs[3], "each block is compiled once for the smaller micro-batch"
    assert graphs[9] == graphs[4]
