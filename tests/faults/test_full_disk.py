"""A full disk never costs the run: the reserved space takes the last save, then the run waits and goes on by itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from lowvram.data.shards import pack
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DiskFullError
from lowvram.storage import checkpoint as checkpoint_module
from lowvram.storage.checkpoint import Store, find_checkpoint
from lowvram.storage.disk import Disk
from lowvram.storage.reserve import Reserve
from lowvram.train import saver
from lowvram.train.events import Event, Paused, Resumed, Saved, StepDone, Stopped
from lowvram.train.log import JsonlLog
from tests.faulty_disk import FaultyDisk
from tests.storage.test_checkpoint import save
from tests.tiny import tensors_of, tiny_run, trainer_of, unequal


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tok"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def test_where_any_operation_of_a_save_finds_no_space_the_reserve_gives_it(tmp_path: Path, tokenizer: Path) -> None:
    counted = FaultyDisk()
    save(tmp_path / "counted", tokenizer, 1, counted)
    assert counted.count > 15
    for at in range(counted.count):
        run = tmp_path / f"run-{at}"
        run.mkdir()
        assert Reserve(run).take(1_000)
        saved = save(run, tokenizer, 1, FaultyDisk("full", at))
        assert find_checkpoint(run)[0] == saved
        assert {path.name for path in run.iterdir()} == {"step-00000001"}, "neither a draft nor the reserve is left"


def test_a_reserve_has_its_size_on_the_drive_or_is_not_there(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path)
    assert reserve.take(300_000)
    file = tmp_path / "reserve"
    assert file.stat().st_size == 300_000
    if sys.platform != "win32":
        assert file.stat().st_blocks * 512 >= 300_000, "a hole reserves nothing"
    assert reserve.take(200_000), "another size is another file"
    assert file.stat().st_size == 200_000
    assert not reserve.take(1 << 60)
    assert not file.exists()
    assert not reserve.give_back()


class FullDisk(Disk):
    """A drive that is full when `is_full`, but for what the reserve gives back."""

    is_full = False

    def preallocate(self, file: IO[bytes], size_bytes: int) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        super().preallocate(file, size_bytes)

    def free_bytes(self, run: Path) -> int:
        return 0 if self.is_full and (run / "reserve").exists() else 1 << 40


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    made = FullDisk()
    monkeypatch.setattr(checkpoint_module, "free_bytes", made.free_bytes)
    return made


def run_on(home: Path, name: str, disk: Disk) -> Any:
    """Return a trainer that saves after every step, on a drive."""
    what = tiny_run(home, run=f"full-{name}")
    options = {"save_every_minutes": 1e-9, "validate_every": 100, "prompts": ()}
    trainer = trainer_of(what.model_copy(update={"run": what.run.model_copy(update=options)}))
    trainer.store = Store(what.run.dir, disk=disk)
    return trainer


def test_a_run_waits_for_room_says_so_and_ends_as_if_it_had_never_waited(
    home: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def pass_time(seconds: float) -> None:
        waits.append(seconds)
        disk.is_full = len(waits) % 3 > 0

    monkeypatch.setattr(saver, "sleep", pass_time)
    trainer, events = run_on(home, "waits", disk), list[Event]()
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step in (2, 4):
            disk.is_full = True
        if isinstance(event, Paused):
            assert trainer.doing == "waiting for room on the disk"
            assert find_checkpoint(trainer.store.run)[0].step == event.step, "what was learnt is saved before it waits"
    kinds = [type(event).__name__ for event in events if not isinstance(event, StepDone)]
    wait = ["Saved", "Paused", "Resumed"]
    assert kinds == ["Started", "Saved", *wait, "Saved", *wait, "Saved", "Evaluated", "Saved", "Stopped"]
    assert waits == [saver.ROOM_ASKED_EVERY_S] * 6
    [first, _] = [event for event in events if isinstance(event, Paused)]
    assert first.step == 2
    assert f"The next checkpoint in {trainer.store.run} needs" in first.why
    plain = run_on(home, "plain", Disk())
    assert not any(isinstance(event, Paused) for event in plain.run())
    assert unequal(tensors_of(trainer), tensors_of(plain)) == []
    assert not (trainer.store.run / "reserve").exists(), "a finished run needs none"


def test_a_run_that_is_stopped_while_it_waits_ends_at_once_and_is_saved(
    home: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, events = run_on(home, "stopped", disk), list[Event]()
    monkeypatch.setattr(saver, "sleep", lambda seconds: trainer.stop())
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            disk.is_full = True
    assert [type(event) for event in events][-2:] == [Paused, Stopped]
    assert not any(isinstance(event, Resumed) for event in events)
    assert find_checkpoint(trainer.store.run)[0].step == trainer.state.step == 2


def test_a_save_that_finds_not_even_the_reserve_waits_and_is_made_afterwards(
    home: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_by_others = [False]
    monkeypatch.setattr(checkpoint_module, "free_bytes", lambda run: 0 if taken_by_others[0] else 1 << 40)

    def pass_time(seconds: float) -> None:
        taken_by_others[0] = disk.is_full = False

    monkeypatch.setattr(saver, "sleep", pass_time)
    trainer, events = run_on(home, "late", disk), list[Event]()
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone) and event.step == 3:
            taken_by_others[0] = disk.is_full = True
    kinds = [(type(event).__name__, event.step) for event in events if isinstance(event, Saved | Paused | Resumed)]
    assert kinds[2:5] == [("Paused", 3), ("Resumed", 3), ("Saved", 3)]
    assert kinds[-1] == ("Saved", 6)


def test_rows_of_a_log_wait_for_room_and_none_is_torn_or_lost(tmp_path: Path) -> None:
    script = (
        "import resource; from pathlib import Path; from lowvram.train.log import JsonlLog\n"
        "from lowvram.train.events import Saved\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "log = JsonlLog(Path('log.jsonl'))\n"
        "for step in range(30):\n"
        "    limit = 1000 if step < 20 else resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    log.write(Saved(step, Path('x' * 60), 1.0))\n"
        "    text = Path('log.jsonl').read_text(); assert text.endswith('\\n') and len(text) <= limit % 2**62\n"
        "log.close()\n"
    )
    if sys.platform == "win32":
        pytest.skip("Windows has no limit on the size of a file.")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(30))


def test_a_log_that_never_finds_room_says_so_at_its_end(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("This system has no device that is always full.")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = JsonlLog(tmp_path / "log.jsonl")
    log.write(Saved(1, tmp_path, 0.5))
    with pytest.raises(DiskFullError, match=f"No space left to write in {tmp_path}"):
        log.close()


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 4 MB; skips where mounting is refused."""
    place = tmp_path / "drive"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("Mounting a file system is refused here.")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def test_on_a_real_drive_that_fills_up_a_packing_says_so_and_goes_on_to_the_same_shards(
    home: Path, small_drive: Path
) -> None:
    tokenizer = Tokenizer.load(home / "tok")
    whole = pack([home / "train.txt"], tokenizer, home / "shards/plain", processes=1)
    filler = small_drive / "filler"
    with open(filler, "wb") as file:
        file.write(bytes(shutil.disk_usage(small_drive).free - 4_096))
    with pytest.raises(DiskFullError, match=f"No space left to write in {small_drive}"):
        pack([home / "train.txt"], tokenizer, small_drive / "shards", processes=1)
    assert not list((small_drive / "shards").glob("*.tmp"))
    filler.unlink()
    assert pack([home / "train.txt"], tokenizer, small_drive / "shards", processes=1).hash == whole.hash


def test_on_a_real_drive_that_fills_up_a_run_waits_and_goes_on(
    home: Path, small_drive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, events = run_on(home, "real", Disk()), list[Event]()
    trainer.store = Store(small_drive / "run")
    filler = small_drive / "filler"

    def fill() -> None:
        with open(filler, "ab") as file:
            file.write(bytes(max(0, shutil.disk_usage(small_drive).free - 8_192)))

    monkeypatch.setattr(saver, "sleep", lambda seconds: filler.unlink(missing_ok=True))
    for event in trainer.run():
        events.append(event)
        if isinstance(event, StepDone | Saved) and event.step == 3:  # again in the place of what retention deleted
            fill()
    kinds = [(type(event).__name__, event.step) for event in events if isinstance(event, Saved | Paused | Resumed)]
    assert ("Saved", 3) in kinds, "into the reserved space"
    assert kinds[kinds.index(("Saved", 3)) + 1 :][:2] == [("Paused", 3), ("Resumed", 3)]
    assert find_checkpoint(small_drive / "run")[0].step == 6
