"""A checkpoint is whole or not there, and a corrupt one is named and passed over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lowvram.checkpoint import Checkpoint, Store, find_checkpoint, open_checkpoint
from lowvram.errors import CheckpointError, DiskFullError
from lowvram.files import DISK, Disk
from tests.faults import FaultyDisk, PowerCut

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


def test_weights_open_without_the_training_state(tmp_path: Path, tokenizer: Path) -> None:
    from safetensors.torch import load_file

    found = save(tmp_path / "run", tokenizer, 1)
    assert set(load_file(found.directory / "weights.safetensors")) == {"w", "bf"}


@pytest.mark.parametrize("fault", ["full", "cut"])
def test_a_fault_at_any_operation_of_a_save_leaves_the_last_checkpoint_or_the_new_one(
    tmp_path: Path, tokenizer: Path, fault: str
) -> None:
    counted = FaultyDisk()
    save(tmp_path / "counted", tokenizer, 1)
    save(tmp_path / "counted", tokenizer, 2, counted)
    assert counted.count > 15
    for at in range(counted.count):
        run = tmp_path / f"run-{at}"
        save(run, tokenizer, 1)
        with pytest.raises(DiskFullError if fault == "full" else PowerCut):
            save(run, tokenizer, 2, FaultyDisk(fault, at))
        found, passed_over = find_checkpoint(run)
        assert found.step in (1, 2)
        assert torch.equal(found.weights()["w"], torch.full((3, 5), float(found.step)))
        assert passed_over == [], "a torn directory must never bear a final name"
        save(run, tokenizer, 3)
        assert find_checkpoint(run)[0].step == 3


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


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}'], ids=["torn", "list", "empty"])
def test_a_manifest_that_is_none_is_an_error_and_not_a_crash(tmp_path: Path, tokenizer: Path, text: str) -> None:
    found = save(tmp_path / "run", tokenizer, 1)
    (found.directory / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"manifest"):
        open_checkpoint(found.directory)


def test_a_newer_format_is_refused_with_the_way_out(tmp_path: Path, tokenizer: Path) -> None:
    found = save(tmp_path / "run", tokenizer, 1)
    path = found.directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"format 99.*reads format 1.*pip install --upgrade"):
        open_checkpoint(found.directory)


def test_no_checkpoint_is_an_error_that_says_what_is_missing(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no directory"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has saved nothing yet"):
        find_checkpoint(tokenizer)
    assert Store(tmp_path / "nowhere").latest() == (None, [])


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


def test_leftovers_of_a_killed_save_or_deletion_are_cleared(tmp_path: Path, tokenizer: Path) -> None:
    run = tmp_path / "run"
    first = save(run, tokenizer, 1)
    shutil.copytree(first.directory, run / "step-00000002.tmp")
    shutil.copytree(first.directory, run / "step-00000009.tmp")
    shutil.copytree(first.directory, run / "step-00000000.deleted")
    save(run, tokenizer, 2)
    assert sorted(path.name for path in run.iterdir()) == ["step-00000001", "step-00000002"]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path, tokenizer: Path) -> None:
    save(tmp_path / "run", tokenizer, 5)
    save(tmp_path / "run", tokenizer, 5)
    assert steps_left(tmp_path / "run") == [5]
    assert find_checkpoint(tmp_path / "run")[0].step == 5


def test_too_little_space_is_seen_before_anything_is_written(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowvram.checkpoint.free_bytes", lambda _: 10)
    with pytest.raises(DiskFullError, match=r"No space left .* were needed"):
        save(tmp_path / "run", tokenizer, 1)
    assert list((tmp_path / "run").iterdir()) == []
