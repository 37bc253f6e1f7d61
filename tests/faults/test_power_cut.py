"""What was said to be on the drive is there after a power cut: files are synced, then renamed, then the directory.

The order is asserted for every file that a command renames into its place; and a real file system is copied in the
middle of a run, with nothing but what was synced, and goes on.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from lowvram.storage.disk import Disk
from tests.faults.children import WAIT_S, start, train_on
from tests.faults.rule import expect_same_end, expect_same_weights, faulty_run, train
from tests.flows.typed import typed, write_home
from tests.storage.test_checkpoint import save

CUTS = 12
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and mounts file systems")


class Call(NamedTuple):
    """A call of the system that decides what a power cut leaves.

    inode: of what is synced, or of what gets a new name.  target: the new name.  parent: the inode of its directory.
    holds: the inodes of the files in a directory that gets a new name.  thread: the one that made the call.
    """

    name: str
    inode: int
    target: Path | None = None
    parent: int = 0
    holds: tuple[int, ...] = ()
    thread: int = 0


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Note every sync and every rename in this process."""
    calls: list[Call] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def note(source: str | Path, target: str | Path) -> None:
        source, target = Path(source), Path(target)
        holds = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else []
        parent = os.stat(target.parent).st_ino
        inodes = tuple(path.stat().st_ino for path in holds)
        calls.append(Call("rename", source.stat().st_ino, target, parent, inodes, threading.get_ident()))

    def noted_fsync(handle: int) -> None:
        calls.append(Call("sync", os.fstat(handle).st_ino, thread=threading.get_ident()))
        fsync(handle)

    def noted_replace(source: str | Path, target: str | Path, **more: int) -> None:
        note(source, target)
        replace(source, target, **more)

    def noted_rename(source: str | Path, target: str | Path, **more: int) -> None:
        note(source, target)
        rename(source, target, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(os, "replace", noted_replace)
        patch.setattr(os, "rename", noted_rename)
        yield calls


def out_of_order(calls: list[Call], durable: set[int]) -> list[str]:
    """Return the renames before which something was not synced, or after which the directory was not the next synced.

    durable: inodes of files that were on the drive before.  What is renamed in order to be deleted needs no sync.
    """
    problems, synced = list[str](), set(durable)
    for number, call in enumerate(calls):
        if call.name == "sync":
            synced.add(call.inode)
            continue
        assert call.target is not None
        if call.target.name.endswith(".deleted"):
            continue
        if not {call.inode, *call.holds} <= synced:
            problems.append(f"{call.target} was renamed before it was synced")
        # Another thread may write a file of its own meanwhile.
        following = next((later for later in calls[number + 1 :] if later.thread == call.thread), None)
        if following is None or (following.name, following.inode) != ("sync", call.parent):
            problems.append(f"the directory of {call.target} was not synced after the rename")
    return problems


def names_of(calls: list[Call]) -> set[str]:
    return {call.target.name for call in calls if call.target is not None}


@linux
@pytest.mark.default_cases("its data")
@pytest.mark.parametrize("has_exports", [False, True], ids=["its data", "its exports"])
def test_every_file_of_a_run_and_of_its_data_is_synced_renamed_and_its_directory_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_exports: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    write_home(tmp_path)
    commands = {
        "tokenizer": ("tokenizer", "train", "train.txt", "--vocab", 400, "--out", "tok"),
        "pack": ("data", "pack", "train.txt", "--tokenizer", "tok", "--out", "shards/train", "--processes", 1),
        "valid": ("data", "pack", "valid.txt", "--tokenizer", "tok", "--out", "shards/valid", "--processes", 1),
        "train": ("train", "run.toml", "--set", "save_every_minutes=1e-9", "--device", "cpu"),
        "hf": ("export", "run", "--to", "hf", "--out", "hf"),
        "gguf": ("export", "run", "--to", "gguf", "--out", "model.gguf"),
    }
    expected = {
        "tokenizer": {"tokenizer.json", "tokenizer_config.json"},
        "pack": {"00000.bin", "00000.json", "00000.places", "shards.json"},
        "valid": {"00000.bin", "shards.json"},
        "train": {"plan.json", "step-00000006", "manifest.json", "state.json"},
        "hf": set(),
        "gguf": {"model.gguf"},
    }
    for name, words in commands.items():
        if words[0] == "export" and not has_exports:
            continue
        durable = {path.stat().st_ino for path in tmp_path.rglob("*") if path.is_file()}
        with recorded() as calls:
            answer = typed(*words)
        assert answer.code == 0, answer.err
        assert expected[name] <= names_of(calls), name
        assert out_of_order(calls, durable) == [], name


@linux
def test_the_check_finds_a_file_that_is_renamed_unsynced_and_a_directory_that_is_not_synced(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with recorded() as calls:
        os.replace(tmp_path / "a", tmp_path / "b")
    assert [problem.split(str(tmp_path))[1][:2] for problem in out_of_order(calls, set())] == ["/b", "/b"]
    with recorded() as calls:
        save(tmp_path / "run", _tokenizer(tmp_path), 1)
    assert out_of_order(calls, set()) == []
    syncs = [number for number, call in enumerate(calls) if call.name == "sync"]
    needed = [n for n in syncs if out_of_order([call for at, call in enumerate(calls) if at != n], set())]
    assert len(needed) >= len(syncs) - 2, "each one that is left out is missed, but for two directories' second"


def _tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """Mount an image of a file system; skips where that is refused."""
    place.mkdir(exist_ok=True)
    words = ["mount", "-o", "loop", str(image), str(place)]
    if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("Mounting a file system is refused here.")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


@linux
@pytest.mark.nightly
def test_a_drive_that_is_cut_off_in_the_middle_of_a_run_goes_on_to_the_same_bits(
    home: Path, whole: Path, tmp_path: Path
) -> None:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("There is no mkfs.ext4 here.")
    moments, copies, has_saved = random.Random("power cuts"), list[Path](), False
    image, place = tmp_path / "drive.img", tmp_path / "drive"
    with open(image, "wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0", str(image)], check=True)
    what = faulty_run(home, "on-the-drive")
    what = what.model_copy(update={"run": what.run.model_copy(update={"dir": place / "run"})})
    with mounted(image, place):
        # On a busy machine many cuts fall before the first save.
        while len(copies) < CUTS or not has_saved:
            shutil.rmtree(place / "run", ignore_errors=True)
            child = start(train_on, what, Disk())
            _wait_for_lock(child.pid, place / "run")
            while child.is_alive() and (len(copies) < CUTS or not has_saved):
                child.join(moments.uniform(0.02, 0.15))
                if child.is_alive():
                    os.kill(child.pid or 0, signal.SIGSTOP)
                    copies.append(tmp_path / f"cut-{len(copies)}.img")
                    shutil.copyfile(image, copies[-1])  # no sync: what is still in memory is lost
                    has_saved = has_saved or bool(list((place / "run").glob("step-????????")))
                    os.kill(child.pid or 0, signal.SIGCONT)
            child.kill()
            child.join()
    begun = []
    for copy in copies:
        with mounted(copy, tmp_path / "after"):
            after = what.model_copy(update={"run": what.run.model_copy(update={"dir": tmp_path / "after/run"})})
            events = train(after)
            assert events[0].passed_over == (), "a checkpoint that has its name is whole"
            begun.append(events[0].step)
            expect_same_weights(whole, after.run.dir)
            if begun[-1] == 0:  # rows of the log may be lost, but not those of a run that begins again
                expect_same_end(whole, after.run.dir)
    assert max(begun) > 0, "no cut fell after a save"


def _wait_for_lock(pid: int | None, run: Path) -> None:
    until_s = time.monotonic() + WAIT_S
    while not (run / "owner").exists() or (run / "owner").read_text().strip() != str(pid):
        assert time.monotonic() < until_s, "the child hangs"
        time.sleep(0.005)
