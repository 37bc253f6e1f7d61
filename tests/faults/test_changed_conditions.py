"""What changed since the last save is refused by its name, or accepted with words that withdraw the bitwise promise.

Configurations that are refused or accepted one by one: tests/train/test_start.py; what is compared of an environment:
tests/train/test_lost_ground.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lowvram
from lowvram.api.training import train as train_by_api
from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.data.shards import pack
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.errors import ConfigError
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.environment import compare_environments, current_environment
from tests.conftest import TURKISH
from tests.faults.rule import STEPS, expect_same_end, faulty_run, rows_of, train
from tests.flows.typed import RUN_FILE, typed

CPU = torch.device("cpu")


@pytest.fixture
def halved(home: Path, tmp_path: Path) -> RunConfig:
    """A run of half the steps, with shards and tokenizer of its own."""
    for name in ("shards", "tok", "train.txt", "valid.txt"):
        source = home / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    what = faulty_run(tmp_path, "run", STEPS // 2)
    train(what)
    return faulty_run(tmp_path, "run", STEPS)


def other_text(what: RunConfig) -> None:
    home = what.run.dir.parent
    (home / "valid.txt").write_text("\n\n".join(TURKISH[3:]), encoding="utf-8")
    pack([home / "valid.txt"], Tokenizer.load(home / "tok"), home / "shards/valid", processes=1, replace=True)


def other_tokenizer(what: RunConfig) -> None:
    home = what.run.dir.parent
    shutil.rmtree(home / "tok")
    tokenizer = train_tokenizer(iter(TURKISH[5:] * 2), 400, home / "tok")
    for name in ("train", "valid"):
        pack([home / f"{name}.txt"], tokenizer, home / "shards" / name, processes=1, replace=True)


def files_of(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("step-*"))


CHANGES: dict[str, tuple[Any, list[str], str]] = {
    "text": (other_text, ["data"], "the training data has other contents"),
    "tokenizer": (other_tokenizer, ["data", "tokenizer"], "the tokenizer has other contents"),
}


@pytest.mark.default_cases("text")
@pytest.mark.parametrize("name", CHANGES)
def test_other_data_is_refused_by_name_and_accepted_where_allowed(halved: RunConfig, name: str) -> None:
    change, kinds, says = CHANGES[name]
    change(halved)
    before = files_of(halved.run.dir)
    with pytest.raises(ConfigError, match=says) as found:
        train(halved)
    words = ", ".join(f'"{kind}"' for kind in kinds)
    assert str(found.value).endswith(f"; `allow=[{words}]` goes on all the same.")
    assert files_of(halved.run.dir) == before
    for kind in kinds[1:]:
        with pytest.raises(ConfigError, match="the training data has other contents"):
            train(halved, allow=(kind,))
    events = train(halved, allow=tuple(kinds))
    assert events[0].step == STEPS // 2
    [notice] = events[0].notices
    assert says in notice
    assert notice.endswith("The run goes on; no other run can equal it to the bit any more.")
    assert find_checkpoint(halved.run.dir)[0].step == STEPS
    assert train(halved)[0].notices == (), "it is allowed once, and saved"


def test_a_recipe_cannot_be_allowed_to_change(halved: RunConfig) -> None:
    other_text(halved)
    changed = halved.model_copy(update={"train": halved.train.model_copy(update={"clip": 0.25})})
    with pytest.raises(ConfigError, match=r"clip was 1\.0 and is now 0\.25; the training data") as found:
        train(changed, allow=("data",))
    assert "`allow=" not in str(found.value), "it would not help"


@pytest.mark.nightly
def test_a_flag_that_is_not_needed_changes_nothing(home: Path, whole: Path) -> None:
    what = faulty_run(home, "allowed")
    train(what, allow=("data", "tokenizer"))
    expect_same_end(whole, what.run.dir)
    assert rows_of(what.run.dir, "Started")[0]["notices"] == []


def test_what_may_not_be_allowed_is_answered_with_what_may(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"`allow` is 'model'\. Known: data, tokenizer\."):
        train_by_api(faulty_run(home, "never"), device="cpu", allow=["model"])
    assert not (home / "never").exists()


def test_the_command_names_the_option_and_takes_it(halved: RunConfig) -> None:
    home = halved.run.dir.parent
    (home / "run.toml").write_text(RUN_FILE, encoding="utf-8")
    words = ("train", home / "run.toml", "--device", "cpu", "--set", "run.dir=typed", "--set", "prompts=[]")
    assert typed(*words).code == 0
    pack([home / "valid.txt"], Tokenizer.load(home / "tok"), home / "shards/train", processes=1, replace=True)
    further = (*words, "--set", "tokens=2048")
    answer = typed(*further)
    assert answer.code == 1
    assert "the training data has other contents" in answer.err
    assert "--allow data goes on all the same" in " ".join(answer.err.split())
    answer = typed(*further, "--allow", "data")
    assert answer.code == 0, answer.err
    assert "Changed as you allowed: the training data has other contents." in " ".join(answer.err.split())


ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "lowvram": ({"lowvram": "0.1.0"}, f"lowvram 0.1.0 then, {lowvram.__version__} now"),
    "torch": ({"torch": "2.11.0"}, f"torch 2.11.0 then, {torch.__version__} now"),
    "micro-batch": ({"micro-batch": 2}, "micro-batch 2 then, 4 now"),
    "compiled": ({"compiled": True}, "compiled True then, False now"),
    "device": ({"device": "mps"}, "device mps then, cpu now"),
    "threads": ({"threads": 64}, "threads 64 then"),
}


@pytest.mark.parametrize("changed, says", ELSEWHERE.values(), ids=ELSEWHERE)
def test_other_conditions_are_told_with_what_they_mean(changed: dict[str, Any], says: str) -> None:
    here = current_environment(CPU, plan=Plan(micro_batch=4, accumulate=2))
    told = compare_environments(here | changed, here)
    assert told is not None
    assert says in told
    assert told.endswith("The run goes on; from here its last bits may differ.")
    assert compare_environments(here, here) is None
    older = {name: value for name, value in here.items() if name not in changed}
    assert compare_environments(older, here) is None, "what an older version did not write is unknown"


def test_another_micro_batch_is_told_at_the_resume(halved: RunConfig) -> None:
    events = train(halved, micro_batch=2)
    assert events[0].notices == (
        "Changed since the last save: micro-batch 4 then, 2 now. The run goes on; from here its last bits may differ.",
    )
    assert train(halved, micro_batch=2)[0].notices == (), "the last save was made with it"
