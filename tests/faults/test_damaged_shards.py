"""Shards that change, rot or cannot be mapped while a run trains: a clear error that names the file, or the same bits.

Shards that are damaged when a run begins: tests/data/test_shard_reading.py and tests/flows/test_bad_input.py; shards
that change while they are open, and ids beyond the vocabulary: tests/train/test_lost_ground.py.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowvram.config.run import RunConfig
from lowvram.data.shards import ShardSet
from lowvram.errors import DataError
from lowvram.train.events import Saved
from tests.faults.rule import break_at, expect_newest_used, expect_same_end, faulty_run, make_trainer, rows_of, train


@pytest.fixture
def what(home: Path, tmp_path: Path) -> RunConfig:
    """A run whose shards are this test's own."""
    for name in ("shards", "tok"):
        shutil.copytree(home / name, tmp_path / name)
    return faulty_run(tmp_path, "run")


def refuse_maps(number: int) -> Callable[..., Any]:
    def refuse(path: Path, *_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    return refuse


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.ENOMEM], ids=["no maps", "refused", "no room"])
def test_where_files_cannot_be_mapped_they_are_read_and_the_ids_are_the_same(
    what: RunConfig, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = what.data.train[0].path
    mapped = ShardSet.open(folder)
    expected = [mapped.read(start, 33).tolist() for start in range(0, mapped.tokens - 33, 7)]
    monkeypatch.setattr(np, "memmap", refuse_maps(number))
    found = ShardSet.open(folder)
    assert [found.read(start, 33).tolist() for start in range(0, found.tokens - 33, 7)] == expected
    starts = np.array([0, 5, found.tokens - 33])
    spans = found.spans(starts, 33)
    assert [array[place : place + 33].tolist() for array, place in spans] == [
        mapped.read(int(start), 33).tolist() for start in starts
    ]
    assert max(array.size for array, _ in spans) == 33, "no more is in memory than what was asked for"


def test_a_run_on_a_file_system_without_maps_ends_the_same(
    what: RunConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "memmap", refuse_maps(errno.ENODEV))
    train(what)
    expect_same_end(whole, what.run.dir)


@pytest.mark.parametrize("deed", ["cut", "gone", "unreadable"])
def test_a_file_that_is_read_and_not_mapped_is_named_where_it_fails(
    what: RunConfig, deed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = what.data.train[0].path
    monkeypatch.setattr(np, "memmap", refuse_maps(errno.ENODEV))
    shards, path = ShardSet.open(folder), folder / "00000.bin"
    shards.read(0, 5)
    monkeypatch.setattr(shards, "refuse_changed", lambda _: None)  # it happens after the check
    if deed == "cut":
        os.truncate(path, 20)
    elif deed == "gone":
        path.unlink()
    else:
        path.unlink()
        path.mkdir()
    says = "is damaged" if deed == "cut" else r"cannot be read\. The system says"
    with pytest.raises(DataError, match=rf"00000\.bin {says}"):
        shards.read(9, 8)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EIO], ids=["gone", "permission", "drive"])
def test_a_file_that_can_be_neither_mapped_nor_read_is_named(
    what: RunConfig, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet.open(what.data.train[0].path)
    monkeypatch.setattr(np, "memmap", refuse_maps(number))
    with pytest.raises(DataError, match=r"00000\.bin cannot be read\. The system says"):
        shards.read(0, 5)


def test_a_drive_that_cannot_read_a_shard_at_the_start_is_an_error_with_its_name(
    what: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    shards = ShardSet.open(what.data.train[0].path)
    monkeypatch.setattr("lowvram.data.shard_set.sha256", fail)
    with pytest.raises(DataError, match=r"00000\.bin cannot be read\. The system says: Input/output error"):
        shards.verify()


def rot(path: Path) -> None:
    """Flip a bit as a drive does: neither the size nor the time of the file tells of it."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_bit_that_rots_while_a_run_trains_is_found_within_an_epoch_and_a_mended_shard_goes_on(
    what: RunConfig, whole: Path
) -> None:
    path, kept = what.data.train[0].path / "00000.bin", what.run.dir.parent / "kept.bin"
    shutil.copy2(path, kept)
    an_epoch = make_trainer(what).loader._windows[0] / what.train.batch_samples  # in steps
    assert 1 < an_epoch < 4
    with pytest.raises(DataError, match=r"00000\.bin is damaged\. Its SHA-256 is not"):
        break_at(what, Saved, 2, lambda: rot(path))
    assert rows_of(what.run.dir, "StepDone")[-1]["step"] <= 2 + an_epoch
    # The shard is mended as the error says, and the steps in which it was rotten are thrown away.
    shutil.copy2(kept, path)
    for directory in what.run.dir.glob("step-*"):
        if int(directory.name[5:]) > 2:
            shutil.rmtree(directory)
    expect_newest_used(train(what), 2)
    expect_same_end(whole, what.run.dir)


def test_each_epoch_of_each_corpus_is_verified_once(what: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    loader = make_trainer(what).loader
    monkeypatch.setattr(ShardSet, "verify", lambda self: seen.append(1))
    windows = loader._windows[0]
    loader.batch(0, 1)
    loader.batch(windows - 1, 1)
    assert seen == [], "whoever opened the shards has verified them"
    loader.batch(windows, 1)
    loader.batch(windows + 1, 1)
    loader.batch(0, 1)
    assert seen == [1]
    loader.batch(5 * windows, 1)
    assert seen == [1, 1]
