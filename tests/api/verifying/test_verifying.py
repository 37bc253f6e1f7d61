"""A run's last steps made again are equal to the bit, whatever the run is, and nothing is written."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from lowvram.api import verify
from lowvram.api.verifying import Verification, verify_task
from lowvram.errors import CheckpointError, MemoryRanOutError
from lowvram.objective import Batch, Loss, causal_loss
from lowvram.train import step as step_module
from lowvram.train.events import Halved
from tests.flows.typed import typed
from tests.resign import sign_anew
from tests.verified import contents, flip_bit, keep_only, run_of, train

KINDS: dict[str, dict[str, Any]] = {
    "rotation, experts, dropout and Muon in 8 bits": {
        "kind": "mla-moe",
        "experts": 4,
        "rotation": {"window": 2, "interval": 2},
        "optimizer": {"name": "muon", "bits": 8},
        "dropout": 0.1,
    },
    "updates during backward in 8 bits": {"update_during_backward": True, "optimizer": {"bits": 8}},
    "bf16 weights": {"precision": "bf16", "weights": "bf16"},
    "fp16 with ALiBi": {"kind": "gqa-alibi", "precision": "fp16"},
}


# One run has most of what could go wrong; the others each take a second.
EVERY_KIND = [
    pytest.param(options, id=name, marks=[] if "rotation" in options else pytest.mark.nightly)
    for name, options in KINDS.items()
]


@pytest.mark.parametrize("options", EVERY_KIND)
def test_the_steps_of_a_run_are_equal_to_the_bit_and_nothing_is_written(home: Path, options: dict[str, Any]) -> None:
    run = train(run_of(home, f"run-{len(list(home.iterdir()))}", **options))
    before = contents(run)
    found = verify(run)
    assert (found.is_equal, found.unlogged_steps, found.changed_conditions) == (True, 0, ())
    assert (found.first_step, found.last_step, found.checkpoint_step) == (3, 6, 6)
    assert contents(run) == before
    from_start = verify(run, origin="start")
    assert (from_start.is_equal, from_start.first_step, from_start.last_step) == (True, 0, 6)


def test_a_mix_of_sources_is_repeated_as_the_checkpoint_says(home: Path, tmp_path: Path) -> None:
    what = run_of(home, "mixed")
    corpora = tuple(
        what.data.train[0].model_copy(update={"path": home / "shards" / name, "weight": weight})
        for name, weight in (("train", 3.0), ("valid", 1.0))
    )
    what = what.model_copy(update={"data": what.data.model_copy(update={"train": corpora})})
    run = train(what, (2, 5, 6))
    found = verify(run / "step-00000005")
    assert (found.is_equal, found.first_step, found.last_step) == (True, 2, 5)


def test_the_command_says_equal_and_exits_with_0(run: Path) -> None:
    answer = typed("verify", run)
    assert answer.code == 0
    tensors = verify(run).compared_tensors
    assert answer.out.splitlines() == [
        "Equal to the bit: 3 steps from step 3 to step 6.",
        f"{tensors} tensors of {run / 'step-00000006'} were compared.",
    ]
    assert f"Repeating 3 steps from {run / 'step-00000003'}: about" in answer.err


def test_the_json_of_a_verification_has_these_keys(run: Path) -> None:
    told = json.loads(typed("verify", run, "--json").out)
    assert told == verify(run).as_dict()
    assert set(told) == {
        *("is_equal", "checkpoint", "first_step", "last_step", "checkpoint_step", "compared_tensors", "step"),
        *("tensor", "differing_tensors", "numbers", "unlogged_steps", "changed_conditions"),
    }


def test_of_fewer_steps_only_the_log_is_compared_and_what_was_left_out_is_said(run: Path) -> None:
    flip_bit(run / "step-00000006", "weights.safetensors", "embedding")
    answer = typed("verify", run, "--steps", 2)
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "The log is equal to the bit: 2 steps from step 3 to step 5.",
        "Step 6 was not repeated, so no tensor was compared.",
    ]
    assert not verify(run, steps=3).is_equal
    (run / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"`steps` is 2, fewer than the 3 that lead .* nothing could be compared"):
        verify(run, steps=2)
    found = verify(run)
    assert (found.unlogged_steps, found.is_equal) == (3, False)


def test_a_run_with_one_checkpoint_is_repeated_from_its_start_if_that_is_cheap(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_only(run, 6)
    found = verify(run)
    assert (found.is_equal, found.first_step, found.last_step) == (True, 0, 6)
    monkeypatch.setattr("lowvram.api.verifying.CHEAP_S", 0.0)
    answer = typed("verify", run)
    assert answer.code == 1
    assert "has no whole checkpoint before step 6" in answer.err
    assert "repeat the whole run with --from start (6 steps, about " in answer.err
    assert verify(run, origin="start").is_equal
    with pytest.raises(CheckpointError, match="has no whole checkpoint before step 6"):
        verify(run, origin="checkpoint")


def test_skipped_steps_are_skipped_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(model: Any, batch: Batch, **settings: Any) -> Loss:
        loss = causal_loss(model, batch, **settings)
        return loss._replace(total=loss.total * (math.nan if int(batch.sample_B[0]) // 8 == 4 else 1.0))

    monkeypatch.setattr(step_module, "causal_loss", poisoned)
    run = train(run_of(home, "skipping"))
    assert verify(run).is_equal
    monkeypatch.undo()
    found = verify(run)
    assert found.step is not None
    assert (found.step.step, found.step.name, found.step.logged) == (5, "loss", None)


def test_a_run_that_halved_its_micro_batch_is_repeated_with_both(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short_of_memory(model: Any, batch: Batch, **settings: Any) -> Loss:
        if int(batch.sample_B[0]) // 8 == 4 and len(batch.sample_B) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return causal_loss(model, batch, **settings)

    monkeypatch.setattr(step_module, "causal_loss", short_of_memory)
    run = train(run_of(home, "halving"))
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["micro_batch"] for row in rows if row["event"] == Halved.__name__] == [4, 2]
    monkeypatch.undo()
    assert verify(run).is_equal
    # Without the log all steps are taken with the later plan, which rounds otherwise.
    (run / "log.jsonl").unlink()
    assert not verify(run).is_equal


@pytest.mark.parametrize("micro_batch", [8, 1])
def test_memory_that_runs_out_ends_the_replay_and_saves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    def short_of_memory(model: Any, batch: Batch, **settings: Any) -> Loss:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(step_module, "causal_loss", short_of_memory)
    for checkpoint in run.glob("step-*"):
        path = checkpoint / "state.json"
        plan = {"micro_batch": micro_batch, "accumulate": 8 // micro_batch}
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"plan": plan}), encoding="utf-8")
        sign_anew(checkpoint)
    before = contents(run)
    made = f"It was made with {micro_batch} sequence"
    with pytest.raises(MemoryRanOutError, match=rf"Memory ran out when step 4 was repeated\. {made}"):
        verify(run)
    assert contents(run) == before


def test_a_run_that_trains_is_verified_and_its_lock_is_left_alone(run: Path) -> None:
    lock = FileLock(run / "lock")
    with lock:
        (run / "owner").write_text("4711\n", encoding="utf-8")
        before = contents(run)
        assert verify(run).is_equal
        assert contents(run) == before
        assert lock.is_locked


def test_checkpoints_that_vanish_meanwhile_are_compared_all_the_same_or_said_to_be_gone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(run, run.with_name("vanishing"), dirs_exist_ok=True)
    task = verify_task(copy)
    found: Verification | None = None
    while found is None:
        try:
            event = next(task)
        except StopIteration as end:
            found = end.value
        # Windows does not delete what is open, and the run that trains leaves it for later.
        if getattr(event, "what", "") == "Repeating the steps" and sys.platform != "win32":
            keep_only(copy)
    assert found is not None
    assert found.is_equal
    shutil.copytree(run, copy, dirs_exist_ok=True)

    def vanish(directory: Path) -> Any:
        shutil.rmtree(directory)
        raise CheckpointError("gone")

    monkeypatch.setattr("lowvram.storage.checkpoint.open_checkpoint", vanish)
    with pytest.raises(CheckpointError, match=r"step-00000006 was deleted while it was read\. The run that trains"):
        verify(copy)


def test_the_steps_are_made_with_the_threads_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "step-00000006/state.json"
    numbers = json.loads(path.read_text(encoding="utf-8"))
    own, asked = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("os.cpu_count", lambda: own + 1)
    for threads in (own + 1, own + 2):
        conditions = numbers["conditions"] | {"threads": threads}
        path.write_text(json.dumps(numbers | {"conditions": conditions}), encoding="utf-8")
        sign_anew(run / "step-00000006")
        assert verify(run).changed_conditions == (f"threads {threads} then, {own} now",)
    assert asked == [own + 1, own, own], "more than the machine has are not taken, and the caller's are put back"


@pytest.mark.nightly
def test_a_run_that_grew_is_repeated_with_the_schedule_of_its_later_part(home: Path) -> None:
    run = train(run_of(home, "growing"), (6,))
    longer = run_of(home, "growing", tokens=9 * 256)
    train(longer, (6, 9))
    assert verify(run).is_equal
    found = verify(run, origin="start")
    assert found.step is not None
    assert found.step.name == "learning_rate"
    assert "train.tokens, which may have been another number then" in found.step.describe()
