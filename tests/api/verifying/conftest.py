"""What verifying begins with: a run with the checkpoints of steps 2, 3 and 6."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import prepare_home
from tests.verified import copy_run, run_of, train


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of text, tokenizer and shards with the run `plain`; further runs in it have names of their own."""
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    train(run_of(place, "plain"), (2, 3, 6))
    return place


@pytest.fixture
def run(home: Path) -> Path:
    """A copy of that run."""
    return copy_run(home)
