"""Keeps the computer from going to sleep while a run trains; the screen may go dark.

The lock ends with this process, also where that is killed: Linux and macOS hold it in a child that notices.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import threading
from typing import IO, Any

_ANSWER_S = 3.0
_HELD = b"held"
# SetThreadExecutionState (winbase.h): the system stays awake until the same thread says otherwise.
_ES_CONTINUOUS, _ES_SYSTEM_REQUIRED = 0x80000000, 0x00000001


class WakeLock:
    """A lock against sleep; `take` and `release` may be called again and again."""

    def __init__(self, why: str) -> None:
        self._why = why
        self._child: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._released = threading.Event()

    def take(self) -> str:
        """Take the lock where it is not held; return why the system refuses it, "" where it is held."""
        if self._child is not None or self._thread is not None:
            return ""
        if sys.platform == "win32":
            return self._take_on_windows()
        if sys.platform == "darwin":
            return self._take_by(["caffeinate", "-i", "-m", "-s", "-w", str(os.getpid())], answers=False)
        return self._take_on_linux()

    def release(self) -> None:
        """Release the lock where it is held."""
        child, self._child = self._child, None
        if child is not None:
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
            child.terminate()
            child.wait()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._released.set()
            thread.join()

    def _take_on_linux(self) -> str:
        program = next(filter(shutil.which, ("systemd-inhibit", "elogind-inhibit")), None)
        if program is None:
            return "systemd-inhibit is not installed"
        # The child reads until this process ends, however it ends, and says first that it holds the lock.
        words = [program, "--what=sleep:idle", "--who=lowvram", f"--why={self._why}", "--mode=block"]
        return self._take_by([*words, "sh", "-c", f"echo {_HELD.decode()}; exec cat >/dev/null"], answers=True)

    def _take_by(self, words: list[str], answers: bool) -> str:
        """Start a child that holds the lock.  answers: it says so, and ends when its input does."""
        try:
            # A session of its own, so that Ctrl-C in the terminal does not end it before the last save.
            child = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return f"{words[0]}: {error.strerror}"
        if answers and not _says_held(child.stdout):
            child.kill()
            child.communicate()
            return f"{os.path.basename(words[0])} was refused"
        self._child = child
        return ""

    def _take_on_windows(self) -> str:
        """Hold the lock in a thread that waits, since it belongs to the thread that took it."""
        taken, refused = threading.Event(), list[str]()
        self._released.clear()

        def hold() -> None:
            if not _set_execution_state(_ES_CONTINUOUS | _ES_SYSTEM_REQUIRED):
                refused.append("Windows refuses SetThreadExecutionState")
            taken.set()
            self._released.wait()
            _set_execution_state(_ES_CONTINUOUS)

        self._thread = threading.Thread(target=hold, daemon=True, name="lowvram-wake-lock")
        self._thread.start()
        taken.wait(_ANSWER_S)
        if refused:
            self.release()
        return "".join(refused)


def _says_held(pipe: IO[bytes] | None) -> bool:
    assert pipe is not None, "the child was started with a pipe"
    ready, _, _ = select.select([pipe], [], [], _ANSWER_S)
    return bool(ready) and os.read(pipe.fileno(), len(_HELD)) == _HELD


def _set_execution_state(flags: int) -> bool:
    """Call Windows; return whether it agreed."""
    import ctypes

    windll: Any = getattr(ctypes, "windll", None)
    return windll is not None and bool(windll.kernel32.SetThreadExecutionState(flags))
