"""What costs nothing to check is checked first: a wrong option or value is told before a folder that is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.flows.typed import fill_home, typed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose tokenizer and shards are missing."""
    folder = tmp_path_factory.mktemp("home")
    fill_home(folder)
    for name in ("tok", "shards"):
        shutil.rmtree(folder / name)
    return folder


@pytest.mark.parametrize(
    "words, says",
    [
        ("train {run} --micro-batch 3", "--micro-batch is 3."),
        ("train {run} --set tokens=abc", "--set tokens=abc: 'abc' is not a count"),
        ("fit {run} --micro-batch 3", "--micro-batch is 3."),
        ("fit {run} --set tokens=abc", "--set tokens=abc: 'abc' is not a count"),
        ("fit --gpu rtx4060 --model nope --data nowhere", 'model.preset is "nope"'),
        ("fit --gpu rtx4060 --model tr-25m --micro-batch 3 --data nowhere", "--micro-batch is 3."),
        ("train {run}", "There is no tokenizer in "),
    ],
)
def test_a_wrong_option_is_told_before_a_folder_that_is_missing(home: Path, words: str, says: str) -> None:
    answer = typed(*words.format(run=home / "run.toml").split())
    assert answer.code == 1
    assert answer.err.splitlines()[-1].startswith(f"Error: {says}")
