"""Packing survives what can happen to it, and a ShardSet gives back exactly what was packed."""

from __future__ import annotations

import errno
import gzip
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

from lowvram.data import worker_pool
from lowvram.data.shards import ShardSet, pack, pack_each_shard
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.errors import BusyError, DataError, DiskFullError, MachineError, TokenizerError
from lowvram.storage.disk import Disk
from tests.data.conftest import PART_BYTES, follow

# Packs in a process of its own: TEXT TOKENIZER OUT PROCESSES DIE_AT.  It kills itself when it comes to touch the disk
# for the DIE_AT-th time, and else waits a little after each shard so that it can be killed from outside.
SCRIPT = f"""
import os, signal, sys, time
from pathlib import Path
from lowvram.data import shards
from lowvram.data.tokenizer import Tokenizer
from lowvram.storage.disk import Disk

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
    disk = Mortal() if processes == 1 else Disk()
    for _ in shards.pack_each_shard([text], Tokenizer.load(tokenizer), out, "text", processes, disk, replace=True):
        time.sleep(0.05)
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


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "lock"}


def run_script(tmp_path: Path, *arguments: object) -> subprocess.Popen:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen([sys.executable, str(path), *map(str, arguments)], env=environment)


def test_packed_tokens_are_bos_and_the_ids_of_each_document_in_nfc(
    packed: ShardSet, texts: list[str], small_tokenizer: Tokenizer
) -> None:
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    expected = [id for text in texts for id in [0, *small_tokenizer.encode(text)]]
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


def test_two_processes_write_the_same_bytes_as_one(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (other,), seen = follow(pack_each_shard([folder], small_tokenizer, tmp_path / "two", processes=2))
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
    assert pack([folder], small_tokenizer, older, processes=1, replace=True).hash == packed.hash
    assert bytes_of(older) == clean


def test_packing_killed_from_outside_ends_its_workers_and_resumes_to_the_same_bytes(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    process = run_script(tmp_path, folder, small_tokenizer.directory, out, 2, 0)
    give_up = time.monotonic() + 60
    while not (out / "00002.bin").exists():  # a shard is renamed after its sidecar is written
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
    done = len(list(out.glob("*.bin")))
    seen = follow(pack_each_shard([folder], small_tokenizer, out, processes=1))[1]
    assert 3 <= done <= seen[-1].reused < seen[-1].shards
    assert bytes_of(out) == bytes_of(packed.directory)


def test_a_second_packing_encodes_nothing_and_a_changed_document_only_its_shard(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    before = bytes_of(packed.directory)
    seen = follow(pack_each_shard([folder], small_tokenizer, packed.directory, processes=1))[1]
    assert (seen[-1].reused, bytes_of(packed.directory)) == (len(seen), before)
    text = (folder / "b.txt").read_text(encoding="utf-8")
    (folder / "b.txt").write_text(text[:-4] + "son.", encoding="utf-8", newline="")
    work = pack_each_shard([folder], small_tokenizer, packed.directory, processes=1, replace=True)
    (changed,), seen = follow(work)
    assert seen[-1].reused == seen[-1].shards - 1
    assert changed.hash != packed.hash


def test_the_same_letters_parted_otherwise_are_another_text(small_tokenizer: Tokenizer, tmp_path: Path) -> None:
    hashes = set()
    for data in (b"ab\n\nc", b"a\n\nbc", b"a\n\nb\n\nc", b"a\nbc"):
        (tmp_path / "a.txt").write_bytes(data)
        hashes.add(pack([tmp_path / "a.txt"], small_tokenizer, tmp_path / "out", replace=True).hash)
    assert len(hashes) == 4


def test_what_an_older_longer_packing_left_is_deleted_and_other_files_stay(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    theirs = ("notes.txt", "12345.bin", "123456.bin", "123456.json", "20240115.jsonl", "00001.bin.old", "00001.tmp")
    for name in ("00001.bin.77.tmp", "00123.json.77.tmp", "shards.json.77.tmp", *theirs):
        (packed.directory / name).write_bytes(b'{"text": "x"}')
    (folder / "a.txt").unlink()
    assert (packed.directory / "00004.json").exists()
    (packed.directory / "00004.json").unlink()  # the index alone still says that 00004.bin is ours
    short = pack([folder / "b.txt"], small_tokenizer, packed.directory, processes=1, replace=True)
    numbers = range(len(json.loads((short.directory / "shards.json").read_text(encoding="utf-8"))["shards"]))
    expected = {"shards.json", *theirs, *(f"{n:05d}.{kind}" for n in numbers for kind in ("bin", "json", "places"))}
    assert set(bytes_of(short.directory)) == expected


@pytest.mark.parametrize("name", ["00001.bin", "00001.json"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_of_somebody_else_is_not_overwritten(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None, name: str, processes: int
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b'{"text": "x"}')
    with pytest.raises(DataError, match=rf"{name} is in the way.*`out`, or move"):
        pack([folder], small_tokenizer, tmp_path / "out", processes=processes)
    assert (tmp_path / "out" / name).read_bytes() == b'{"text": "x"}'
    (tmp_path / "out" / name).unlink()
    pack([folder], small_tokenizer, tmp_path / "out", processes=1).verify()


def test_without_an_index_a_shard_is_known_by_its_sidecar(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    (packed.directory / "shards.json").unlink()
    (folder / "a.txt").unlink()
    short = pack([folder], small_tokenizer, packed.directory, processes=1, replace=True)
    count = len(json.loads((short.directory / "shards.json").read_text(encoding="utf-8"))["shards"])
    assert sorted(path.stem for path in short.directory.glob("*.bin")) == [f"{n:05d}" for n in range(count)]
    assert len(list(short.directory.glob("*.json"))) == count + 1


@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_text_is_not_packed_into_the_folder_that_holds_it(
    small_tokenizer: Tokenizer, tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / inside).mkdir(parents=True)
    text = tmp_path / "out" / inside / "20240115.jsonl"
    text.write_text('{"text": "bir iki"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "out", Path("out")):
        with pytest.raises(DataError, match=r"out holds text that is to be packed.*20240115\.jsonl lies in it.*`out`"):
            pack([text], small_tokenizer, out)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [text]
    assert pack([text], small_tokenizer, text.parent / "shards").documents == 1


@pytest.mark.parametrize(
    "name, documents, starts", [("a.txt.gz", 60, True), ("a.txt.gz", 1, False), ("a.txt", 1, False)]
)
def test_processes_are_started_for_more_than_one_part_however_small_its_file(
    texts: list[str], small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch,
    name: str, documents: int, starts: bool,
) -> None:  # fmt: skip
    data = "\n\n".join(["merhaba " * 50] * documents).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert (tmp_path / name).stat().st_size < PART_BYTES
    started: list[int] = []
    real = worker_pool._start_pool
    monkeypatch.setattr(worker_pool, "_start_pool", lambda count: started.append(count) or real(count))
    assert pack([tmp_path / name], small_tokenizer, tmp_path / "out", processes=2).documents == documents
    assert started == [2] * starts


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
    assert sorted(left) == [f"0000{n}.{kind}" for n in (0, 1) for kind in ("bin", "json", "places")]
    assert all(clean[name] == data for name, data in left.items())
    pack([folder], small_tokenizer, out, processes=1)
    assert bytes_of(out) == clean


def test_a_worker_that_the_system_ended_is_explained(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None
) -> None:
    with pytest.raises(MachineError, match=r"packing process died.*fewer `processes`"):
        pack([folder], small_tokenizer, tmp_path / "out", processes=2, disk=FatalDisk())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_file_stops_the_packing_and_keeps_what_was_done(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, processes: int
) -> None:
    (folder / "c.txt").write_bytes(b"iyi\n\nk\xf6t\xfc")
    out = tmp_path / "bad"
    with pytest.raises(DataError, match=r"c\.txt:3 is not UTF-8: byte 6 is 0xf6"):
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
    with pytest.raises(DataError, match=r"holds shards of another tokenizer.*another `out`"):
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
    train_tokenizer(iter(turkish), 300, tmp_path / "tok", replace=True)
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


def test_a_packing_that_nobody_follows_any_more_lets_go_of_the_folder(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None
) -> None:
    work = pack_each_shard([folder], small_tokenizer, tmp_path / "out", processes=2)
    assert next(work).shards == 1
    work.close()
    assert sorted(bytes_of(tmp_path / "out")) == ["00000.bin", "00000.json", "00000.places"]
    pack([folder], small_tokenizer, tmp_path / "out", processes=1).verify()


def test_packing_again_mends_a_truncated_shard(packed: ShardSet, folder: Path, small_tokenizer: Tokenizer) -> None:
    before = bytes_of(packed.directory)
    (packed.directory / "00001.bin").write_bytes(before["00001.bin"][:-2])
    (packed.directory / "00002.json").write_bytes(before["00002.json"][:-20])
    (packed.directory / "00003.bin").unlink()
    pack([folder], small_tokenizer, packed.directory, processes=1)
    assert bytes_of(packed.directory) == before


def test_verify_finds_a_flipped_bit_that_opening_does_not_and_packing_again_mends_it(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    packed.verify()
    before = bytes_of(packed.directory)
    for name in ("00004.bin", "00002.bin"):
        data = bytearray(before[name])
        data[11] ^= 4
        (packed.directory / name).write_bytes(data)
    with pytest.raises(DataError, match=r"00002\.bin is damaged.*pack again"):
        ShardSet.open(packed.directory).verify()
    (mended,), seen = follow(pack_each_shard([folder], small_tokenizer, packed.directory, processes=1))
    mended.verify()
    assert seen[-1].reused == seen[-1].shards - 2
    assert bytes_of(packed.directory) == before
