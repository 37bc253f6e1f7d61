"""A checkpoint that is written beside training is the state of its own step, and its errors are not lost."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.config.run import LEAST_COPIED_BYTES
from lowvram.storage.checkpoint import Store, find_checkpoint
from lowvram.storage.disk import Disk
from lowvram.train import background_save, saver
from lowvram.train.background_save import may_copy
from lowvram.train.events import Evaluated, Event, Paused, Resumed, Saved, StepDone
from lowvram.train.start import lock_run
from lowvram.train.trainer import Trainer
from tests.tiny import prepare_home, tensors_of, tiny_run, trainer_of, unequal

RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "rotated 8-bit Muon": {
        "rotation": {"window": 2, "interval": 2},
        "optimizer": {"name": "muon", "bits": 8},
        "weights": "bf16",
        "precision": "bf16",
    },
}


class SlowDisk(Disk):
    """A drive on which a save goes on only when it is let."""

    def __init__(self) -> None:
        self.may_go_on, self.begun = threading.Event(), threading.Event()
        self.fails: list[OSError] = []

    def write_with(self, path: Path, write: Callable[[Path], None]) -> None:
        self.begun.set()
        assert self.may_go_on.wait(60)
        if self.fails:
            raise self.fails.pop()
        super().write_with(path, write)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    monkeypatch.setattr(saver, "may_copy", lambda size_bytes: True)
    made = SlowDisk()
    yield made
    made.may_go_on.set()


def run_on(home: Path, name: str, disk: Disk, kind: str = "gqa-rope", **train: Any) -> Trainer:
    """Return a trainer that saves as soon as it may."""
    what = tiny_run(home, kind, name, **train)
    options = {"save_every_minutes": 1e-9, "validate_every": 2, "keep": 9}
    trainer = trainer_of(what.model_copy(update={"run": what.run.model_copy(update=options)}))
    trainer.store = Store(what.run.dir, keep=9, disk=disk)
    return trainer


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_save_beside_training_is_the_state_of_its_own_step(home: Path, disk: SlowDisk, recipe: str) -> None:
    kind = "mla-moe" if "rotation" in RECIPES[recipe] else "gqa-rope"
    trainer = run_on(home, f"beside {recipe}", disk, kind, **RECIPES[recipe])
    truth, told = {}, list[tuple[str, int]]()
    for event in trainer.run():
        if isinstance(event, Saved):
            told.append((f"saved after step {trainer.state.step}", event.step))
        if isinstance(event, StepDone):
            truth[event.step] = tensors_of(trainer) | {"step": torch.tensor(trainer.state.numbers()["step"])}
            if event.step == 4:  # the first save, of step 1, has waited for three steps
                assert disk.begun.is_set()
                assert told == []
                disk.may_go_on.set()
                trainer._background._future.exception(60)  # type: ignore[union-attr]
    assert told[0] == ("saved after step 4", 1)
    assert told[-1] == ("saved after step 6", 6)
    for step in [step for _, step in told]:
        checkpoint, _ = find_checkpoint(trainer.store.run / f"step-{step:08d}")
        found = checkpoint.weights() | checkpoint.state() | {"step": torch.tensor(checkpoint.numbers()["step"])}
        assert unequal(truth[step], found) == []
    plain = run_on(home, f"plain {recipe}", Disk(), kind, **RECIPES[recipe])
    list(plain.run())
    assert unequal(tensors_of(plain), tensors_of(trainer)) == []
    assert not list(trainer.store.run.glob("*.tmp"))
    assert not (trainer.store.run / "reserve").exists()


def test_a_save_that_fails_beside_training_is_made_at_once_of_what_is_new(home: Path, disk: SlowDisk) -> None:
    trainer, saved = run_on(home, "fails", disk), list[int]()
    disk.fails = [OSError(errno.EIO, "Input/output error")]
    disk.may_go_on.set()
    for event in trainer.run():
        if isinstance(event, StepDone) and event.step == 2:
            trainer._background._future.exception(60)  # type: ignore[union-attr]
        if isinstance(event, Saved):
            saved.append(event.step)
    assert saved[0] == 2
    assert saved[-1] == 6
    assert disk.fails == []


def test_a_drive_that_keeps_failing_ends_the_run_with_its_error(home: Path, disk: SlowDisk) -> None:
    trainer = run_on(home, "broken", disk)
    disk.fails = [OSError(errno.EIO, "Input/output error") for _ in range(2)]
    disk.may_go_on.set()
    with pytest.raises(OSError, match="Input/output error"):
        list(trainer.run())
    assert disk.fails == []


def test_a_drive_that_fills_up_beside_training_pauses_the_run(
    home: Path, disk: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, events = run_on(home, "full", disk), list[Event]()
    waits: list[float] = []
    monkeypatch.setattr(saver, "sleep", waits.append)
    disk.may_go_on.set()
    disk.fails = [OSError(errno.ENOSPC, "No space left on device") for _ in range(2)]  # in the reserved space, too
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            trainer._background._future.exception(60)  # type: ignore[union-attr]
    kinds = [(type(e).__name__, e.step) for e in events if isinstance(e, Paused | Resumed | Saved)]
    assert kinds[:3] == [("Paused", 2), ("Resumed", 2), ("Saved", 2)]
    assert kinds[-1] == ("Saved", 6)
    assert waits == [saver.ROOM_ASKED_EVERY_S]


def test_a_run_that_is_left_gives_no_lock_back_before_its_save_has_ended(home: Path, disk: SlowDisk) -> None:
    trainer = run_on(home, "left", disk)
    with lock_run(trainer.store.run):
        events = trainer.run()
        for event in events:
            if isinstance(event, StepDone) and event.step == 2:
                assert disk.begun.wait(60)
                break
        threading.Timer(0.05, disk.may_go_on.set).start()
        events.close()  # type: ignore[attr-defined]
        assert find_checkpoint(trainer.store.run)[0].step == 1, "the save has ended when the generator has"


def test_small_checkpoints_and_little_memory_are_saved_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 4 << 30

    monkeypatch.setattr(background_save.psutil, "virtual_memory", Memory)
    assert not may_copy(LEAST_COPIED_BYTES - 1)
    assert may_copy(LEAST_COPIED_BYTES)
    assert may_copy(3 << 30)
    assert not may_copy((3 << 30) + 1)


def test_the_checkpoint_that_was_best_in_validation_is_kept_and_found_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {2: 3.0, 4: 2.5, 6: 2.75, 8: 2.625}

    def validate(config: Any, state: Any, *_: Any) -> Evaluated:
        return Evaluated(state.step, 1.0, found[state.step])

    monkeypatch.setattr("lowvram.train.trainer.evaluate", validate)
    what = tiny_run(home, run="best", tokens=8 * 256)
    options = {"save_every_minutes": 1e-9, "validate_every": 2, "keep": 1, "prompts": ()}
    what = what.model_copy(update={"run": what.run.model_copy(update=options)})

    def steps() -> list[int]:
        return sorted(int(path.name[5:]) for path in what.run.dir.glob("step-*"))

    trainer = trainer_of(what)
    for event in trainer.run():
        if isinstance(event, Saved) and event.step == 6:
            break
    assert steps() == [4, 6]
    list(trainer_of(what).run())  # what was best before is known from the files
    assert steps() == [4, 8]
    without = what.model_copy(update={"run": what.run.model_copy(update={"dir": home / "no", "keep_best": False})})
    list(trainer_of(without).run())
    assert [path.name for path in (home / "no").glob("step-*")] == ["step-00000008"]
