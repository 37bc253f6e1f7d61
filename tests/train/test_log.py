"""Logs hold every event, as JSON that any reader takes, as TensorBoard files, and as calls to Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowvram.errors import CheckpointError, MachineError
from lowvram.train.events import (
    Evaluated,
    Event,
    Halved,
    Recorded,
    Rotated,
    Sampled,
    Saved,
    SourceLoss,
    Started,
    StepDone,
    Stopped,
)
from lowvram.train.log import JsonlLog, open_logs, scalars

STEP = StepDone(3, 768, 5.25, 0.5, 1e-3, 1234.5, 1 << 30, 60.0, skipped=0)
EVENTS: tuple[Event, ...] = (
    Started(2, 6, Path("runs/a/step-00000002"), (CheckpointError("weights.safetensors was altered."),)),
    STEP,
    Evaluated(3, 5.5, 2.75),
    Sampled(3, "Kış", " geldi; “ğüş”\n\x1b[31m\u2028"),
    Saved(3, Path("runs/a/step-00000003"), 0.25, 0.125),
    Evaluated(3, 5.25, 2.5, reads_masters=True, pairs_right=0.75, suffix_bits={"stem": 1.5}, choices_right=0.25),
    Rotated(3, (0, 2), 1_000, 5_000, 0.5),
    Halved(3, 4, 16),
    Recorded(3, "memory ran out."),
    Stopped(3, is_finished=False),
)


def refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def rows_of(path: Path) -> list[dict[str, Any]]:
    # parse_constant sees NaN and Infinity, which Python would take and other readers would not.
    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write_all(path: Path, *events: Event) -> None:
    log = JsonlLog(path)
    for event in events:
        log.write(event)
    log.close()


def test_every_event_is_one_row_with_all_its_values(tmp_path: Path) -> None:
    began = time.time()
    write_all(tmp_path / "new" / "log.jsonl", *EVENTS)
    rows = rows_of(tmp_path / "new" / "log.jsonl")
    assert all(began - 1 <= row.pop("time_s") <= time.time() + 1 for row in rows)
    assert rows == [
        {"event": "Started", "step": 2, "steps": 6, "resumed_from": str(Path("runs/a/step-00000002")),
         "passed_over": ["weights.safetensors was altered."], "began_from": None, "notices": []},
        {"event": "StepDone", "step": 3, "tokens": 768, "loss": 5.25, "gradient_norm": 0.5, "learning_rate": 1e-3,
         "tokens_per_second": 1234.5, "memory_bytes": 1 << 30, "left_s": 60.0, "skipped": 0},
        {"event": "Evaluated", "step": 3, "loss": 5.5, "bits_per_byte": 2.75, "reads_masters": False,
             "pairs_right": None, "pairs_problem": "", "suffix_bits": None, "suffixes_problem": "",
             "choices_right": None, "choices_problem": ""},
        {"event": "Sampled", "step": 3, "prompt": "Kış", "text": " geldi; “ğüş”\n\x1b[31m\u2028", "problem": ""},
        {"event": "Saved", "step": 3, "directory": str(Path("runs/a/step-00000003")), "took_s": 0.25, "held_s": 0.125},
        {"event": "Evaluated", "step": 3, "loss": 5.25, "bits_per_byte": 2.5, "reads_masters": True,
             "pairs_right": 0.75, "pairs_problem": "", "suffix_bits": {"stem": 1.5}, "suffixes_problem": "",
             "choices_right": 0.25, "choices_problem": ""},
        {"event": "Rotated", "step": 3, "experts": [0, 2], "card_bytes": 1_000, "host_bytes": 5_000, "took_s": 0.5},
        {"event": "Halved", "step": 3, "micro_batch": 4, "accumulate": 16},
        {"event": "Recorded", "step": 3, "problem": "memory ran out."},
        {"event": "Stopped", "step": 3, "is_finished": False},
    ]  # fmt: skip


def test_the_loss_of_each_source_is_in_the_row_and_in_the_charts(tmp_path: Path) -> None:
    each = {"tr/law": SourceLoss(4.5, 1.25, 800), "kk": SourceLoss(math.nan, math.nan, 200)}
    event = Evaluated(3, 5.5, 2.75, by_source=each)
    write_all(tmp_path / "log.jsonl", event)
    [row] = rows_of(tmp_path / "log.jsonl")
    assert row["by_source"] == {
        "tr/law": {"loss": 4.5, "bits_per_byte": 1.25, "text_bytes": 800},
        "kk": {"loss": None, "bits_per_byte": None, "text_bytes": 200},
    }
    assert scalars(event)["valid/bits_per_byte/tr/law"] == 1.25


def test_a_row_is_on_the_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    for count, event in enumerate(EVENTS, 1):
        log.write(event)
        assert len(rows_of(tmp_path / "log.jsonl")) == count
    log.close()


def test_a_second_start_goes_on_below_the_first(tmp_path: Path) -> None:
    write_all(tmp_path / "log.jsonl", *EVENTS)
    write_all(tmp_path / "log.jsonl", *EVENTS[:2])
    names = [row["event"] for row in rows_of(tmp_path / "log.jsonl")]
    assert names == [type(event).__name__ for event in (*EVENTS, *EVENTS[:2])]


def test_a_torn_last_row_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write_all(path, STEP)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    write_all(path, EVENTS[-1])
    first, torn, last = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["event"] == "StepDone"
    assert torn == first[: len(torn)]
    assert json.loads(last)["event"] == "Stopped"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_number_that_json_does_not_know_is_null(tmp_path: Path, value: float) -> None:
    skipped = StepDone(1, 256, value, value, 1e-3, 1.0, 1, 1.0, skipped=1)
    write_all(tmp_path / "log.jsonl", skipped)
    (row,) = rows_of(tmp_path / "log.jsonl")
    assert (row["loss"], row["gradient_norm"], row["skipped"]) == (None, None, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_steps_validation_and_rotation_have_numbers_for_charts_and_nothing_else_has() -> None:
    assert scalars(STEP) == {
        "train/loss": 5.25,
        "train/gradient_norm": 0.5,
        "train/learning_rate": 1e-3,
        "train/tokens_per_second": 1234.5,
    }
    assert scalars(EVENTS[2]) == {"valid/loss": 5.5, "valid/bits_per_byte": 2.75}
    assert scalars(EVENTS[5]) == {
        "valid_masters/loss": 5.25,
        "valid_masters/bits_per_byte": 2.5,
        "valid_masters/pairs_right": 0.75,
        "valid_masters/choices_right": 0.25,
        "valid_masters/suffix_bits/stem": 1.5,
    }
    assert scalars(EVENTS[6]) == {"rotation/card_bytes": 1_000, "rotation/host_bytes": 5_000}
    assert [scalars(event) for event in (EVENTS[0], *EVENTS[3:5], *EVENTS[7:])] == [{}] * 6


def test_jsonl_is_always_written_and_the_rest_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [type(log) for log in open_logs(tmp_path, ())] == [JsonlLog]
    assert (tmp_path / "log.jsonl").exists()
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    assert [type(log).__name__ for log in open_logs(tmp_path, ("wandb",))] == ["JsonlLog", "TrackerThread"]


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, log = open_logs(tmp_path, ("tensorboard",))
    for event in EVENTS:
        log.write(event)
    log.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {name for event in EVENTS for name in scalars(event)}
    (loss,) = found.Scalars("train/loss")
    assert (loss.step, loss.value) == (3, 5.25)
    (tag,) = found.Tags()["tensors"]
    assert tag.startswith("sample/Kış")
    assert "geldi" in found.Tensors(tag)[0].tensor_proto.string_val[0].decode()


class FakeWandb(ModuleType):
    """Notes what is asked of it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def init(self, *args: Any, **options: Any) -> FakeWandb:
        self.calls.append(("init", args, options))
        return self

    def log(self, *args: Any, **options: Any) -> None:
        self.calls.append(("log", args, options))

    def finish(self, *args: Any, **options: Any) -> None:
        self.calls.append(("finish", args, options))


def test_weights_and_biases_is_started_told_the_numbers_and_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    _, log = open_logs(tmp_path / "first", ("wandb",))
    for event in EVENTS:
        log.write(event)
    log.close()
    (begun, args, options), *logged, ended = wandb.calls
    assert (begun, args) == ("init", ())
    identity = options.pop("id")
    assert options == {"project": "lowvram", "name": "first", "resume": "allow", "dir": str(tmp_path / "first")}
    assert logged == [("log", (numbers,), {"step": 3}) for event in EVENTS if (numbers := scalars(event))]
    assert len(logged) == 4
    assert ended == ("finish", (), {})
    assert identity.isalnum()


def test_weights_and_biases_resumes_a_directory_and_never_another_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for run in ("a/first", "a/first", "b/first"):
        open_logs(tmp_path / run, ("wandb",))
    one, again, other = (options["id"] for _, _, options in wandb.calls)
    assert one == again != other


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_package_that_is_not_installed_is_answered_with_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MachineError, match=rf"run\.log names \"{name}\".*pip install {name}"):
        open_logs(tmp_path, (name,))
    assert list(tmp_path.iterdir()) == []
