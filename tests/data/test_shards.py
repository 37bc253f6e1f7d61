"""Packing survives what can happen to it, and a ShardSet gives back exactly what was packed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import filelock
import numpy as np
import psutil
import pytest

from lowvram.data import shards
from lowvram.data.shards import PackProgress, ShardSet, pack
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.errors import BusyError, DataError, DiskFullError, MachineError, TokenizerError
from lowvram.files import Disk

PART_BYTES = 1_000
# Packs in a process of its own: TEXT TOKENIZER OUT PROCESSES DIE_AT.  It kills itself when it comes to touch the disk
# for the DIE_AT-th time, and else waits a little after each shard so that it can be killed from outside.
SCRIPT = f"""
import os, signal, sys, time
from pathlib import Path
from lowvram.data import shards
from lowvram.data.tokenizer import Tokenizer
from lowvram.files import Disk

class Mortal(Disk):
    left = int(sys.argv[5])

def dying(name):
    def touch(self, *arguments):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        return getattr(Disk, name)(self, *arguments)
    return touch

for name in ("preallocate", "write_handle", "sync_handle", "rename", "delete"):
    setattr(Mortal, name, dying(name))

if __name__ == "__main__":
    shards.PART_BYTES = {PART_BYTES}
    text, tokenizer, out = map(Path, sys.argv[1:4])
    processes = int(sys.argv[4])
    shards.pack([text], Tokenizer.load(tokenizer), out, "text", processes,
                lambda progress: time.sleep(0.05), Mortal() if processes == 1 else Disk())
"""


class FullDisk(Disk):
    """A disk that is full when the third shard comes."""

    def preallocate(self, file, size_bytes: int) -> None:
        if "00002.bin" in file.name:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        super().preallocate(file, size_bytes)


class FatalDisk(Disk):
    """A disk that ends the process which writes to it, as the system does when memory runs out."""

    def preallocate(self, file, size_bytes: int) -> None:
        os._exit(9)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PART_BYTES", PART_BYTES)


@pytest.fixture
def texts(turkish: tuple[str, ...]) -> list[str]:
    """Sixty documents, no two alike, one of them in NFD and one with what looks like a special token."""
    made = [f"{n}. {turkish[n % 16]} {turkish[n * 7 % 16]}" for n in range(58)]
    return [*made, unicodedata.normalize("NFD", turkish[4]), "<|bos|> " + turkish[5]]


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Path:
    """The documents in two files."""
    (tmp_path / "text").mkdir()
    for name, part in (("a.txt", texts[:40]), ("b.txt", texts[40:])):
        (tmp_path / "text" / name).write_text("\n\n".join(part), encoding="utf-8", newline="")
    return tmp_path / "text"


@pytest.fixture
def packed(folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None) -> ShardSet:
    return pack([folder], small_tokenizer, tmp_path / "out", processes=1)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "lock"}


def run_script(tmp_path: Path, *arguments: object) -> subprocess.Popen:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen([sys.executable, str(path), *map(str, arguments)], env=environment)


@pytest.mark.covers("data")
def test_packed_tokens_are_bos_and_the_ids_of_each_document_in_nfc(
    packed: ShardSet, texts: list[str], small_tokenizer: Tokenizer
) -> None:
    expected = [id for text in texts for id in [0, *small_tokenizer.encode(unicodedata.normalize("NFC", text))]]
    assert packed.read(0, packed.tokens).tolist() == expected
    assert (packed.tokens, packed.documents) == (len(expected), len(texts))
    assert packed.text_bytes == sum(len(text.encode("utf-8")) for text in texts)
    assert packed.dtype == np.dtype("<u2")


def test_the_files_say_what_they_hold(packed: ShardSet, small_tokenizer: Tokenizer) -> None:
    index = json.loads((packed.directory / "shards.json").read_text(encoding="utf-8"))
    assert (index["format"], index["tokenizer"], index["dtype"]) == (1, small_tokenizer.hash, "uint16")
    names = [shard["file"] for shard in index["shards"]]
    assert names == [f"{number:05d}.bin" for number in range(len(names))]
    assert len(names) >= 5
    for shard in index["shards"]:
        data = (packed.directory / shard["file"]).read_bytes()
        sidecar = json.loads((packed.directory / shard["file"]).with_suffix(".json").read_text(encoding="utf-8"))
        assert shard["sha256"] == hashlib.sha256(data).hexdigest() == sidecar["sha256"]
        assert shard["tokens"] * 2 == len(data)
        assert all(sidecar[key] == shard[key] for key in ("tokens", "documents", "text_bytes"))
        assert sidecar["tokenizer"] == small_tokenizer.hash
        assert PART_BYTES <= shard["text_bytes"] < 2 * PART_BYTES or shard is index["shards"][-1]
    for key in ("tokens", "documents", "text_bytes"):
        assert index[key] == sum(shard[key] for shard in index["shards"])


def test_a_vocabulary_above_65535_is_packed_in_four_bytes(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = pack([folder], small_tokenizer, tmp_path / "narrow")
    monkeypatch.setattr(Tokenizer, "size", 65_536)
    wide = pack([folder], small_tokenizer, tmp_path / "wide")
    assert wide.dtype == np.dtype("<u4")
    assert (wide.directory / "00000.bin").stat().st_size == 4 * wide.tokens
    assert (wide.read(0, wide.tokens) == narrow.read(0, narrow.tokens)).all()


def test_two_processes_write_the_same_bytes_as_one(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    seen: list[PackProgress] = []
    other = pack([folder], small_tokenizer, tmp_path / "two", processes=2, progress=seen.append)
    assert bytes_of(other.directory) == bytes_of(packed.directory)
    assert other.hash == packed.hash
    assert [progress.shards for progress in seen] == list(range(1, len(seen) + 1))
    assert (seen[-1].tokens, seen[-1].documents, seen[-1].text_bytes, seen[-1].reused) == (
        packed.tokens, packed.documents, packed.text_bytes, 0,
    )  # fmt: skip
    assert {progress.file.name for progress in seen} == {"a.txt", "b.txt"}


@pytest.mark.parametrize("die_at", [1, 2, 3, 4, 5, 6, 8, 9, 21])
def test_a_packing_that_is_killed_over_an_older_one_is_never_half_believed(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, die_at: int
) -> None:
    clean = bytes_of(packed.directory)
    older = tmp_path / "older"
    (tmp_path / "old.txt").write_text("\n\n".join(f"eski {n}" for n in range(300)), encoding="utf-8")
    old_hash = pack([tmp_path / "old.txt"], small_tokenizer, older, processes=1).hash
    assert run_script(tmp_path, folder, small_tokenizer.directory, older, 1, die_at).wait(60) != 0
    if die_at <= 4:  # reserve, write, sync, delete the old index: before the last of them the old shards stand
        ShardSet.open(older).verify()
        assert ShardSet.open(older).hash == old_hash
    else:
        with pytest.raises(DataError, match="interrupted"):
            ShardSet.open(older)
    assert pack([folder], small_tokenizer, older, processes=1).hash == packed.hash
    assert bytes_of(older) == clean


@pytest.mark.covers("data")
def test_packing_killed_from_outside_ends_its_workers_and_resumes_to_the_same_bytes(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = run_script(tmp_path, folder, small_tokenizer.directory, out, 2, 0)
    give_up = time.monotonic() + 60
    while not (out / "00002.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < give_up, "it packed nothing"
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(60)
    assert workers
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    with pytest.raises(DataError, match="interrupted"):
        ShardSet.open(out)
    done = len(list(out.glob("*.json")))
    seen: list[PackProgress] = []
    pack([folder], small_tokenizer, out, processes=1, progress=seen.append)
    assert 3 <= done <= seen[-1].reused < seen[-1].shards
    assert bytes_of(out) == bytes_of(packed.directory)


def test_a_second_packing_encodes_nothing_and_a_changed_document_only_its_shard(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    seen: list[PackProgress] = []
    before = bytes_of(packed.directory)
    pack([folder], small_tokenizer, packed.directory, processes=1, progress=seen.append)
    assert (seen[-1].reused, bytes_of(packed.directory)) == (len(seen), before)
    text = (folder / "b.txt").read_text(encoding="utf-8")
    (folder / "b.txt").write_text(text[:-4] + "son.", encoding="utf-8", newline="")
    changed = pack([folder], small_tokenizer, packed.directory, processes=1, progress=seen.append)
    assert seen[-1].reused == seen[-1].shards - 1
    assert changed.hash != packed.hash


def test_the_same_letters_parted_otherwise_are_another_text(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    hashes = set()
    for data in (b"ab\n\nc", b"a\n\nbc", b"a\n\nb\n\nc", b"a\nbc"):
        (tmp_path / "a.txt").write_bytes(data)
        hashes.add(pack([tmp_path / "a.txt"], small_tokenizer, tmp_path / "out").hash)
    assert len(hashes) == 4


def test_what_an_older_longer_packing_left_is_deleted_and_other_files_stay(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    for name in ("00001.bin.77.tmp", "00123.json.77.tmp", "shards.json.77.tmp", "notes.txt", "12345.bin"):
        (packed.directory / name).write_bytes(b"x")
    (folder / "a.txt").unlink()
    short = pack([folder / "b.txt"], small_tokenizer, packed.directory, processes=1)
    numbers = range(len(json.loads((short.directory / "shards.json").read_text(encoding="utf-8"))["shards"]))
    expected = {"shards.json", "notes.txt", *(f"{n:05d}.{kind}" for n in numbers for kind in ("bin", "json"))}
    assert set(bytes_of(short.directory)) == expected


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_is_said_leaves_nothing_torn_and_can_be_resumed(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, processes: int
) -> None:
    out = tmp_path / "full"
    with pytest.raises(DiskFullError, match=r"No space left to write in .*full") as caught:
        pack([folder], small_tokenizer, out, processes=processes, disk=FullDisk())
    assert "type the same command again" in caught.value.fix
    clean = bytes_of(packed.directory)
    left = bytes_of(out)
    assert sorted(left) == ["00000.bin", "00000.json", "00001.bin", "00001.json"]
    assert all(clean[name] == data for name, data in left.items())
    pack([folder], small_tokenizer, out, processes=1)
    assert bytes_of(out) == clean


def test_a_worker_that_the_system_ended_is_explained(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None
) -> None:
    with pytest.raises(MachineError, match=r"packing process died.*fewer --processes"):
        pack([folder], small_tokenizer, tmp_path / "out", processes=2, disk=FatalDisk())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_file_stops_the_packing_and_keeps_what_was_done(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, processes: int
) -> None:
    (folder / "c.txt").write_bytes(b"iyi\n\nk\xf6t\xfc")
    out = tmp_path / "bad"
    with pytest.raises(DataError, match=r"c\.txt is not UTF-8: byte 6 is 0xf6"):
        pack([folder], small_tokenizer, out, processes=processes)
    assert "00000.json" in bytes_of(out)
    assert not list(out.glob("*.tmp"))
    (folder / "c.txt").unlink()
    pack([folder], small_tokenizer, out, processes=1)
    assert bytes_of(out) == bytes_of(packed.directory)


def test_shards_of_another_tokenizer_are_not_overwritten(
    packed: ShardSet, folder: Path, turkish: tuple[str, ...], tmp_path: Path
) -> None:
    other = train_tokenizer(iter(turkish), 300, tmp_path / "other")
    before = bytes_of(packed.directory)
    with pytest.raises(DataError, match=r"holds shards of another tokenizer.*another --out"):
        pack([folder], other, packed.directory)
    (packed.directory / "shards.json").unlink()
    with pytest.raises(DataError, match="holds shards of another tokenizer"):
        pack([folder], other, packed.directory)
    del before["shards.json"]
    assert bytes_of(packed.directory) == before
    with pytest.raises(DataError, match="holds no shards"):
        ShardSet.open(packed.directory)


def test_a_tokenizer_that_changed_on_disk_is_noticed(
    folder: Path, small_tokenizer: Tokenizer, turkish: tuple[str, ...], tmp_path: Path
) -> None:
    small_tokenizer.save(tmp_path / "tok")
    loaded = Tokenizer.load(tmp_path / "tok")
    train_tokenizer(iter(turkish), 300, tmp_path / "tok")
    with pytest.raises(TokenizerError, match="has changed"):
        pack([folder], loaded, tmp_path / "out")


def test_two_packers_do_not_share_a_folder(folder: Path, small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with filelock.FileLock(tmp_path / "out" / "lock"), pytest.raises(BusyError, match="is in use"):
        pack([folder], small_tokenizer, tmp_path / "out")
    assert pack([folder], small_tokenizer, tmp_path / "out").documents == 60
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="is no folder"):
        pack([folder], small_tokenizer, tmp_path / "file")


def test_a_packing_that_progress_interrupts_lets_go_of_the_folder(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None
) -> None:
    def stop(progress: PackProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack([folder], small_tokenizer, tmp_path / "out", processes=2, progress=stop)
    assert sorted(bytes_of(tmp_path / "out")) == ["00000.bin", "00000.json"]
    pack([folder], small_tokenizer, tmp_path / "out", processes=1).verify()


@pytest.mark.covers("data")
@pytest.mark.parametrize("change_bytes, word", [(-2, "damaged"), (2, "damaged"), (None, "missing")])
def test_a_truncated_shard_is_named(packed: ShardSet, change_bytes: int | None, word: str) -> None:
    path = packed.directory / "00001.bin"
    data = path.read_bytes()
    path.unlink()
    if change_bytes is not None:
        path.write_bytes((data + b"\0\0")[: len(data) + change_bytes])
    size = 0 if change_bytes is None else len(data) + change_bytes
    with pytest.raises(DataError, match=rf"00001\.bin is {word}\. It has {size} bytes of {len(data)}"):
        ShardSet.open(packed.directory)


def test_packing_again_mends_a_truncated_shard(packed: ShardSet, folder: Path, small_tokenizer: Tokenizer) -> None:
    before = bytes_of(packed.directory)
    (packed.directory / "00001.bin").write_bytes(before["00001.bin"][:-2])
    (packed.directory / "00002.json").write_bytes(before["00002.json"][:-20])
    (packed.directory / "00003.bin").unlink()
    pack([folder], small_tokenizer, packed.directory, processes=1)
    assert bytes_of(packed.directory) == before


def test_verify_finds_a_flipped_bit_that_opening_does_not(packed: ShardSet) -> None:
    packed.verify()
    path = packed.directory / "00002.bin"
    data = bytearray(path.read_bytes())
    data[11] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"00002\.bin is damaged"):
        ShardSet.open(packed.directory).verify()


def test_opening_with_another_tokenizer_is_refused(packed: ShardSet, small_tokenizer: Tokenizer) -> None:
    assert ShardSet.open(packed.directory, small_tokenizer.hash).hash == packed.hash
    with pytest.raises(DataError, match=r"shards of another tokenizer.*0123456789ab…"):
        ShardSet.open(packed.directory, "0123456789abcdef")


def test_a_folder_that_was_never_packed_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="holds no shards"):
            ShardSet.open(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 2}', '{"format": 1, "tokenizer": "x"}'])
def test_an_index_that_is_torn_or_of_another_format_is_refused(packed: ShardSet, text: str) -> None:
    (packed.directory / "shards.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"shards\.json cannot be read"):
        ShardSet.open(packed.directory)


@pytest.mark.parametrize("tokens", [0, 1])
def test_fewer_than_two_tokens_are_refused(packed: ShardSet, tokens: int) -> None:
    index = json.loads((packed.directory / "shards.json").read_text(encoding="utf-8"))
    index["shards"] = [index["shards"][0] | {"tokens": tokens}]
    (packed.directory / "00000.bin").write_bytes(b"\0" * 2 * tokens)
    (packed.directory / "shards.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match=f"holds {tokens} token"):
        ShardSet.open(packed.directory)
