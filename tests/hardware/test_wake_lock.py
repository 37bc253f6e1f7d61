"""The lock against sleep, by programs of the test's own: held, refused, given back, and gone with a killed process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lowvram.hardware import wake_lock
from lowvram.hardware.wake_lock import WakeLock
from tests.flows.typed import environment

on_posix = pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")


def put_program(folder: Path, name: str, script: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that are found first; those of this system that hold such locks are not found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "cat", "sleep"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    return folder


GRANTED = 'echo "$@" > "$0.words"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"'


@on_posix
def test_on_linux_the_lock_is_held_by_a_child_until_it_is_released(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wake_lock.sys, "platform", "linux")
    put_program(programs, "systemd-inhibit", GRANTED)
    lock = WakeLock("training first")
    assert lock.take() == ""
    child = lock._child
    assert lock.take() == ""
    assert lock._child is child, "a lock that is held is not taken again"
    assert child is not None
    assert child.poll() is None
    words = (programs / "systemd-inhibit.words").read_text(encoding="utf-8")
    assert words.startswith("--what=sleep:idle --who=lowvram --why=training first --mode=block")
    lock.release()
    assert child.poll() is not None
    lock.release()
    assert lock.take() == "", "after a pause"
    lock.release()


@on_posix
@pytest.mark.parametrize(
    ("script", "why"),
    [("exit 1", "systemd-inhibit was refused"), (None, "systemd-inhibit is not installed")],
    ids=["refused", "missing"],
)
def test_a_refusal_is_a_sentence_and_no_error(
    programs: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, why: str
) -> None:
    monkeypatch.setattr(wake_lock.sys, "platform", "linux")
    if script is not None:
        put_program(programs, "systemd-inhibit", script)
    lock = WakeLock("training")
    assert lock.take() == why
    assert lock._child is None
    lock.release()


@on_posix
def test_on_macos_caffeinate_watches_this_process(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake_lock.sys, "platform", "darwin")
    lock = WakeLock("training")
    assert lock.take() == "caffeinate: No such file or directory"
    put_program(programs, "caffeinate", f'echo "$@" > {programs}/words; exec sleep 60')
    assert lock.take() == ""
    until_s = time.monotonic() + 10
    while not (programs / "words").exists() or not (programs / "words").read_text(encoding="utf-8"):
        assert time.monotonic() < until_s
        time.sleep(0.005)
    assert (programs / "words").read_text(encoding="utf-8") == f"-i -m -s -w {os.getpid()}\n"
    lock.release()


def test_on_windows_a_thread_holds_the_lock_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wake_lock.sys, "platform", "win32")
    calls: list[tuple[int, str]] = []
    monkeypatch.setattr(
        wake_lock,
        "_set_execution_state",
        lambda flags: calls.append((flags, threading.current_thread().name)) or True,
    )
    lock = WakeLock("training")
    assert lock.take() == ""
    assert lock.take() == ""
    assert calls == [(0x80000001, "lowvram-wake-lock")]
    lock.release()
    assert calls[1:] == [(0x80000000, "lowvram-wake-lock")], "the same thread, or Windows would not know it"
    monkeypatch.setattr(wake_lock, "_set_execution_state", lambda flags: False)
    assert lock.take() == "Windows refuses SetThreadExecutionState"


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process as Linux does")
def test_a_process_that_is_killed_leaves_no_lock_behind(programs: Path) -> None:
    put_program(programs, "systemd-inhibit", GRANTED)
    script = (
        "import time; from lowvram.hardware.wake_lock import WakeLock\n"
        "lock = WakeLock('training'); print(repr(lock.take()), lock._child.pid, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", script]
    with subprocess.Popen(words, env=environment(PATH=str(programs)), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        refusal, child = process.stdout.readline().split()
        assert refusal == "''"
        holder = psutil.Process(int(child))
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs([holder], timeout=10)
    assert alive == []
