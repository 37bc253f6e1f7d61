"""A write is whole or absent, whatever happens in the middle of it."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from lowvram.errors import DiskFullError
from lowvram.files import DISK, free_bytes, sha256
from tests.faults import FaultyDisk, PowerCut


def operations_of_a_write(tmp_path: Path) -> int:
    disk = FaultyDisk()
    disk.write(tmp_path / "counted", b"x")
    return disk.count


@pytest.mark.parametrize("fault", ["full", "cut"])
def test_a_write_leaves_the_old_or_the_new_bytes_at_every_fault(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "file"
    for at in range(operations_of_a_write(tmp_path)):
        path.write_bytes(b"old")
        disk = FaultyDisk(fault, at)
        with pytest.raises(DiskFullError if fault == "full" else PowerCut):
            disk.write(path, b"newer")
        assert path.read_bytes() in (b"old", b"newer")
        assert fault == "cut" or list(tmp_path.glob("*.tmp")) == []


def test_a_write_syncs_the_bytes_before_the_name_and_the_name_last(tmp_path: Path) -> None:
    disk = FaultyDisk()
    disk.write(tmp_path / "file", b"bytes")
    assert disk.seen == ["write_handle", "sync_handle", "rename", "sync_directory"]
    assert (tmp_path / "file").read_bytes() == b"bytes"


def test_a_full_disk_says_where_and_how_much(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=rf"No space left.*{tmp_path.name}.*5 B were needed.*type the same command"):
        FaultyDisk("full", 0).write(tmp_path / "file", b"bytes")


def test_preallocation_reserves_the_bytes(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        DISK.preallocate(file, 1_000_000)
    assert (tmp_path / "file").stat().st_size in (0, 1_000_000)


def test_preallocating_more_than_there_is_fails_at_once(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError, match="space"):
        DISK.preallocate(file, free_bytes(tmp_path) * 2)
    assert (tmp_path / "file").stat().st_size == 0


def test_a_reservation_that_fails_half_way_gives_back_what_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_some_and_fail(handle: int, _offset: int, _size: int) -> None:
        os.write(handle, bytes(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", take_some_and_fail, raising=False)
    with open(tmp_path / "file", "wb") as file, pytest.raises(OSError, match="space"):
        DISK.preallocate(file, 5000)
    assert (tmp_path / "file").stat().st_size == 0


def test_a_deleted_directory_loses_its_name_first(tmp_path: Path) -> None:
    place = tmp_path / "step-1"
    (place / "inside").mkdir(parents=True)
    DISK.delete(place)
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_that_of_hashlib(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_free_bytes_of_a_place_that_does_not_exist_yet_is_its_parents(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.01)
