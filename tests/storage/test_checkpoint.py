"""A checkpoint is whole or not there, and a corrupt one is named and passed over."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.errors import BusyError, CheckpointError, DiskFullError
from lowvram.storage.checkpoint import Checkpoint, Store, find_checkpoint, open_checkpoint
from lowvram.storage.disk import DISK, Disk, sha256
from tests.faulty_disk import FaultyDisk, PowerCut

FILES = ["weights.safetensors", "state.safetensors", "state.json", "config.json", "tokenizer.json"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tok"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def save(run: Path, tokenizer: Path, step: int, disk: Disk = DISK, **retention: Any) -> Checkpoint:
    weights = {"w": torch.full((3, 5), float(step)), "bf": torch.ones(4, dtype=torch.bfloat16)}
    state = {"exp_avg.w": torch.arange(15.0).view(3, 5) + step}
    store = Store(run, disk=disk, **retention)
    return store.save(weights, state, {"step": step, "tokens": step * 10}, {"model": {}}, tokenizer, {"data": "abc"})


def test_what_was_saved_is_what_is_read(tmp_path: Path, tokenizer: Path) -> None:
    save(tmp_path / "run", tokenizer, 7)
    found, passed_over = find_checkpoint(tmp_path / "run")
    assert passed_over == []
    assert found.step == 7
    assert found.numbers() == {"step": 7, "tokens": 70}
    assert torch.equal(found.weights()["w"], torch.full((3, 5), 7.0))
    assert found.weights()["bf"].dtype == torch.bfloat16
    assert torch.equal(found.state()["exp_avg.w"], torch.arange(15.0).view(3, 5) + 7)
    assert found.manifest["hashes"] == {"data": "abc"}
    assert found.size_bytes == sum(p.stat().st_size for p in found.directory.iterdir() if p.name != "manifest.json")


def test_weights_are_mapped_one_by_one_and_outlive_their_file(tmp_path: Path, tokenizer: Path) -> None:
    found = save(tmp_path / "run", tokenizer, 7)
    mapped, whole = found.map_weights(), found.weights()
    assert sorted(mapped.names()) == sorted(whole)
    tensors = {name: mapped.read(name) for name in mapped.names()}
    if sys.platform != "win32":  # which lets nobody delete what is mapped
        shutil.rmtree(found.directory)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())
    assert tensors["bf"].dtype == torch.bfloat16


def test_weights_open_without_the_training_state(tmp_path: Path, tokenizer: Path) -> None:
    from safetensors.torch import load_file

    found = save(tmp_path / "run", tokenizer, 1)
    assert set(load_file(found.directory / "weights.safetensors")) == {"w", "bf"}
    for data in (b"altered", None):
        state = found.directory / "state.safetensors"
        state.write_bytes(data) if data else state.unlink()
        for path in (tmp_path / "run", found.directory):
            opened, passed_over = find_checkpoint(path, needs_state=False)
            assert (set(opened.weights()), passed_over) == ({"w", "bf"}, [])
            with pytest.raises(CheckpointError, match=r"state\.safetensors"):
                find_checkpoint(path)
    (found.directory / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is missing"):
        open_checkpoint(found.directory, needs_state=False)


def test_the_optimizers_tensors_are_not_even_read_where_they_are_not_needed(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, read = save(tmp_path / "run", tokenizer, 1), list[str]()
    real = sha256
    monkeypatch.setattr("lowvram.storage.checkpoint.sha256", lambda path: read.append(path.name) or real(path))
    open_checkpoint(found.directory, needs_state=False)
    assert "weights.safetensors" in read
    assert "state.safetensors" not in read


@pytest.mark.default_cases("cut")
@pytest.mark.parametrize("fault", ["full", "cut"])
def test_a_fault_at_any_operation_of_a_save_leaves_the_last_checkpoint_or_the_new_one(
    tmp_path: Path, tokenizer: Path, fault: str
) -> None:
    counted = FaultyDisk()
    save(tmp_path / "counted", tokenizer, 1)
    save(tmp_path / "counted", tokenizer, 2, counted, keep=1)
    assert counted.count > 20
    assert counted.seen.count("write_with") == 2
    assert {"delete", "remove_tree"} < set(counted.seen)
    for at in range(counted.count):
        run = tmp_path / f"run-{at}"
        save(run, tokenizer, 1)
        # 128 bytes of tensors: the message speaks of them all, not of the small file that did not fit.
        expected = pytest.raises(DiskFullError, match=r"At that moment 128 B were needed")
        with expected if fault == "full" else pytest.raises(PowerCut):
            save(run, tokenizer, 2, FaultyDisk(fault, at), keep=1)
        assert fault == "cut" or not list(run.glob("*.tmp")), "a draft that failed frees its space at once"
        found, passed_over = find_checkpoint(run)
        assert found.step in (1, 2)
        assert torch.equal(found.weights()["w"], torch.full((3, 5), float(found.step)))
        assert passed_over == [], "a torn directory must never bear a final name"
        save(run, tokenizer, 3)
        assert find_checkpoint(run)[0].step == 3
        assert not [path for path in run.iterdir() if path.suffix in (".tmp", ".deleted")]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped bit", "truncated", "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_used(
    tmp_path: Path, tokenizer: Path, name: str, damage: str
) -> None:
    save(tmp_path / "run", tokenizer, 1)
    path = save(tmp_path / "run", tokenizer, 2).directory / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped bit" else data[: len(data) // 2])
    found, passed_over = find_checkpoint(tmp_path / "run")
    assert found.step == 1
    assert len(passed_over) == 1
    assert name in str(passed_over[0])
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path.parent)


@pytest.mark.parametrize("name", ["step-2", "step-00000002", "step-by-step"])
def test_a_run_directory_may_be_called_like_a_step(tmp_path: Path, tokenizer: Path, name: str) -> None:
    run = tmp_path / name
    run.mkdir()
    assert Store(run).latest() == (None, [])
    save(run, tokenizer, 1)
    found, _ = Store(run).latest()
    assert found is not None
    assert (found.step, find_checkpoint(run)[0].step) == (1, 1)


def test_a_step_without_a_manifest_is_said_to_be_unfinished(tmp_path: Path, tokenizer: Path) -> None:
    found = save(tmp_path / "run", tokenizer, 1)
    (found.directory / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no manifest\.json.*not finished"):
        find_checkpoint(found.directory)


def test_no_checkpoint_is_an_error_that_says_what_is_missing(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no directory"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has saved nothing yet"):
        find_checkpoint(tokenizer)
    assert Store(tmp_path / "nowhere").latest() == (None, [])
    for name, message in (
        ("run.toml", "is a run file"),
        ("m.gguf", "llama.cpp reads it"),
        ("a.txt", r"a\.txt is a file"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(CheckpointError, match=message):
            find_checkpoint(tmp_path / name)


def test_a_folder_of_runs_is_answered_with_their_names(tmp_path: Path, tokenizer: Path) -> None:
    for name in ("second", "first"):
        save(tmp_path / "runs" / name, tokenizer, 1)
    with pytest.raises(CheckpointError, match=r"Name one: \S+first, \S+second\."):
        find_checkpoint(tmp_path / "runs")


def test_if_none_is_whole_training_does_not_silently_start_again(tmp_path: Path, tokenizer: Path) -> None:
    found = save(tmp_path / "run", tokenizer, 1)
    (found.directory / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole.*state.json is missing"):
        Store(tmp_path / "run").latest()


def steps_left(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in run.glob("step-*"))


def test_the_newest_are_kept_and_milestones_stay(tmp_path: Path, tokenizer: Path) -> None:
    for step in range(1, 10):
        save(tmp_path / "run", tokenizer, step, keep=2, milestone_steps=4)
    assert steps_left(tmp_path / "run") == [4, 8, 9]


def test_a_budget_lets_the_oldest_go_but_never_the_newest(tmp_path: Path, tokenizer: Path) -> None:
    size = save(tmp_path / "size", tokenizer, 1)
    whole = size.size_bytes + (size.directory / "manifest.json").stat().st_size
    for step in range(1, 7):
        save(tmp_path / "run", tokenizer, step, keep=5, milestone_steps=2, budget_bytes=whole * 3 + whole // 2)
    assert steps_left(tmp_path / "run") == [2, 4, 6]
    save(tmp_path / "run", tokenizer, 7, keep=5, budget_bytes=1)
    assert steps_left(tmp_path / "run") == [7]


def damage(checkpoint: Checkpoint) -> None:
    (checkpoint.directory / "weights.safetensors").write_bytes(b"torn")


@pytest.mark.parametrize(
    "retention", [{"keep": 2}, {"keep": 9, "budget_bytes": 1 << 13}, {"milestone_steps": 4}], ids=str
)
def test_corrupt_newer_checkpoints_never_cost_a_good_one(
    tmp_path: Path, tokenizer: Path, retention: dict[str, int]
) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 7, 8):
        checkpoint = save(run, tokenizer, step, keep=9)
        if step > 2:
            damage(checkpoint)
    found, passed_over = Store(run).latest()
    assert found is not None
    assert (found.step, len(passed_over)) == (2, 2)
    assert steps_left(run) == [1, 2, 7, 8], "looking deletes nothing"
    save(run, tokenizer, 3, **retention)
    assert steps_left(run) == ([1, 2, 3] if "budget_bytes" in retention else [2, 3])


def test_a_corrupt_checkpoint_goes_even_where_the_next_save_is_above_it(tmp_path: Path, tokenizer: Path) -> None:
    run = tmp_path / "run"
    save(run, tokenizer, 1)
    damage(save(run, tokenizer, 2))
    store = Store(run, keep=2)
    store.latest()
    tensors = {"w": torch.ones(2)}
    for step, left in ((3, [1, 3]), (4, [3, 4])):
        store.save(tensors, tensors, {"step": step}, {}, tokenizer, {})
        assert steps_left(run) == left


def test_leftovers_of_a_killed_save_or_deletion_are_cleared(tmp_path: Path, tokenizer: Path) -> None:
    run = tmp_path / "run"
    first = save(run, tokenizer, 1)
    ours = ("step-00000002.tmp", "step-00000009.77.tmp", "step-00000000.deleted", "step-123456789.5.deleted")
    theirs = ("step-by-step.tmp", "notes.tmp", "step-00000003.old.deleted")
    for name in (*ours, *theirs):
        shutil.copytree(first.directory, run / name)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    being_written = [f"status.json.{os.getpid()}.tmp", f"control.json.{os.getppid()}.tmp"]
    for name in (f"plan.json.{dead.pid}.tmp", *being_written):
        (run / name).write_text("{")
    Store(run).clear_leftovers()
    assert sorted(path.name for path in run.iterdir()) == sorted(["step-00000001", *being_written, *theirs])
    for name in being_written:
        (run / name).unlink()
    shutil.copytree(first.directory, run / ours[0])
    save(run, tokenizer, 2)
    assert sorted(path.name for path in run.iterdir()) == sorted(["step-00000001", "step-00000002", *theirs])
    Store(tmp_path / "nowhere").clear_leftovers()


class InUse(Disk):
    """A Windows on which another process has a file of some directories open."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def delete(self, path: Path) -> None:
        if path.name in self.names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        super().delete(path)

    def remove_tree(self, path: Path, ignore_errors: bool = False) -> None:
        if path.name in self.names:
            assert ignore_errors
        else:
            super().remove_tree(path, ignore_errors)


def test_a_checkpoint_that_is_open_on_windows_is_let_go_at_a_later_save(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk = tmp_path / "run", InUse("step-00000001")
    save(run, tokenizer, 1)
    with pytest.raises(PermissionError):
        save(run, tokenizer, 2, disk, keep=1)
    monkeypatch.setattr(sys, "platform", "win32")
    save(run, tokenizer, 3, disk, keep=1)
    assert steps_left(run) == [1, 3]
    save(run, tokenizer, 4, keep=1)
    assert steps_left(run) == [4]


def test_a_draft_that_cannot_be_removed_stands_in_nobodys_way(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, stuck = tmp_path / "run", f"step-00000002.{os.getpid()}.tmp"
    (run / stuck).mkdir(parents=True)
    save(run, tokenizer, 2, InUse(stuck))
    assert sorted(path.name for path in run.iterdir()) == ["step-00000002", stuck]
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(BusyError, match=r"step-00000002 cannot be replaced.*has it open"):
        save(run, tokenizer, 2, InUse("step-00000002"))
    assert [path.name for path in run.iterdir()] == ["step-00000002"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path, tokenizer: Path) -> None:
    save(tmp_path / "run", tokenizer, 5)
    save(tmp_path / "run", tokenizer, 5)
    assert steps_left(tmp_path / "run") == [5]
    assert find_checkpoint(tmp_path / "run")[0].step == 5


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.storage.checkpoint.free_bytes", lambda _: 10)
    with pytest.raises(DiskFullError, match=r"No space left .* were needed"):
        save(tmp_path / "run", tokenizer, 1)
    assert list((tmp_path / "run").iterdir()) == []
