"""The pytest plugin of `planted_faults.py`: it records which lines each test file runs, or names failures.

LOWVRAM_COVERAGE=FOLDER      writes FOLDER/SUITE/TEST_FILE.json: lines of lowvram, and seconds; needs `coverage`
LOWVRAM_FAILURES=FILE        writes the ids of the tests that fail
Processes that a test starts are traced too, by a `sitecustomize` in FOLDER/start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import coverage

ROOT = Path(__file__).resolve().parents[1]

WARNINGS = "module-not-imported,module-not-measured,no-data-collected,trace-changed,couldnt-parse,module-not-python"


def hash_file(path: Path) -> str:
    """A hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def sources_of(root: Path) -> list[str]:
    """Return the patterns of the files that are traced."""
    return [f"{root}/lowvram/*", f"{root}/kernels/lowvram_kernels/*"]


def map_path(folder: Path, suite: str, test_file: str) -> Path:
    """Where the lines of one test file are written."""
    return folder / suite / (test_file.replace("/", "+") + ".json")


def prepare(folder: Path, root: Path) -> Path:
    """Write what traces the child processes of tests that run in `root`; return the path that they must find it on."""
    start = folder / "start"
    start.mkdir(parents=True, exist_ok=True)
    (start / "sitecustomize.py").write_text("import coverage\n\ncoverage.process_startup()\n", encoding="utf-8")
    lines = [
        "[run]",
        "include =",
        *(f"    {source}" for source in sources_of(root)),
        "parallel = true",
        "data_file = ${LOWVRAM_COVERAGE_DATA}",
        "concurrency = thread,multiprocessing",
        "patch = _exit",
        f"disable_warnings = {WARNINGS}",
    ]
    (start / "coveragerc").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return start


class Recorder:
    """Traces one test file after the other and writes what each one ran when the next one begins."""

    def __init__(self, folder: Path, suite: str) -> None:
        import coverage

        self.folder, self.suite = folder, suite
        self.children = folder / "children" / f"{os.getpid()}"
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=sources_of(ROOT), concurrency=["thread"]
        )
        self.coverage.set_option("run:disable_warnings", WARNINGS.split(","))
        self.test_file = ""
        self.seconds = 0.0

    def open(self, test_file: str) -> None:
        """Begin to trace a test file."""
        self.test_file, self.seconds = test_file, 0.0
        shutil.rmtree(self.children, ignore_errors=True)
        self.children.mkdir(parents=True)
        os.environ["LOWVRAM_COVERAGE_DATA"] = str(self.children / "data")
        os.environ["COVERAGE_PROCESS_START"] = str(self.folder / "start" / "coveragerc")
        self.coverage.erase()
        self.coverage.start()

    def close(self) -> None:
        """Write the lines of the test file that was traced."""
        if not self.test_file:
            return
        self.coverage.stop()
        lines: dict[str, set[int]] = {}
        for data in [self.coverage.get_data(), *self.read_children()]:
            for file in data.measured_files():
                path = Path(file)
                if numbers := data.lines(file):
                    lines.setdefault(path.relative_to(ROOT).as_posix(), set()).update(numbers)
        found = {
            "hash": hash_file(ROOT / self.test_file),
            "seconds": round(self.seconds, 2),
            "lines": {file: sorted(numbers) for file, numbers in sorted(lines.items())},
        }
        path = map_path(self.folder, self.suite, self.test_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
        self.test_file = ""

    def read_children(self) -> Iterator[coverage.CoverageData]:
        """Read what the processes that the tests started have left."""
        import coverage

        for path in self.children.glob("data*"):
            data = coverage.CoverageData(str(path))
            try:
                data.read()
            except coverage.CoverageException:
                continue  # a process that was killed while it wrote
            yield data

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Trace a test as a part of its file."""
        test_file = Path(item.path).relative_to(ROOT).as_posix()
        if test_file != self.test_file:
            self.close()
            self.open(test_file)
        began = time.perf_counter()
        found = yield
        self.seconds += time.perf_counter() - began
        return found

    def pytest_sessionfinish(self) -> None:
        """Write the last file."""
        self.close()


class Failures:
    """Writes the ids of tests, and of test files that cannot be imported, that fail: one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test that failed."""
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that cannot be imported."""
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    """Do what the environment asks for; coverage is recorded in the processes that run tests."""
    if path := os.environ.get("LOWVRAM_FAILURES"):
        config.pluginmanager.register(Failures(Path(path)))
    folder = os.environ.get("LOWVRAM_COVERAGE")
    controls_others = bool(getattr(config.option, "numprocesses", 0)) and not hasattr(config, "workerinput")
    if folder and not controls_others:
        config.pluginmanager.register(Recorder(Path(folder), os.environ.get("LOWVRAM_COVERAGE_SUITE", "default")))
