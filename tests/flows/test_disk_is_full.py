"""What a user sees where the disk is full: a run that waits, a log that is told, old files that stay."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lowvram.storage.checkpoint import find_checkpoint
from lowvram.storage.disk import Disk
from tests.flows.test_bad_input import expect_error, seen
from tests.flows.typed import typed


@pytest.fixture
def home(run: Path) -> Path:
    """The directory of the finished run, its run file, text, tokenizer and shards."""
    return run.parent


def test_on_a_full_disk_a_run_says_what_it_waits_for_and_ends_when_there_is_room(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    before = seen(run / "step-00000006")

    def make_room(seconds: float) -> None:
        assert seen(run / "step-00000006") == before
        assert list(run.glob("*.tmp")) == []
        monkeypatch.undo()

    for module in ("checkpoint", "reserve"):
        monkeypatch.setattr(f"lowvram.storage.{module}.free_bytes", lambda _: 10)
    monkeypatch.setattr("lowvram.train.saver.sleep", make_room)
    answer = typed("train", home / "run.toml", "--set", f"run.dir={run}", "--set", "tokens=2048")
    assert answer.code == 0
    told = " ".join(answer.err.split())
    assert re.search(r"step 8 paused: The next checkpoint in \S+run needs \S+ KiB, and 10 B are free\. .* Ctrl-C", told)
    assert "step 8 goes on after" in told
    assert find_checkpoint(run)[0].step == 8


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_where_the_log_finds_no_room_the_run_is_finished_and_saved_and_then_says_so(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").symlink_to("/dev/full")
    answer = typed("train", home / "run.toml", "--set", f"run.dir={run}", "--set", "tokens=2048")
    expect_error(answer, r"No space left to write in \S+run\.")
    assert find_checkpoint(run)[0].step == 8, "the log alone found no room"


def test_a_full_disk_leaves_the_old_tokenizer_and_the_old_shards(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = seen(home)
    monkeypatch.setattr(Disk, "write_handle", refuse)
    answer = typed("tokenizer", "train", home / "valid.txt", "--vocab", 300, "--out", home / "tok", "--replace")
    expect_error(answer, r"No space left to write in \S+tok\.")
    words = ("--tokenizer", home / "tok", "--out", home / "shards/train", "--replace")
    answer = typed("data", "pack", home / "valid.txt", *words)
    expect_error(answer, r"No space left to write in \S+train\.")
    assert seen(home) == before
