"""What most faults begin with: text, a tokenizer and shards, and a run that nothing breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.rule import faulty_run, train
from tests.tiny import prepare_home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of text, tokenizer and shards; runs in it have names of their own."""
    place = tmp_path_factory.mktemp("home")
    prepare_home(place)
    return place


@pytest.fixture(scope="session")
def whole(home: Path) -> Path:
    """The directory of a run that ended without a fault."""
    what = faulty_run(home, "whole")
    train(what)
    return what.run.dir
