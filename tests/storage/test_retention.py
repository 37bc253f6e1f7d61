"""However often a run saves, no more is left on the drive than its options say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import IO

import pytest
import torch

from lowvram.api.disk_room import check_disk_room
from lowvram.config.run import RunOptions
from lowvram.errors import ConfigError
from lowvram.storage.checkpoint import Store, find_checkpoint
from lowvram.storage.disk import Disk
from lowvram.train.best_checkpoint import BestCheckpoint, better_of
from tests.tiny import tiny_run


class QuickDisk(Disk):
    """A drive that is not waited for: what is deleted does not depend on it."""

    def sync_handle(self, file: IO[bytes]) -> None:
        file.flush()

    def sync_directory(self, path: Path) -> None:
        pass


def size_of(run: Path) -> int:
    return sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


@pytest.mark.default_cases("60")
@pytest.mark.parametrize("saves", [60, 1_000])
def test_after_many_saves_what_is_left_is_the_last_the_milestones_and_the_best(tmp_path: Path, saves: int) -> None:
    tokenizer = tmp_path / "tok"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_text("{}", encoding="utf-8")
    options = RunOptions(dir=tmp_path / "run", keep=3, milestone_steps=200)
    losses = random.Random("losses")
    best: BestCheckpoint | None = None
    weights, state = {"w": torch.zeros(1_000)}, {"m": torch.zeros(1_000)}
    one = 0
    for number in range(1, saves + 1):
        step = 10 * number
        store = Store(options.dir, options.keep, options.milestone_steps, disk=QuickDisk())
        assert store.reserve.take(10_000)
        numbers = {"step": step, "valid": [step, 3.0 + losses.random()]}
        best = better_of(best, step, numbers)
        store.save(weights, state, numbers, {}, tokenizer, {}, best=best.step)
        one = max(one, size_of(options.dir / f"step-{step:08d}"))
        assert size_of(options.dir) <= options.disk_bytes(one, step)
    expected = {10 * saves - 20, 10 * saves - 10, 10 * saves, best.step, *range(200, 10 * saves + 1, 200)}
    assert {int(path.name[5:]) for path in options.dir.glob("step-*")} == expected
    assert find_checkpoint(options.dir)[0].step == 10 * saves
    budget = 4 * one
    Store(options.dir, 3, 200, budget, QuickDisk()).save(
        weights, state, {"step": 10 * saves + 10}, {}, tokenizer, {}, best=best.step
    )
    left = {int(path.name[5:]) for path in options.dir.glob("step-*")}
    assert best.step in left, "what was best goes last"
    assert 10 * saves + 10 in left
    assert sum(size_of(path) for path in options.dir.glob("step-*")) <= budget


def test_a_disk_that_is_too_small_for_what_is_kept_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = tiny_run(tmp_path, tokens=100 * 256)
    what = what.model_copy(update={"run": what.run.model_copy(update={"milestone_steps": 50})})
    size = 1 << 20
    needed = (2 + 1 + 2 + 2) * size  # the last two, the best, two milestones; the one that is written, and the reserve
    for free, is_told in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr("lowvram.api.disk_room.free_bytes", lambda _, free=free: free)
        assert bool(check_disk_room(what, size)) == is_told
    told = check_disk_room(what, size)
    assert told is not None
    assert "up to 7.0 MiB" in told
    (what.run.dir / "step-00000001").mkdir(parents=True)
    (what.run.dir / "step-00000001/weights.safetensors").write_bytes(b"1")
    assert check_disk_room(what, size) is None, "what the run has there already is not needed again"
    for budget, most in ((3 * size, 5 * size), (size, 3 * size)):
        options = what.run.model_copy(update={"disk_budget": budget})
        assert options.disk_bytes(size, what.train.steps) == most
    too_small = what.model_copy(update={"run": what.run.model_copy(update={"disk_budget": size - 1})})
    with pytest.raises(ConfigError, match=r"run\.disk_budget is .*, and one checkpoint of this run has 1\.0 MiB"):
        check_disk_room(too_small, size)
