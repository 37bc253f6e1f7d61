"""The folder of a cleaning: its lock, what is finished in it, and what may be replaced; knows no rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from lowvram.data.text_files import REPORT, REPORT_PAGE
from lowvram.errors import BusyError, DataError
from lowvram.storage.disk import Disk, sha256
from lowvram.storage.json_files import JsonError, read_object

# Both are hidden, so that no command takes them for text.
_WORK, _LOCK = ".cleaning", ".lock"
_UNFINISHED = re.compile(r".*\.[0-9]+\.tmp")
FORMAT = 1


class WorkFolder:
    """The `out` of a cleaning; use it inside `claim`.  key: identifies rules and lists."""

    def __init__(self, out: Path, key: str, disk: Disk, replace: bool = False) -> None:
        self.out, self.key = out, key
        self.work = out / _WORK
        self._disk, self._replace = disk, replace

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Lock the folder against other processes.

        Raises BusyError, and DataError where `out` cannot be a folder, or holds a result of other rules.
        """
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.out / _LOCK, timeout=0).acquire()
        except (FileExistsError, NotADirectoryError) as error:
            what, why = f"{self.out} is no folder.", "Cleaned text needs one of its own."
            raise DataError(what, why, "Name another `out`.") from error
        except filelock.Timeout as error:
            fix = "Wait until it is done, or name another `out`."
            raise BusyError(f"{self.out} is in use.", "Another process is cleaning into it.", fix) from error
        with lock:
            for path in self.work.rglob("*"):
                if _UNFINISHED.fullmatch(path.name):
                    self._disk.delete(path)
            try:
                self._forget_other_rules()
                yield
            finally:
                if self.finished:
                    self._disk.delete_unless_in_use(self.work)

    def _forget_other_rules(self) -> None:
        """Delete unfinished work of other rules, and a finished result where it may be replaced."""
        finished = self.finished
        if finished and self._replace:
            for row in finished.get("files", []):
                (self.out / str(row.get("output"))).unlink(missing_ok=True)
            for name in (REPORT, REPORT_PAGE):
                (self.out / name).unlink(missing_ok=True)
        elif finished and finished.get("key") != self.key:
            what = f"{self.out} holds other text, or text cleaned by other rules or another version of lowvram."
            fix = "Name another `out`, or add `replace=True` to put this text in its place."
            raise DataError(what, f"{REPORT} there says so.", fix)
        stated = self.read(self.work / "key.json")
        if stated.get("key") != self.key:
            for mark in self.work.glob("written-*.json"):
                if output := self.read(mark).get("output"):
                    (self.out / str(output)).unlink(missing_ok=True)
            for path in self.work.iterdir():
                self._disk.delete(path)
            if not self.finished:
                self.write(self.work / "key.json", {"format": FORMAT, "key": self.key})

    @property
    def finished(self) -> dict[str, Any]:
        """The report of a cleaning that was finished, empty where there is none."""
        found = self.read(self.out / REPORT)
        return found if found.keys() >= {"format", "key", "input", "files"} else {}

    def path(self, number: int, kind: str = "bin") -> Path:
        """Return the path of a part (`bin`) or of its sidecar (`json`)."""
        return self.work / f"{number:05d}.{kind}"

    def find_done(self, number: int, text_hash: str) -> dict[str, Any] | None:
        """Return the sidecar of a part that is finished, undamaged, for this text; else None."""
        sidecar, path = self.read(self.path(number, "json")), self.path(number)
        is_same = sidecar.get("text") == text_hash and path.is_file() and path.stat().st_size == sidecar.get("bytes")
        return sidecar if is_same and sha256(path) == sidecar["sha256"] else None

    def add(self, number: int, sidecar: dict[str, Any], beside: Path) -> None:
        """Put a part that was written beside its place into it."""
        self.path(number, "json").unlink(missing_ok=True)
        self._disk.rename(beside, self.path(number))
        self.write(self.path(number, "json"), sidecar)

    def write(self, path: Path, value: dict[str, Any]) -> None:
        """Write a JSON object whole or not at all."""
        self._disk.write(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode("utf-8"))

    def read(self, path: Path) -> dict[str, Any]:
        """Return the JSON object in a file, empty where there is none or it is damaged."""
        try:
            return read_object(path)
        except (OSError, JsonError):
            return {}


def refuse_text_inside(out: Path, files: Sequence[Path]) -> None:
    """Raise DataError where a text that is to be cleaned lies in the folder of the result."""
    folder = out.resolve()
    for file in files:
        if folder in file.resolve().parents:
            why = f"{file} lies in it, and cleaning never changes what it reads."
            raise DataError(f"{out} holds text that is to be cleaned.", why, "Name a folder of its own as `out`.")
