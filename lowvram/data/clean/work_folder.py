"""The folder of a cleaning: its lock, what is finished in it, and what may be replaced; knows no rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowvram.data.text_files import REPORT, REPORT_PAGE
from lowvram.errors import BusyError, DataError
from lowvram.storage.disk import Disk, sha256
from lowvram.storage.folder_lock import locked_folder
from lowvram.storage.json_files import JsonError, read_object

# Both are hidden, so that no command takes them for text.
_WORK, _LOCK = ".cleaning", ".lock"
_UNFINISHED = re.compile(r".*\.[0-9]+\.tmp")
FORMAT = 2


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
        what, why = f"{self.out} is no folder.", "Cleaned text needs one of its own."
        is_no_folder = DataError(what, why, "Name another `out`.")
        why, fix = "Another process is cleaning into it.", "Wait until it is done, or name another `out`."
        with locked_folder(self.out, _LOCK, is_no_folder, BusyError(f"{self.out} is in use.", why, fix)):
            self.work.mkdir(exist_ok=True)
            for path in self.work.rglob("*"):
                if _UNFINISHED.fullmatch(path.name):
                    self._disk.delete(path)
            try:
                self._forget_other_rules()
                yield
            finally:
                if self.finished or not self._holds_work():
                    self._disk.delete_unless_in_use(self.work)

    def _holds_work(self) -> bool:
        return any(path.stem.isdecimal() or path.name.startswith("written-") for path in self.work.glob("*.json"))

    def forget(self) -> None:
        """Delete all parts, where the same text and rules can give no result."""
        for path in self.work.glob("*.json"):
            path.unlink()

    def _forget_other_rules(self) -> None:
        """Delete unfinished work of other rules, and a finished result where it may be replaced."""
        finished = self.finished
        if finished and self._replace:
            for row in finished["files"] if isinstance(finished["files"], list) else ():
                self._delete_output(row.get("output") if isinstance(row, dict) else None)
            for name in (REPORT, REPORT_PAGE):
                (self.out / name).unlink(missing_ok=True)
        elif finished and finished.get("key") != self.key:
            what = f"{self.out} holds other text, or text cleaned by other rules or another version of lowvram."
            fix = "Name another `out`, or add `replace=True` to put this text in its place."
            raise DataError(what, f"{REPORT} there says so.", fix)
        stated = self.read(self.work / "key.json")
        if stated.get("key") != self.key:
            for mark in self.work.glob("written-*.json"):
                self._delete_output(self.read(mark).get("output"))
            for path in self.work.iterdir():
                self._disk.delete(path)
            if not self.finished:
                self.write(self.work / "key.json", {"format": FORMAT, "key": self.key})

    def _delete_output(self, name: object) -> None:
        """Delete an output by its name in a report or a mark; raise DataError where that leads out of the folder."""
        if not isinstance(name, str) or not name:
            return
        path = self.out / name
        if not path.parent.resolve().is_relative_to(self.out.resolve()) or path.name in ("", ".."):
            why = "Somebody changed its report, and cleaning deletes nothing outside its folder."
            raise DataError(f"{self.out} names {name} as an output.", why, "Name another `out`.")
        if path.is_file() or path.is_symlink():
            path.unlink()

    @property
    def finished(self) -> dict[str, Any]:
        """The report of a cleaning that was finished, empty where there is none."""
        found = self.read(self.out / REPORT)
        return found if found.keys() >= {"format", "key", "input", "files"} else {}

    def find_foreign_report(self) -> Path | None:
        """Return a file that has the name of the report or its page and is not ours, where none may be replaced."""
        is_ours = {REPORT: bool(self.finished), REPORT_PAGE: bool(self.finished) or self._page_mark.is_file()}
        foreign = [self.out / name for name, is_so in is_ours.items() if not is_so and (self.out / name).exists()]
        return foreign[0] if foreign and not self._replace else None

    def write_report(self, report: dict[str, Any], page: str) -> None:
        """Write the page and then the report, with which the result is finished."""
        # The mark is there before the page is, as for the outputs.
        self.write(self._page_mark, {"output": REPORT_PAGE})
        self._disk.write(self.out / REPORT_PAGE, page.encode("utf-8"))
        self.write(self.out / REPORT, report)

    @property
    def _page_mark(self) -> Path:
        return self.work / "written-page.json"

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


def refuse_text_inside(out: Path, paths: Sequence[Path]) -> None:
    """Raise DataError where text that is to be cleaned lies in the folder of the result, or that in a folder of text.

    paths: files, and folders whose files are text.
    """
    folder = out.resolve()
    for path in paths:
        place = path.resolve()
        if folder in place.parents:
            why = f"{path} lies in it, and cleaning never changes what it reads."
            raise DataError(f"{out} holds text that is to be cleaned.", why, "Name a folder of its own as `out`.")
        # Hidden folders are not read where the folder around them is.
        if place in folder.parents and not any(part.startswith(".") for part in folder.relative_to(place).parts):
            why = "Cleaned text there would be read with the other when that folder is read again."
            raise DataError(f"{out} lies in {path}, which is to be cleaned.", why, "Name a folder outside it as `out`.")
