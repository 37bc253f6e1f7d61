"""What a run stands on is changed while it trains: its directory, its lock, its shards, the conditions of its bits."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from lowvram.config.run import RunConfig
from lowvram.errors import BusyError, DataError
from lowvram.storage.checkpoint import Store, find_checkpoint
from lowvram.train.conditions import KEY
from lowvram.train.environment import compare_environments, current_environment
from lowvram.train.events import Event, Saved, StepDone
from lowvram.train.start import lock_run
from lowvram.train.trainer import Trainer
from tests.tiny import prepare_home, tiny_run, trainer_of

CPU_DEVICE = torch.device("cpu")
on_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows lets nobody delete or rename what is open")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("origin")
    prepare_home(place)
    return place


@pytest.fixture
def what(origin: Path, tmp_path: Path) -> RunConfig:
    """A run of 90 steps whose shards and directory are this test's own."""
    shutil.copytree(origin / "shards", tmp_path / "shards")
    shutil.copytree(origin / "tok", tmp_path / "tok")
    found = tiny_run(tmp_path, tokens=90 * 256)
    options = {"prompts": (), "save_every_minutes": 1000.0}
    return found.model_copy(update={"run": found.run.model_copy(update=options)})


def disturb(trainer: Trainer, deed: Callable[[], object], at: int = 2) -> list[Event]:
    """Run a trainer and do something after a step; returns the events that came before an error ends it."""
    events: list[Event] = []
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == at:
            deed()
    return events


def expect(error: type[Exception], message: str, trainer: Trainer, deed: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        disturb(trainer, deed)


@on_posix
@pytest.mark.parametrize("how", ["deleted", "renamed"])
def test_a_run_directory_that_is_gone_stops_the_run_which_keeps_what_it_learnt_and_says_where(
    what: RunConfig, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.train.start._RETRY_AFTER_S", 0.0)
    run, elsewhere = what.run.dir, what.run.dir.with_name("elsewhere")
    deed = {"deleted": lambda: shutil.rmtree(run), "renamed": lambda: run.rename(elsewhere)}[how]
    with lock_run(run) as lock:
        trainer = trainer_of(what)
        trainer.lock = lock
        how = {"deleted": "It was deleted, or its drive is gone,", "renamed": f"It was renamed to {elsewhere}"}[how]
        message = rf"run directory \S+run is gone\. {how} while .* saved in (\S+)\. Rename that to {run} and type"
        with pytest.raises(BusyError, match=message) as found:
            disturb(trainer, deed)
        assert trainer.state.step == 2, "at once, not at the next save"
    assert not run.exists(), "it is not made again"
    place = Path(re.search(message, str(found.value))[1])
    assert find_checkpoint(place)[0].step == 2
    # The advice is right: under its own name the run goes on.
    place.rename(run)
    assert next(iter(trainer_of(what).run())).step == 2


@on_posix
def test_where_nothing_can_be_saved_elsewhere_the_error_does_not_promise_it(
    what: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.train.start._RETRY_AFTER_S", 0.0)

    def lose() -> None:
        shutil.rmtree(what.run.dir)
        monkeypatch.setattr(Store, "save", refuse)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with lock_run(what.run.dir) as lock:
        trainer = trainer_of(what)
        trainer.lock = lock
        expect(
            BusyError, r"is gone\. .* nothing could be saved in \S+rescued\. Bring the directory back", trainer, lose
        )


@on_posix
@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE], ids=["gone", "stale"])
def test_a_drive_that_is_away_for_a_moment_stops_no_run(
    what: RunConfig, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, is_away = os.stat, True

    def look(path: Any, **more: Any) -> os.stat_result:
        if is_away and Path(path).is_relative_to(what.run.dir):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **more)

    def come_back(_seconds: float) -> None:
        nonlocal is_away
        is_away = False

    with lock_run(what.run.dir) as lock:
        monkeypatch.setattr("lowvram.train.start.time.sleep", come_back)
        monkeypatch.setattr("os.stat", look)
        lock.refuse_lost()


@on_posix
def test_a_lock_that_another_process_took_stops_the_first_one_unsaved(what: RunConfig) -> None:
    path, others = what.run.dir / "lock", []

    def take_over() -> None:
        path.unlink()
        others.append(FileLock(path))
        others[0].acquire(timeout=0)
        (what.run.dir / "owner").write_text("4321", encoding="utf-8")

    with lock_run(what.run.dir) as lock:
        trainer = trainer_of(what)
        trainer.lock = lock
        expect(BusyError, r"Another process is training in \S+run\. Its process id is 4321", trainer, take_over)
    assert (what.run.dir / "owner").read_text(encoding="utf-8") == "4321", "the note is not ours any more"
    assert list(what.run.dir.glob("step-*")) == []
    others[0].release()


@on_posix
def test_a_lock_that_was_deleted_is_taken_again(what: RunConfig) -> None:
    with lock_run(what.run.dir) as lock:
        trainer = trainer_of(what)
        trainer.lock = lock
        (what.run.dir / "lock").unlink()
        lock.refuse_lost()
        with pytest.raises(BusyError, match=f"Its process id is {os.getpid()}"):
            lock_run(what.run.dir).__enter__()
    with lock_run(what.run.dir):
        pass


def rewrite(path: Path, data: bytes) -> None:
    """Write into the same file, as a program that damages it would."""
    with open(path, "rb+") as file:
        file.write(data)
        file.truncate()
    os.utime(path, ns=(1, 1))  # a time that it certainly did not have


def damages(path: Path) -> dict[str, Callable[[], object]]:
    data = path.read_bytes()
    return {
        "cut short": lambda: rewrite(path, data[: len(data) // 2]),
        "grown": lambda: rewrite(path, data + b"\0\0"),
        "other ids": lambda: rewrite(path, data[::-1]),
        "deleted": path.unlink,
    }


@pytest.mark.parametrize("how", ["cut short", "grown", "other ids", "deleted"])
@pytest.mark.parametrize("name", ["train", "valid"])
def test_a_shard_that_changes_is_named_and_what_was_learnt_is_saved(what: RunConfig, how: str, name: str) -> None:
    if sys.platform == "win32" and how != "other ids":
        pytest.skip("Windows changes no size of what is mapped")
    path = what.data.train[0].path.parent / name / "00000.bin"
    word = "missing" if how == "deleted" else "damaged"
    message = rf"shard \S+{name}.00000\.bin is {word}\. It was whole when it was opened"
    expect(DataError, message, trainer_of(what), damages(path)[how])
    step = 2 if name == "train" else 4  # validation comes after step 4
    assert find_checkpoint(what.run.dir)[0].step == step


def test_a_shard_that_is_touched_or_copied_and_the_same_is_read_on(what: RunConfig) -> None:
    path = what.data.train[0].path / "00000.bin"

    def copy() -> None:
        shutil.copy(path, path.with_suffix(".copy"))
        os.replace(path.with_suffix(".copy"), path)

    short = what.model_copy(update={"train": what.train.model_copy(update={"tokens": 4 * 256})})
    deed = (lambda: os.utime(path, ns=(1, 1))) if sys.platform == "win32" else copy
    assert disturb(trainer_of(short), deed)[-1].step == 4


@pytest.mark.parametrize("beyond", [0, 1, 30_000])
def test_an_id_beyond_the_vocabulary_is_named_with_its_shard(what: RunConfig, beyond: int) -> None:
    trainer = trainer_of(what)
    corpus = trainer.loader._corpora[0]
    assert corpus.vocabulary == 400
    # As if the memory had been damaged behind the check of the file.
    corpus._maps[0] = corpus.read(0, corpus.tokens).copy()
    corpus._maps[0][:] = 399
    trainer.loader.batch(0, 8)
    corpus._maps[0][:] = 400 + beyond
    trainer.loader._block.cache_clear()
    with pytest.raises(DataError, match=rf"00000\.bin holds the id {400 + beyond}\. The tokenizer has 400 ids"):
        trainer.loader.batch(0, 8)
    with pytest.raises(DataError, match="holds the id"):
        corpus.read(0, 5)


def test_a_resume_under_other_conditions_says_which(what: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(what)
    events = disturb(trainer, trainer.stop)
    assert isinstance(events[-2], Saved)
    assert find_checkpoint(what.run.dir)[0].numbers()[KEY] == current_environment(CPU_DEVICE, plan=trainer.plan)
    assert next(iter(trainer_of(what).run())).notices == ()
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 2)
    (sentence,) = next(iter(trainer_of(what).run())).notices
    assert sentence == (
        f"Changed since the last save: threads {threads} then, {threads + 2} now. "
        "The run goes on; from here its last bits may differ."
    )


CPU: dict[str, Any] = {"torch": "2.13.0", "threads": 2, "device": "cpu"}
RTX: dict[str, Any] = CPU | {"device": "NVIDIA GeForce RTX 5070"}


@pytest.mark.parametrize(
    "saved, here, named",
    [
        (CPU, CPU, []),
        (None, CPU, []),
        ([1], CPU, []),
        ({}, CPU, []),
        (CPU | {"threads": 8}, CPU, ["threads 8 then, 2 now"]),
        (RTX | {"threads": 8}, RTX, []),
        (CPU, RTX, ["device cpu then, NVIDIA GeForce RTX 5070 now"]),
        (CPU | {"torch": "2.14.0", "threads": []}, CPU, ["torch 2.14.0 then, 2.13.0 now", "threads [] then, 2 now"]),
    ],
    ids=["equal", "older", "list", "empty", "threads", "threads of a card's host", "device", "two"],
)
def test_conditions_are_compared_one_by_one(saved: object, here: dict[str, Any], named: list[str]) -> None:
    found = compare_environments(saved, here)
    assert (found is None) == (named == [])
    assert all(words in str(found) for words in named)
