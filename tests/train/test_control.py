"""What another terminal asks of a run, and what the run says: a request is for one start, and is heard once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lowvram.storage import control_file
from lowvram.storage.control_file import (
    Asks,
    Request,
    Status,
    read_request,
    read_status,
    withdraw_request,
    write_request,
)
from lowvram.storage.disk import Disk
from lowvram.train.control import Control
from tests.faulty_disk import FaultyDisk


def status_of(run: Path) -> Status:
    found = read_status(run)
    assert found is not None
    return found


def ask(run: Path, asks: Asks, id: str, start: str | None = None) -> Request:
    request = Request(start=start or status_of(run).start, asks=asks, id=id)
    write_request(run, request)
    return request


@pytest.fixture
def control(tmp_path: Path) -> Control:
    made = Control(tmp_path)
    made.poll()
    return made


def test_a_request_is_heard_and_repeated_in_the_status(control: Control, tmp_path: Path) -> None:
    assert status_of(tmp_path).state == "starting"
    ask(tmp_path, "pause", "one")
    control.poll()
    assert control.is_pause_asked
    assert status_of(tmp_path).heard == "one"
    ask(tmp_path, "resume", "two")
    control.poll()
    assert not control.is_pause_asked
    assert status_of(tmp_path).heard == "two"


def test_a_stop_ends_the_run_also_where_it_was_asked_for_before_there_was_one(control: Control, tmp_path: Path) -> None:
    calls: list[str] = []
    ask(tmp_path, "stop", "one")
    control.poll()
    control.attach(lambda: calls.append("stopped"))
    assert calls == ["stopped"]
    ask(tmp_path, "stop", "two")
    control.poll()
    control.poll()
    assert calls == ["stopped", "stopped"], "once for each request"


def test_what_was_asked_of_an_earlier_start_means_nothing_to_the_next(tmp_path: Path) -> None:
    for asks in ("pause", "stop"):
        crashed = Control(tmp_path)
        crashed.poll()
        ask(tmp_path, asks, "one")
        after = Control(tmp_path)
        after.attach(lambda: pytest.fail("a stale request stops nothing"))
        after.poll()
        assert not after.is_pause_asked
        assert not after.is_stop_asked
        assert status_of(tmp_path).heard == ""


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"start": "x", "asks": "explode", "id": "1"}', '{"start": 3}', "\x00" * 100, '"a' * 70_000],
    ids=["empty", "torn", "a list", "unknown", "other keys", "zeros", "huge"],
)
def test_a_broken_request_is_no_request(control: Control, tmp_path: Path, text: str) -> None:
    (tmp_path / "control.json").write_text(text, encoding="utf-8")
    (tmp_path / "status.json").write_text(text, encoding="utf-8")
    control.poll()
    assert not control.is_pause_asked
    assert not control.is_stop_asked
    assert read_status(tmp_path) is None


def test_a_file_that_could_not_be_read_for_a_moment_is_read_again(control: Control, tmp_path: Path) -> None:
    ask(tmp_path, "pause", "one")
    whole = (tmp_path / "control.json").read_bytes()
    found = (tmp_path / "control.json").stat()
    (tmp_path / "control.json").write_bytes(b"")
    control.poll()
    (tmp_path / "control.json").write_bytes(whole)
    os.utime(tmp_path / "control.json", ns=(found.st_atime_ns, found.st_mtime_ns))
    control.poll()
    assert control.is_pause_asked


def test_a_request_waits_where_windows_refuses_to_replace_a_file_that_is_read(
    control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Windows(Disk):
        refusals = 3

        def rename(self, source: Path, target: Path) -> None:
            self.refusals -= 1
            if self.refusals >= 0:
                raise PermissionError(13, "Access is denied", str(target))
            super().rename(source, target)

    monkeypatch.setattr(control_file, "sleep", lambda seconds: None)
    request = Request(start=status_of(tmp_path).start, asks="pause", id="one")
    write_request(tmp_path, request, Windows())
    assert read_request(tmp_path) == request
    stubborn = Windows()
    stubborn.refusals = 10**6
    with pytest.raises(PermissionError):
        write_request(tmp_path, request, stubborn)


def test_the_steps_of_a_run_that_trains_are_not_written_and_its_pauses_are(tmp_path: Path) -> None:
    disk = FaultyDisk()
    control = Control(tmp_path, disk)
    control.tell("training", 0)
    control.poll()
    written = disk.count
    for step in range(1, 50):
        control.tell("training", step)
        control.poll()
    assert disk.count == written
    control.tell("paused", 50, "It waits.", is_asked=True)
    control.poll()
    said = status_of(tmp_path)
    assert (said.state, said.step, said.why, said.is_asked) == ("paused", 50, "It waits.", True)


def test_a_full_disk_or_a_directory_that_is_gone_costs_a_run_only_its_status(tmp_path: Path) -> None:
    control = Control(tmp_path, FaultyDisk("full", 0))
    control.poll()
    assert read_status(tmp_path) is None
    control.poll()
    assert status_of(tmp_path).state == "starting", "written when there is room again"
    gone = Control(tmp_path / "gone")
    gone.poll()
    gone.close()
    assert not (tmp_path / "gone").exists()


def test_the_end_of_a_run_is_said_and_its_request_taken_away(control: Control, tmp_path: Path) -> None:
    ask(tmp_path, "stop", "one")
    control.poll()
    control.tell("ended", 7)
    control.close()
    assert (status_of(tmp_path).state, status_of(tmp_path).step) == ("ended", 7)
    assert read_request(tmp_path) is None


def test_a_request_that_another_one_has_replaced_is_not_withdrawn(control: Control, tmp_path: Path) -> None:
    first = ask(tmp_path, "pause", "one")
    second = ask(tmp_path, "stop", "two")
    withdraw_request(tmp_path, first)
    assert read_request(tmp_path) == second
    withdraw_request(tmp_path, second)
    assert read_request(tmp_path) is None
