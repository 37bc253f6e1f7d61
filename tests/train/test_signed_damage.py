"""Checkpoints whose files have the right SHA-256 and hold what no run saves: the older one is used, or said to be."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowvram.api import loading
from lowvram.api.tasks import finish
from lowvram.config.run import RunConfig
from lowvram.errors import CheckpointError
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.storage.manifest import OtherVersionError
from lowvram.train.events import Started
from tests.loaded import load_model
from tests.resign import remove_checksum, sign_anew
from tests.tiny import prepare_home, tiny_run, trainer_of

ROTATING: dict[str, Any] = {"kind": "mla-moe", "rotation": {"window": 2, "interval": 2}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and two runs with the checkpoints of steps 5 and 6."""
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    for what in (run_of(place, "plain"), run_of(place, "rotating", **ROTATING)):
        list(trainer_of(what).run())
    return place


def run_of(home: Path, name: str, **train: Any) -> RunConfig:
    what = tiny_run(home, run=name, **train)
    options = {"save_every_minutes": 1e-9, "prompts": (), "validate_every": 1000}
    return what.model_copy(update={"run": what.run.model_copy(update=options)})


def begin(what: RunConfig) -> Started:
    """Return the first event of a run: what it goes on from."""
    event = next(iter(trainer_of(what).run()))
    assert isinstance(event, Started)
    return event


@pytest.fixture
def copy_of(home: Path, tmp_path: Path) -> Callable[[str], tuple[RunConfig, Path]]:
    """Return a copy of a run and the directory of its newest checkpoint."""

    def copy(name: str) -> tuple[RunConfig, Path]:
        shutil.copytree(home / name, home / f"{tmp_path.name}-{name}", dirs_exist_ok=True)
        what = run_of(home, f"{tmp_path.name}-{name}", **(ROTATING if name == "rotating" else {}))
        return what, what.run.dir / "step-00000006"

    return copy


def change_numbers(directory: Path, **values: Any) -> None:
    path = directory / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(data)


def put(name: str, key: str, tensor: torch.Tensor | None) -> Callable[[Path], object]:
    """Replace a tensor of a file, or take it out."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(key, None)
        tensors.update({} if tensor is None else {key: tensor})

    return lambda directory: change_tensors(directory / name, change)


HUGE = (1 << 60).to_bytes(8, "little") + b"{}"
PICKLE = pickle.dumps({"embedding": [1.0]})
FOR_ALL: dict[str, Callable[[Path], object]] = {
    "weights with a header of 2^60 bytes": write("weights.safetensors", HUGE),
    "weights that are a pickle": write("weights.safetensors", PICKLE),
    "weights of no bytes": write("weights.safetensors", b""),
    "weights with a list as header": write("weights.safetensors", (2).to_bytes(8, "little") + b"[]"),
    "state.json that is a list": write("state.json", b"[6]"),
    "state.json that is null": write("state.json", b"null"),
    "state.json nested deeply": write("state.json", b'{"step": 6, "a": ' + b"[" * 70 + b"]" * 70 + b"}"),
    "state.json in Latin-5": write("state.json", '{"ı": 1}'.encode("iso-8859-9")),
    "another step in state.json": lambda directory: change_numbers(directory, step=5),
    "true as step": lambda directory: change_numbers(directory, step=True),
    "config.json that is a text": write("config.json", b'"model"'),
    "config.json without a run": write("config.json", b"{}"),
    "config.json with a list as data": write("config.json", b'{"data": [], "model": 3}'),
    "a weight less": put("weights.safetensors", "norm.weight", None),
    "a weight more": put("weights.safetensors", "strange", torch.ones(2)),
    "a weight of another shape": put("weights.safetensors", "norm.weight", torch.ones(33)),
}
FOR_TRAINING: dict[str, Callable[[Path], object]] = {
    "a state with a header of 2^60 bytes": write("state.safetensors", HUGE),
    "a state that is a pickle": write("state.safetensors", PICKLE),
    "a state less": put("state.safetensors", "exp_avg.norm.weight", None),
    "a state of no weight": put("state.safetensors", "exp_avg.strange", torch.ones(2)),
    "a state without a name": put("state.safetensors", "strange", torch.ones(2)),
    "a state of another shape": put("state.safetensors", "exp_avg.norm.weight", torch.ones(33)),
    "a step of two numbers": put("state.safetensors", "step.norm.weight", torch.ones(2)),
    "tokens below zero": lambda directory: change_numbers(directory, tokens=-1),
    "tokens that are a text": lambda directory: change_numbers(directory, tokens="1536"),
    "a list as skipped steps": lambda directory: change_numbers(directory, skipped_in_row=[]),
    "a loss scale of 0": lambda directory: change_numbers(directory, loss_scale=0.0),
}
OF_ROTATION: dict[str, Callable[[Path], object]] = {
    "an interval that is a text": lambda directory: change_numbers(directory, rotation={"interval": "2", "slots": []}),
    "an expert in two slots": lambda d: change_numbers(d, rotation={"interval": 2, "slots": [0, 0, 1, 2]}),
    "rotation that is a list": lambda directory: change_numbers(directory, rotation=[1]),
    "a rotating weight of fewer experts": put("weights.safetensors", "blocks.1.ffn.down_EDI", torch.ones(2, 32, 32)),
    "a rotating state less": put("state.safetensors", "step.blocks.1.ffn.down_EDI", None),
    "a rotating state of another size": put("state.safetensors", "step.blocks.1.ffn.down_EDI", torch.ones(5)),
}


@pytest.mark.parametrize("damage", [*FOR_ALL.values(), *FOR_TRAINING.values()], ids=[*FOR_ALL, *FOR_TRAINING])
def test_a_run_goes_on_from_the_older_checkpoint(copy_of: Any, damage: Callable[[Path], object]) -> None:
    what, newest = copy_of("plain")
    damage(newest)
    sign_anew(newest)
    started = begin(what)
    assert (started.step, len(started.passed_over)) == (5, 1)
    assert started.resumed_from == what.run.dir / "step-00000005"


@pytest.mark.parametrize("damage", OF_ROTATION.values(), ids=OF_ROTATION)
def test_experts_that_rotate_go_on_from_the_older_checkpoint_too(
    copy_of: Any, damage: Callable[[Path], object]
) -> None:
    what, newest = copy_of("rotating")
    assert begin(what).step == 6
    damage(newest)
    sign_anew(newest)
    assert begin(what).step == 5


@pytest.mark.parametrize("damage", FOR_ALL.values(), ids=FOR_ALL)
def test_a_model_is_read_from_the_older_checkpoint(copy_of: Any, damage: Callable[[Path], object]) -> None:
    what, newest = copy_of("plain")
    damage(newest)
    sign_anew(newest)
    loaded, notices = finish(loading.load_model(what.run.dir, "cpu"))
    assert loaded.checkpoint is not None
    assert loaded.checkpoint.step == 5
    assert [notice.text.partition(":")[0] for notice in notices[:1]] == ["Passed over a corrupt checkpoint"]
    with pytest.raises(CheckpointError):  # named itself, it is an error and no traceback
        load_model(newest, "cpu")


def test_a_configuration_of_another_version_is_never_passed_over(copy_of: Any) -> None:
    what, newest = copy_of("plain")
    config = json.loads((newest / "config.json").read_text(encoding="utf-8"))
    (newest / "config.json").write_text(json.dumps(config | {"later": {"key": 1}}), encoding="utf-8")
    sign_anew(newest, versions={"lowvram": "7.8.9"})
    for look in (lambda: begin(what), lambda: load_model(what.run.dir, "cpu")):
        with pytest.raises(OtherVersionError, match=r"does not know\. later: .* Update lowvram to 7\.8\.9, which"):
            look()
    # The version's number stays the same for many commits, so a key alone tells that later code wrote it.
    sign_anew(newest, versions=json.loads((what.run.dir / "step-00000005/manifest.json").read_bytes())["versions"])
    with pytest.raises(OtherVersionError, match=r"does not know\. later: .* Update lowvram\.$"):
        begin(what)


def test_a_whole_checkpoint_that_was_passed_over_is_kept(copy_of: Any) -> None:
    what, newest = copy_of("plain")
    newest = newest.rename(newest.with_name("step-00000009"))
    change_numbers(newest, step=9, loss_scale="1")  # as a later version might write it
    sign_anew(newest, step=9)
    longer = what.model_copy(update={"train": what.train.model_copy(update={"tokens": 8 * 256})})
    events = list(trainer_of(longer).run())
    assert events[0].step == 5
    assert len(events[0].passed_over) == 1
    assert sorted(path.name for path in what.run.dir.glob("step-*"))[-2:] == ["step-00000008", "step-00000009"]


def test_a_checkpoint_of_before_the_checksum_is_noticed_once_and_the_next_save_has_one(copy_of: Any) -> None:
    what, newest = copy_of("plain")
    remove_checksum(newest)
    longer = what.model_copy(update={"train": what.train.model_copy(update={"tokens": 8 * 256})})
    events = list(trainer_of(longer).run())
    assert isinstance(events[0], Started)
    assert (events[0].step, len(events[0].notices)) == (6, 1)
    assert "its manifest has no checksum" in events[0].notices[0]
    assert find_checkpoint(what.run.dir)[0].notice is None
    assert begin(longer).notices == ()


def test_a_further_stage_starts_from_the_older_checkpoint_of_its_origin(copy_of: Any, tmp_path: Path) -> None:
    what, newest = copy_of("plain")
    FOR_ALL["a weight less"](newest)
    sign_anew(newest)
    train = what.train.model_copy(update={"start_from": what.run.dir})
    run = what.run.model_copy(update={"dir": tmp_path / "stage"})
    started = begin(what.model_copy(update={"train": train, "run": run}))
    assert (started.began_from, len(started.passed_over)) == (what.run.dir / "step-00000005", 1)
