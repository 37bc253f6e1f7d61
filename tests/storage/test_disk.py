"""A write is whole or absent, whatever happens in the middle of it."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from pathlib import Path

import pytest

from lowvram.errors import DiskFullError
from lowvram.storage.disk import DISK, explain_full_disk, free_bytes, sha256
from tests.faulty_disk import FaultyDisk, PowerCut


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


def test_the_need_of_the_whole_replaces_the_need_of_a_part(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"7\.0 KiB were needed"), explain_full_disk(tmp_path, 7 << 10):
        FaultyDisk("full", 0).write(tmp_path / "file", b"bytes")
    with pytest.raises(DiskFullError, match="5 B were needed"), explain_full_disk(tmp_path):
        FaultyDisk("full", 0).write(tmp_path / "file", b"bytes")


def test_a_file_that_another_library_writes_is_synced_and_can_fail_too(tmp_path: Path) -> None:
    path, disk = tmp_path / "file", FaultyDisk()
    disk.write_with(path, lambda place: place.write_bytes(b"1234") and None)
    assert (disk.seen, path.read_bytes()) == (["write_with", "sync_file", "sync_handle"], b"1234")
    with pytest.raises(PowerCut):
        FaultyDisk("cut", 0).write_with(path, lambda place: place.write_bytes(b"5678") and None)
    assert path.read_bytes() == b"56"


def fail_with(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("name", ["ENOTSUP", "EINVAL", "ENOTTY"])
def test_a_drive_without_full_sync_is_synced_as_far_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fcntl = pytest.importorskip("fcntl")
    synced: list[int] = []
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fail_with(getattr(errno, name)))
    monkeypatch.setattr(os, "fsync", synced.append)
    with open(tmp_path / "file", "wb") as file:
        DISK.sync_handle(file)
        assert synced == [file.fileno()]
        monkeypatch.setattr(fcntl, "fcntl", fail_with(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            DISK.sync_handle(file)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows syncs no directory")
def test_a_drive_that_syncs_no_directory_is_let_be_and_a_failing_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(errno.EINVAL))
    DISK.sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        DISK.sync_directory(tmp_path)


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
    disk = FaultyDisk("cut", 1)
    with pytest.raises(PowerCut):
        disk.delete(place)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-1.{os.getpid()}.deleted"]
    place.mkdir()
    DISK.delete(place)
    assert not place.exists()


def test_deleting_touches_nothing_but_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "a.deleted", f"a.{os.getpid()}.deleted", "linked to"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_bytes(b"x")
    DISK.delete(tmp_path / "a")
    kept = {"a.deleted", f"a.{os.getpid()}.deleted", "linked to"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert all((tmp_path / name / "kept").exists() for name in kept)
    if sys.platform != "win32":
        (tmp_path / "link").symlink_to(tmp_path / "linked to")
        DISK.delete(tmp_path / "link")
        monkeypatch.chdir(tmp_path / "a.deleted")
        DISK.delete(Path("."))
        assert {path.name for path in tmp_path.iterdir()} == kept - {"a.deleted"}
        assert (tmp_path / "linked to" / "kept").exists()


@pytest.mark.parametrize("platform", ["win32", "linux"])
def test_what_a_process_has_open_on_windows_is_not_deleted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "replace", fail_with(errno.EACCES))
    if platform == "win32":
        assert DISK.delete_unless_in_use(tmp_path / "a") is False
    else:
        with pytest.raises(PermissionError):
            DISK.delete_unless_in_use(tmp_path / "a")
    monkeypatch.undo()
    assert DISK.delete_unless_in_use(tmp_path / "a") is True
    assert list(tmp_path.iterdir()) == []


def test_sha256_is_that_of_hashlib(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_free_bytes_of_a_place_that_does_not_exist_yet_is_its_parents(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="sets a POSIX limit")
def test_a_limit_on_the_size_of_files_is_named_with_the_place_and_leaves_the_old_bytes(tmp_path: Path) -> None:
    import resource

    import torch

    from lowvram.storage.tensor_files import write_tensors

    (tmp_path / "file").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = rf"A file in {tmp_path} would be larger than is allowed there\. .*ulimit -f.*FAT32"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
        DISK.write(tmp_path / "file", b"x" * 8192)
        with pytest.raises(DiskFullError, match=message):
            DISK.write(tmp_path / "file", b"y" * 8193)
        with pytest.raises(DiskFullError, match=message), explain_full_disk(tmp_path):
            write_tensors(tmp_path / "tensors", {"w": torch.ones(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "file").read_bytes() == b"x" * 8192


@pytest.mark.parametrize("own, named", [(None, "folder"), ("a", "a")])
def test_an_error_of_the_system_without_a_path_gets_the_one_that_was_written_to(own: str | None, named: str) -> None:
    with pytest.raises(OSError, match="failed") as found, explain_full_disk(Path("folder")):
        raise OSError(errno.EIO, "failed", own)
    assert found.value.filename == named
