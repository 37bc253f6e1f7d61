"""A real process that trains: Ctrl-C once, twice, a second process in the same directory, and kill -9."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from lowvram.storage.checkpoint import find_checkpoint, open_checkpoint
from tests.flows.typed import environment, fill_home, typed

# So many tokens that the run would never end by itself.
ENDLESS = ("--set", "tokens=1e12", "--device", "cpu")
WAIT_S = 60.0

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    fill_home(place)
    return place


@contextmanager
def training(
    home: Path, run: Path, *options: str, before: tuple[str, ...] = (), stderr: IO[bytes] | int = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """Start `python -m lowvram train` and let it go on until it has done a step; kill it in the end."""
    words = [
        *before,
        sys.executable,
        "-m",
        "lowvram",
        "train",
        str(home / "run.toml"),
        "--set",
        f"run.dir={run}",
        *options,
    ]
    child = subprocess.Popen(words, text=True, stderr=stderr, env=environment(OMP_NUM_THREADS="1"))
    try:
        wait_for(child, run, "StepDone")
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_for(child: subprocess.Popen[str], run: Path, event: str) -> None:
    """Return when the run's log holds the event."""
    until_s = time.monotonic() + WAIT_S
    while not (run / "log.jsonl").exists() or event not in (run / "log.jsonl").read_text(encoding="utf-8"):
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < until_s, f"no {event} in {WAIT_S} s"
        time.sleep(0.01)


def steps_done(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["step"] for row in rows if row["event"] == "StepDone"]


# A session that ends sends several; only the same one again means "at once", and a terminal's never does.
SIGNALS = {
    "Ctrl-C": (signal.SIGINT,),
    "a closed terminal": (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP),
}


@pytest.mark.default_cases("Ctrl-C")
@pytest.mark.parametrize("numbers", SIGNALS.values(), ids=SIGNALS)
def test_a_signal_saves_the_step_and_the_same_command_goes_on(
    home: Path, tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    run = tmp_path / "run"
    with training(home, run, *ENDLESS) as child:
        for number in numbers:
            child.send_signal(number)
        _, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == 3, err
    assert "Traceback" not in err
    assert "Stopping: this step is finished and saved first." in err
    last = steps_done(run)[-1]
    assert f"Stopped after step {last}; the same command resumes the run." in err
    found, passed_over = find_checkpoint(run)
    assert (found.step, passed_over) == (last, [])
    assert not (run / "owner").exists()
    answer = typed("train", home / "run.toml", "--set", f"run.dir={run}", "--set", f"tokens={256 * (last + 2)}")
    assert answer.code == 0, answer.err
    assert re.search(rf"Going on from \S+ \(step {last} of {last + 2}\)", answer.err)
    assert steps_done(run) == list(range(1, last + 3))


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_under_nohup_neither_a_closed_terminal_nor_a_full_device_ends_training(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open("/dev/full", "wb") as full, training(home, run, *ENDLESS, before=("nohup",), stderr=full) as child:
        child.send_signal(signal.SIGHUP)
        reached = len(steps_done(run)) + 3
        until_s = time.monotonic() + WAIT_S
        while len(steps_done(run)) < reached:
            assert child.poll() is None
            assert time.monotonic() < until_s
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=WAIT_S)
    assert child.returncode == 3
    assert find_checkpoint(run)[0].step == steps_done(run)[-1]


@pytest.mark.nightly
def test_two_signals_end_at_once_and_every_checkpoint_that_stands_is_whole(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Steps so long that the second signal falls into the step that the first one would have finished.
    long_steps = ("--set", "batch_tokens=32768", "--set", "save_every_minutes=1e-9", "--micro-batch", "8")
    with training(home, run, *ENDLESS, *long_steps) as child:
        wait_for(child, run, "Saved")
        child.send_signal(signal.SIGINT)
        assert child.stderr is not None
        lines = []
        while not lines or "Stopping: this step is finished and saved first." not in lines[-1]:
            lines.append(child.stderr.readline())
            assert lines[-1], "it ended before it answered"
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=WAIT_S)
    assert child.returncode == 130, err
    (step,) = re.fullmatch(
        r"\nStopped at once, without saving; the same command goes on from step (\d+)\.\n", err
    ).groups()
    assert int(step) == find_checkpoint(run)[0].step
    standing = [path for path in run.glob("step-*") if path.suffix != ".tmp"]
    assert standing
    assert sorted(open_checkpoint(path).step for path in standing) == sorted(int(path.name[5:]) for path in standing)
    assert steps_done(run)[-1] - find_checkpoint(run)[0].step <= 1


@pytest.mark.nightly
def test_a_second_process_in_the_same_directory_is_refused_and_a_killed_first_one_holds_nothing(
    home: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with training(home, run, *ENDLESS) as child:
        answer = typed("train", home / "run.toml", "--set", f"run.dir={run}")
        assert answer.code == 1
        message = rf"Error: Another process is training in {re.escape(str(run))}\. Its process id is {child.pid}\. Stop"
        assert re.fullmatch(message + r" that one first .*\n", answer.err)
        assert child.poll() is None
        assert (run / "owner").read_text().strip() == str(child.pid)
        child.kill()
        child.wait()
    answer = typed("train", home / "run.toml", "--set", f"run.dir={run}")
    assert answer.code == 0, answer.err
    assert find_checkpoint(run)[0].step == 6
