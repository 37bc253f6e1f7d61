"""What was changed in a run is found when its last steps are made again, and named."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowvram
from lowvram.api import verify
from lowvram.errors import CheckpointError, ConfigError, DataError, LowvramError
from lowvram.train.replay import compare_bits
from tests.flows.typed import typed
from tests.resign import sign_anew
from tests.verified import flip_bit, rewrite_log


@pytest.mark.parametrize(
    "file, name",
    [("weights.safetensors", "blocks.1.attention.k_proj.weight"), ("state.safetensors", "exp_avg.norm.weight")],
)
def test_a_flipped_bit_of_a_signed_checkpoint_is_found_and_its_tensor_named(run: Path, file: str, name: str) -> None:
    checkpoint = run / "step-00000006"
    before = load_file(checkpoint / file)[name].view(-1)
    flip_bit(checkpoint, file, name, 3)
    after = load_file(checkpoint / file)[name].view(-1)
    found = verify(run)
    assert not found.is_equal
    assert found.step is None
    assert found.tensor is not None
    assert (found.tensor.name, found.tensor.differing, found.differing_tensors) == (name, 1, 1)
    assert found.tensor.size == before.numel()
    assert found.tensor.greatest == float((before.double() - after.double()).abs().max()) > 0
    answer = typed("verify", run)
    assert answer.code == 1
    assert "Not equal: 3 steps from step 3 to step 6." in answer.out
    assert f"The only tensor that differs is {name}: 1 of its" in answer.out
    assert "so the checkpoint was changed" in answer.out


def test_a_change_before_the_steps_is_found_in_the_first_of_them_and_in_the_first_tensor(run: Path) -> None:
    flip_bit(run / "step-00000003", "weights.safetensors", "blocks.0.ffn.down_proj.weight", 5)
    tensors = load_file(run / "step-00000003" / "weights.safetensors")
    tensors["blocks.0.ffn.down_proj.weight"] *= 1.01
    save_file(tensors, run / "step-00000003" / "weights.safetensors")
    sign_anew(run / "step-00000003")
    found = verify(run)
    assert found.step is not None
    assert (found.step.step, found.step.name) == (4, "loss")
    assert found.tensor is not None
    assert found.tensor.name == "embedding", "the first in the model's order"
    assert found.differing_tensors > 10


def test_a_number_beside_the_tensors_that_was_changed_is_named(run: Path) -> None:
    path = run / "step-00000006/state.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"tokens": 1535}), encoding="utf-8")
    sign_anew(run / "step-00000006")
    (number,) = verify(run).numbers
    assert dataclasses.astuple(number) == ("tokens", 1535, 1536)


@pytest.mark.parametrize("name", ["gradient_norm", "skipped"])
def test_the_first_step_whose_log_was_changed_is_named(run: Path, name: str) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        is_late = row["event"] == "StepDone" and row["step"] >= 5
        return row | {name: math.nextafter(row[name], 9.0) if name != "skipped" else 1} if is_late else row

    rewrite_log(run, change)
    answer = typed("verify", run, "--json")
    assert answer.code == 1
    told = json.loads(answer.out)
    assert (told["is_equal"], told["tensor"], told["differing_tensors"]) == (False, None, 0)
    assert (told["step"]["step"], told["step"]["name"]) == (5, name)
    assert told["step"]["logged"] != told["step"]["repeated"]
    if name == "skipped":
        assert "Every tensor is equal, so the log was changed" in typed("verify", run).out


def test_rows_that_the_log_lacks_are_counted(run: Path) -> None:
    rewrite_log(run, lambda row: None if row.get("step") == 5 else row)
    found = verify(run)
    assert (found.is_equal, found.unlogged_steps) == (True, 1)
    assert "log.jsonl has no row of 1 step of them." in typed("verify", run).out


def test_steps_that_were_lost_and_made_again_count_as_the_last_time(run: Path) -> None:
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lost = [json.dumps(json.loads(line) | {"loss": 1.0}) for line in lines if '"StepDone"' in line]
    later = [json.dumps({"event": "StepDone", "step": 5, "loss": 2.0}), '{"event": "StepDo']
    path.write_text("\n".join([*lost, *lines, *later]) + "\n", encoding="utf-8")
    assert verify(run).is_equal, "what follows the checkpoint's save in the log is of another attempt"


def test_a_shard_of_another_text_is_refused_as_in_a_resume(home: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "shards/valid", home / "shards/other")
    path = run / "step-00000006/config.json"
    text = path.read_text(encoding="utf-8").replace("shards/train", "shards/other")
    for step in (3, 6):
        (run / f"step-{step:08d}/config.json").write_text(text, encoding="utf-8")
        sign_anew(run / f"step-{step:08d}")
    with pytest.raises(ConfigError, match="cannot be repeated: the training data has other contents"):
        verify(run)
    shutil.rmtree(home / "shards/other")
    with pytest.raises(LowvramError, match="other"):
        verify(run)


def test_a_shard_with_a_flipped_bit_is_refused(home: Path, run: Path) -> None:
    shard = next((home / "shards/train").glob("*.bin"))
    good = shard.read_bytes()
    try:
        shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DataError, match=shard.name):
            verify(run)
    finally:
        shard.write_bytes(good)


def test_a_damaged_checkpoint_is_named_and_an_older_one_stands_in_for_the_earlier(run: Path) -> None:
    (run / "step-00000003/state.json").write_text("{}", encoding="utf-8")
    found = verify(run)
    assert (found.is_equal, found.first_step) == (True, 2)
    assert "step-00000003" in found.notices[0].text
    (run / "step-00000006/weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-00000006.weights\.safetensors has 0 bytes"):
        verify(run)


@pytest.mark.parametrize("place", ["nothing", "shards/train", "run.toml"])
def test_what_is_no_run_is_refused_in_one_paragraph(home: Path, place: str) -> None:
    (home / "run.toml").touch()
    answer = typed("verify", home / place)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith(
        "Error: There is no " if place != "run.toml" else f"Error: {home / place} is a run file"
    )


def test_conditions_that_are_others_are_named_and_equality_is_not_promised(run: Path) -> None:
    path = run / "step-00000006/state.json"
    numbers = json.loads(path.read_text(encoding="utf-8"))
    conditions = numbers["conditions"] | {"torch": "2.0.0", "device": "NVIDIA H200"}
    path.write_text(json.dumps(numbers | {"conditions": conditions}), encoding="utf-8")
    sign_anew(run / "step-00000006", versions={"lowvram": "0.0.1", "torch": "2.0.0"})
    found = verify(run, device="cpu")
    assert found.changed_conditions == (
        f"lowvram 0.0.1 then, {lowvram.__version__} now",
        f"torch 2.0.0 then, {torch.__version__} now",
        "device NVIDIA H200 then, cpu now",
    )
    assert "equality is not promised: lowvram 0.0.1 then" in typed("verify", run, "--device", "cpu").out


def test_tensors_are_compared_by_their_bits() -> None:
    nan = torch.tensor([math.nan, 1.0, 2.0])
    assert compare_bits("a", nan, nan.clone()) is None
    zero = compare_bits("a", torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert zero is not None
    assert (zero.differing, zero.greatest, zero.scale) == (1, 0.0, 1.0)
    codes = compare_bits("a", torch.tensor([1, 250, 3], dtype=torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint8))
    assert codes is not None
    assert (codes.differing, codes.size, codes.greatest) == (1, 3, 248.0)
    broken = compare_bits("a", torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0]))
    assert broken is not None
    assert (broken.differing, broken.greatest) == (1, math.inf)
    for other in (None, torch.ones(3), torch.ones(2, dtype=torch.float64)):
        missing = compare_bits("a", torch.ones(2), other)
        assert missing is not None
        assert missing.greatest is None
        assert missing.describe() == "a is missing, or has another shape or type."
