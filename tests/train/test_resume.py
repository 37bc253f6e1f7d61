"""Six steps equal three, a real kill -9, and three more, bit for bit; wherever the kill falls."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.config.plan import choose_plan
from lowvram.config.run import RunConfig
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.storage.disk import Disk
from lowvram.train.events import Saved, StepDone, Stopped
from lowvram.train.prepare import prepare
from lowvram.train.settings import RunSettings
from lowvram.train.start import lock_run
from lowvram.train.trainer import Trainer
from tests.tiny import KINDS, prepare_home, tiny_run

EVERY_STEP = 1e-9  # minutes between saves


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


def saving_every_step(what: RunConfig) -> RunConfig:
    return what.model_copy(update={"run": what.run.model_copy(update={"save_every_minutes": EVERY_STEP})})


def trainer_of(what: RunConfig, disk: Disk | None = None, micro_batch: int | None = 4) -> Trainer:
    plan, _ = choose_plan(what.train, micro_batch)
    return prepare(RunSettings(what, plan, torch.device("cpu")), disk=disk or Disk())


def tensors_at_the_end(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    checkpoint, _ = find_checkpoint(run)
    assert checkpoint.step == step
    return checkpoint.weights() | checkpoint.state()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_six_steps_equal_three_and_three(home: Path, kind: str, bits: int) -> None:
    recipe = {"optimizer": {"name": "adamw", "bits": bits}}
    whole, halves = (tiny_run(home, kind, f"{name}-{kind}-{bits}", **recipe) for name in ("six", "halves"))
    losses = [event.loss for event in trainer_of(whole).run() if isinstance(event, StepDone)]
    first = trainer_of(halves)
    found = []
    for event in first.run():
        if isinstance(event, StepDone):
            found.append(event.loss)
            if event.step == 3:
                first.stop()
    assert isinstance(event, Stopped)
    assert not event.is_finished
    found += [event.loss for event in trainer_of(halves).run() if isinstance(event, StepDone)]
    assert found == losses
    truth, ours = tensors_at_the_end(whole.run.dir), tensors_at_the_end(halves.run.dir)
    assert any(name.startswith("code_m.") for name in truth) == (bits == 8)
    assert all(torch.equal(truth[name], ours[name]) for name in truth)


MUON = {"name": "muon", "bits": 8}
TURNS = {"window": 3, "interval": 2, "idle": "int8"}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("gqa-rope", {"optimizer": MUON}),
    "bf16 weights": ("gqa-alibi", {"weights": "bf16", "optimizer": {"bits": 8}}),
    "during backward": ("mla-moe", {"update_during_backward": True, "precision": "fp16"}),
    "fp8": ("mla-moe", {"precision": "fp8"}),
    "int8, rotation": ("mla-moe", {"precision": "int8", "rotation": TURNS, "experts": 4}),
    "rotation": ("mla-moe", {"rotation": TURNS, "experts": 4}),
    "rotation, 8-bit": ("mla-moe", {"rotation": TURNS | {"idle": "e4m3"}, "experts": 5, "optimizer": {"bits": 8}}),
    "all together": (
        "mla-moe",
        {"rotation": TURNS, "experts": 4, "weights": "bf16", "optimizer": MUON, "update_during_backward": True},
    ),
}


def die_in_step(what: RunConfig, step: int) -> None:
    """The child process: train, saving after every step, and get a kill -9 after a step that is not saved yet."""
    torch.set_num_threads(1)
    with lock_run(what.run.dir):
        for event in trainer_of(saving_every_step(what), micro_batch=None).run():
            if isinstance(event, StepDone) and event.step == step:
                os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.default_cases("all together")
@pytest.mark.parametrize("mode", MODES)
def test_six_steps_equal_three_a_kill_and_three(home: Path, mode: str) -> None:
    kind, recipe = MODES[mode]
    whole, killed = (tiny_run(home, kind, f"{name}-{mode}", dropout=0.1, **recipe) for name in ("whole", "killed"))
    losses = [event.loss for event in trainer_of(whole, micro_batch=None).run() if isinstance(event, StepDone)]
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["lowvram.train.prepare", "tests.tiny"])
    child = server.Process(target=die_in_step, args=(killed, 4))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    events = list(trainer_of(killed, micro_batch=None).run())
    assert events[0].step == 3, "the fourth step was not saved"
    assert [event.loss for event in events if isinstance(event, StepDone)] == losses[3:]
    truth, found = tensors_at_the_end(whole.run.dir), tensors_at_the_end(killed.run.dir)
    assert truth.keys() == found.keys()
    assert [name for name in truth if not torch.equal(truth[name], found[name])] == []
    numbers, own = (find_checkpoint(what.run.dir)[0].numbers() for what in (whole, killed))
    assert numbers == own
    assert ("rotation" in numbers) == ("rotation" in recipe)


def test_looking_and_saving_change_nothing(home: Path) -> None:
    quiet, busy = tiny_run(home, "mla-moe", "quiet"), tiny_run(home, "mla-moe", "busy")
    often = busy.run.model_copy(update={"validate_every": 1, "sample_every": 1, "save_every_minutes": EVERY_STEP})
    list(trainer_of(quiet).run())
    events = list(trainer_of(busy.model_copy(update={"run": often})).run())
    assert sum(isinstance(event, Saved) for event in events) == 6
    truth, found = tensors_at_the_end(quiet.run.dir), tensors_at_the_end(busy.run.dir)
    assert all(torch.equal(truth[name], found[name]) for name in truth)


def test_a_finished_run_typed_again_says_so_and_trains_nothing(home: Path) -> None:
    what = tiny_run(home, run="again")
    list(trainer_of(what).run())
    events = list(trainer_of(what).run())
    assert [type(event).__name__ for event in events] == ["Started", "Stopped"]
    assert events[-1].is_finished


def test_more_tokens_extend_a_finished_run(home: Path) -> None:
    what = tiny_run(home, run="longer")
    list(trainer_of(what).run())
    longer = what.model_copy(update={"train": what.train.model_copy(update={"tokens": 8 * 256})})
    steps = [event.step for event in trainer_of(longer).run() if isinstance(event, StepDone)]
    assert steps == [7, 8]


def test_a_corrupt_checkpoint_is_passed_over_and_the_run_ends_the_same(home: Path) -> None:
    what = saving_every_step(tiny_run(home, run="corrupt"))
    list(trainer_of(what).run())
    # Loaded tensors are views of the file, which is about to change.
    truth = {name: tensor.clone() for name, tensor in tensors_at_the_end(what.run.dir).items()}
    newest, _ = find_checkpoint(what.run.dir)
    path = newest.directory / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    started, *_ = events = list(trainer_of(what).run())
    assert started.step == 5
    assert "weights.safetensors" in str(started.passed_over[0])
    assert sum(isinstance(event, StepDone) for event in events) == 1
    found = tensors_at_the_end(what.run.dir)
    assert all(torch.equal(truth[name], found[name]) for name in truth)
