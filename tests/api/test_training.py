"""`lowvram.api.train`: a run as an iterator of events, with the settings that were chosen before its first step."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor, equal

from lowvram.api import LowvramError, Notice, RunSettings, TrainingRun, train
from lowvram.api.overrides import assignments
from lowvram.api.training import read_run_file
from lowvram.cli import train as command
from lowvram.errors import BusyError, ConfigError
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.storage.manifest import WEIGHTS
from lowvram.train.events import Saved, Started, StepDone, Stopped
from tests.flows.typed import fill_home, typed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    return folder


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, Tensor]:
    """The weights of the run that the command trains without an interruption."""
    words = ("--device", "cpu", "--set", f'run.dir="{home / "whole"}"')
    assert typed("train", home / "run.toml", *words).code == 0
    return weights_of(home / "whole")


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(find_checkpoint(run)[0].directory / WEIGHTS)


def begin(home: Path, name: str, progress: bool = False) -> TrainingRun:
    return train(home / "run.toml", overrides={"run.dir": home / name}, device="cpu", progress=progress)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not equal(found[name], expected[name])] == []


def test_a_run_that_the_api_begins_is_finished_by_the_command_with_equal_bits(
    home: Path, whole: dict[str, Tensor]
) -> None:
    with begin(home, "api-first") as run:
        for event in run:
            if isinstance(event, StepDone) and event.step == 3:
                run.stop()
    assert find_checkpoint(home / "api-first")[0].step == 3
    words = ("--device", "cpu", "--set", f'run.dir="{home / "api-first"}"')
    answer = typed("train", home / "run.toml", *words)
    assert answer.code == 0
    assert "(step 3 of 6)." in answer.err
    assert_same_bits(weights_of(home / "api-first"), whole)


def test_a_run_that_the_command_begins_is_finished_by_the_api_with_equal_bits(
    home: Path, whole: dict[str, Tensor]
) -> None:
    what = read_run_file(home / "run.toml", {"run.dir": home / "api-last"})
    assert command.train(what, device="cpu", stop_at=3) == Stopped(3, is_finished=False)
    events = list(begin(home, "api-last"))
    started = next(event for event in events if isinstance(event, Started))
    assert (started.step, started.steps) == (3, 6)
    assert_same_bits(weights_of(home / "api-last"), whole)


def test_settings_stand_before_the_first_step_and_events_follow_in_order(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with begin(home, "events", progress=True) as run:
        settings = run.settings
        assert isinstance(settings, RunSettings)
        assert settings.config.run.dir == home / "events"
        assert settings.device.type == "cpu"
        assert settings.plan.micro_batch * settings.plan.accumulate == 8
        assert not settings.is_kept
        assert not settings.graphs
        assert settings.limit_bytes == run.budget.limit_bytes > 0
        assert run.trainer.state.step == 0, "nothing was trained yet"
        assert any(notice.text.startswith("Plan: ") and settings.plan_reason in notice.text for notice in run.notices)
        events = [event for event in run if not isinstance(event, Notice)]
    assert isinstance(events[0], Started)
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(events[-2], Saved)
    assert events[-1] == Stopped(6, is_finished=True)
    assert capsys.readouterr() == ("", "")


def test_a_run_holds_its_directory_until_it_is_closed_or_exhausted(home: Path) -> None:
    run = begin(home, "held")
    with pytest.raises(BusyError, match="Another process is training in"):
        begin(home, "held")
    run.close()
    with begin(home, "held") as second:
        next(second)
    third = begin(home, "held")
    third.stop()
    assert list(third)[-1] == Stopped(0, is_finished=False)
    begin(home, "held").close()
    run.close()
    assert list(run) == [], "a run that was closed is over"


def test_a_plan_that_was_asked_for_is_settled(home: Path) -> None:
    asked = {"micro_batch": 2, "recompute": "block", "compile": False, "graphs": False}
    run = train(home / "run.toml", overrides=[f'run.dir="{home / "asked"}"'], device="cpu", **asked)
    run.close()
    plan = run.settings.plan
    assert (plan.micro_batch, plan.accumulate, plan.recompute, plan.compile) == (2, 4, "block", False)
    assert run.settings.plan_reason == "you asked for it"


@pytest.mark.parametrize(
    "overrides, says",
    [
        ({"tokns": 5}, "there is no key tokns"),
        ({"data.tokenizer": "nowhere"}, "nowhere"),
        ({"data.train": "nowhere"}, "nowhere"),
    ],
    ids=["a key", "a tokenizer", "shards"],
)
def test_what_cannot_be_meant_is_an_error_in_three_parts_and_nothing_is_printed(
    home: Path, overrides: dict[str, object], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LowvramError, match=says) as caught:
        train(home / "run.toml", overrides={"run.dir": home / "refused", **overrides}, device="cpu")
    assert caught.value.what
    assert caught.value.fix
    assert capsys.readouterr() == ("", "")
    with pytest.raises(LowvramError):
        train(home / "run.toml", device="tpu")


def test_a_start_that_fails_gives_the_directory_back(home: Path) -> None:
    with pytest.raises(ConfigError, match="`micro_batch` is 3"):
        train(home / "run.toml", overrides={"run.dir": home / "back"}, device="cpu", micro_batch=3)
    begin(home, "back").close()


def test_overrides_are_spelt_as_toml() -> None:
    given = {"a": 3e-4, "b": "tr", "c": True, "d": ["x", 1], "e": {"name": "muon", "bits": 8}, "f": Path("runs/x")}
    assert assignments(given) == [
        "a=0.0003",
        'b="tr"',
        "c=true",
        'd=["x", 1]',
        'e={ name = "muon", bits = 8 }',
        'f="runs/x"',
    ]
    assert assignments(("a=1",)) == ["a=1"]
