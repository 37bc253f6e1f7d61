"""Files that somebody prepared: nothing in them is executed, and no link leads a run out of its directory.

Headers of 2^60 bytes, deep JSON and pickles with a right SHA-256 are in tests/train/test_signed_damage.py, sizes and
nesting of any JSON in tests/storage/test_json_files.py.
"""

from __future__ import annotations

import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.config.run import RunConfig
from lowvram.data.hf_tokenizer import load_tokenizer
from lowvram.data.shards import ShardSet
from lowvram.errors import CheckpointError, LowvramError
from lowvram.generate.saved_run import check_readable
from lowvram.storage.checkpoint import find_checkpoint
from lowvram.train.start import resolve_plan
from tests.faults.rule import STEPS, expect_same_end, faulty_run, train
from tests.faults.test_damaged_checkpoints import NEWEST, OLDER
from tests.resign import sign_anew

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="Windows lets only administrators make links")


@pytest.fixture
def copy(home: Path, whole: Path, tmp_path: Path) -> RunConfig:
    """A finished run, its shards and its tokenizer, in a directory of this test's own."""
    for name in ("shards", "tok"):
        shutil.copytree(home / name, tmp_path / name)
    what = faulty_run(tmp_path, "run")
    shutil.copytree(whole, what.run.dir)
    return what


class Touch:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self._marker), "w")


def test_a_pickle_in_the_place_of_any_file_executes_nothing(copy: RunConfig, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    bomb = pickle.dumps(Touch(marker))
    pickle.loads(bomb).close()
    assert marker.exists(), "the bomb works"
    marker.unlink()
    readers: list[Callable[[], object]] = [
        lambda: find_checkpoint(copy.run.dir, check=check_readable),
        lambda: find_checkpoint(copy.run.dir / NEWEST, check=check_readable),
        lambda: load_tokenizer(copy.data.tokenizer),
        lambda: load_tokenizer(copy.run.dir / NEWEST),
        lambda: ShardSet.open(copy.data.train[0].path).verify(),
        lambda: resolve_plan(copy.run.dir, copy.train),
    ]
    files = [
        *(copy.run.dir / NEWEST).iterdir(),
        copy.run.dir / "plan.json",
        *copy.data.tokenizer.iterdir(),
        *copy.data.train[0].path.iterdir(),
    ]
    assert len(files) > 12
    refused = 0
    for path in files:
        data, manifest = path.read_bytes(), (copy.run.dir / NEWEST / "manifest.json").read_bytes()
        path.write_bytes(bomb)
        if path.parent.name == NEWEST and path.name != "manifest.json":
            sign_anew(path.parent)
        for read in readers:
            try:
                read()
            except LowvramError:
                refused += 1
        path.write_bytes(data)
        (copy.run.dir / NEWEST / "manifest.json").write_bytes(manifest)
    assert refused >= len(files) / 2
    assert not marker.exists()


@needs_links
@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_file_that_is_a_link_is_refused_even_where_its_bytes_are_right(
    copy: RunConfig, whole: Path, tmp_path: Path, name: str
) -> None:
    path = copy.run.dir / NEWEST / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    found, passed_over = find_checkpoint(copy.run.dir)
    assert found.step == STEPS - 1
    assert f"{name} is a symbolic link to {tmp_path / 'elsewhere'}" in str(passed_over[0])
    before = (tmp_path / "elsewhere").read_bytes()
    train(copy)
    expect_same_end(whole, copy.run.dir)
    assert (tmp_path / "elsewhere").read_bytes() == before, "the damaged checkpoint's link is deleted, not its file"


@needs_links
def test_a_checkpoint_directory_that_is_a_link_is_passed_over_and_what_it_leads_to_stays(
    copy: RunConfig, whole: Path, tmp_path: Path
) -> None:
    (copy.run.dir / NEWEST).rename(tmp_path / "elsewhere")
    (copy.run.dir / NEWEST).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    events = train(copy)
    assert "is a symbolic link" in str(events[0].passed_over[0])
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == sorted(
        path.name for path in (whole / NEWEST).iterdir()
    )
    expect_same_end(whole, copy.run.dir)


@needs_links
@pytest.mark.parametrize("name", ["lock", "owner", "log.jsonl"])
def test_a_link_in_the_place_of_a_file_that_a_run_writes_changes_no_other_file(
    copy: RunConfig, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "precious.txt"
    victim.write_text("precious", encoding="utf-8")
    (copy.run.dir / name).unlink(missing_ok=True)
    (copy.run.dir / name).symlink_to(victim)
    with pytest.raises(CheckpointError, match=rf"{name} is a symbolic link\. Writing it would change {victim}"):
        train(copy)
    assert victim.read_text(encoding="utf-8") == "precious"


@needs_links
def test_links_in_the_place_of_files_that_are_replaced_change_no_other_file(
    copy: RunConfig, whole: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "precious.txt"
    victim.write_text("precious", encoding="utf-8")
    shutil.rmtree(copy.run.dir / NEWEST)
    for name in ("plan.json", "reserve"):
        (copy.run.dir / name).unlink(missing_ok=True)
        (copy.run.dir / name).symlink_to(victim)
    train(copy)
    expect_same_end(whole, copy.run.dir)
    assert victim.read_text(encoding="utf-8") == "precious"
    assert (copy.run.dir / OLDER).is_dir()
