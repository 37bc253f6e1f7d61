"""What several flows begin with: a run that was trained by commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flows.typed import fill_home, typed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run of six steps; a module has its own."""
    home = tmp_path_factory.mktemp("home")
    fill_home(home)
    assert typed("train", home / "run.toml", "--device", "cpu").code == 0
    return home / "run"
