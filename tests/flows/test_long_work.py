"""Long work without a terminal says how far it is, and Ctrl-C ends it at once, also inside native code."""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lowvram.cli import console as show
from lowvram.data.interruptible import run_interruptibly
from lowvram.data.tokenizer import Tokenizer
from tests.flows.typed import environment


def test_without_a_terminal_a_plain_line_comes_from_time_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "PLAIN_EVERY_S", 0.001)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(show, "time", SimpleNamespace(monotonic=lambda: clock.now))
    said = threading.Event()
    real = show.notice
    monkeypatch.setattr(show, "notice", lambda text: (real(text), said.set()))
    with show.bar("Packing") as line:
        for passed, done, total, words in ((0, 5, 10, "1.2k tokens"), (75, 7, None, "7 B"), (7500, 0, None, "")):
            line.tell(done, total, words)
            clock.now = 1000.0 + passed
            said.clear()
            said.wait(20)
            said.clear()
            said.wait(20)
    lines = capsys.readouterr().err.splitlines()
    assert "Packing: 50%, 1.2k tokens, 0 s" in lines
    assert "Packing: 7 B, 1 min 15 s" in lines
    assert "Packing: 2 h 05 min" in lines
    monkeypatch.setattr(show, "PLAIN_EVERY_S", 1e3)
    with show.bar("Packing") as line:
        line.tell(1, 2)
    assert capsys.readouterr().err == "", "short work says nothing, and does not wait for its turn to speak"


def test_work_in_the_background_gives_its_result_its_error_and_way_to_ctrl_c() -> None:
    assert run_interruptibly(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="its own"):
        run_interruptibly(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
    ended = threading.Event()
    threading.Timer(0.05, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        run_interruptibly(lambda: ended.wait(60))
    ended.set()


# Encodes a document that takes for ever, as native code without a look at signals does: TEXT TOKENIZER OUT PROCESSES.
SCRIPT = """
import sys, time
from pathlib import Path
from lowvram.data import encoders, shards
from lowvram.data.tokenizer import Tokenizer
from lowvram.storage.disk import Disk

class Endless(Disk):
    def preallocate(self, file, size_bytes):
        (Path(file.name).parents[1] / f"begun-{Path(file.name).name}").touch()
        time.sleep(600)

if __name__ == "__main__":
    shards.PART_BYTES = 100
    text, tokenizer, out = map(Path, sys.argv[1:4])
    try:
        shards.pack([text], Tokenizer.load(tokenizer), out, "text", int(sys.argv[4]), disk=Endless())
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signal for one process there")
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_a_packing_inside_a_document_and_all_its_processes(
    small_tokenizer: Tokenizer, tmp_path: Path, processes: int
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join(["uzun belge " * 20] * 6), encoding="utf-8")
    words = (tmp_path / "a.txt", small_tokenizer.directory, tmp_path / "out", processes)
    command = [sys.executable, str(tmp_path / "script.py"), *map(str, words)]
    process = subprocess.Popen(command, env=environment())
    give_up = time.monotonic() + 60
    while not list(tmp_path.glob("begun-*")):
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, "and not only when the work of ten minutes is done"
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert not list(tmp_path.glob("out/*.tmp")) or processes == 1


# `lowvram data clean` whose parts never end, in two processes: TEXT OUT.
CLEANING = """
import sys, time
from lowvram.cli.app import main
from lowvram.data.clean import cleaner

def never_end(task):
    task.target.with_name("begun").touch()
    time.sleep(600)

cleaner.PART_BYTES, cleaner.clean_part = 100, never_end
if __name__ == "__main__":
    cleaner._Cleaning._count_processes = lambda *_: 2
    sys.exit(main(["data", "clean", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.nightly)])
def test_a_signal_to_a_cleaning_and_its_processes_ends_all_of_them_with_a_word_and_the_next_step(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "script.py").write_text(CLEANING, encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n\n".join(["uzun belge " * 20] * 6), encoding="utf-8")
    words = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(tmp_path / "script.py"), *words]
    # Under nohup a hang-up is ignored, and what this process starts would ignore it too.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        process = subprocess.Popen(
            command, env=environment(), stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
        )
    finally:
        signal.signal(number, before)
    give_up = time.monotonic() + 60
    while not (tmp_path / "out/.cleaning/begun").exists():
        assert process.poll() is None
        assert time.monotonic() < give_up
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    # As the end of a session does: to every process of it.
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    # On a slow machine lines of progress stand before them.
    said, following = err.splitlines()[-2:]
    assert said == "Terminated; what was finished before is kept."
    assert following == f"Next: lowvram data clean {' '.join(words)}  (goes on where it stopped)"
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert not (tmp_path / "out").exists(), "no part was finished"
