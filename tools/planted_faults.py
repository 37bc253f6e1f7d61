"""Plants known faults one at a time in a copy of the repository, and notes which tests find them.

python tools/planted_faults.py check                 each fault of planted_faults.toml fits today's tree
python tools/planted_faults.py record                which test files run which lines (needs the package coverage)
python tools/planted_faults.py run --label after     plants faults and runs the test files that reach them
python tools/planted_faults.py run --whole 5         the whole suite for five drawn faults
python tools/planted_faults.py table                 writes planted_faults.md from the verdicts

Verdicts are added to planted_faults.json as they come: the same command goes on where it was interrupted.  The
checkout itself is never changed: everything runs in a copy below --work.  It forks, so it needs Linux or macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.planted_faults_plugin import hash_file, map_path, prepare
from tools.planted_faults_reach import Fault, check, find_test_files, rank, read_faults

VERDICTS, TABLE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".md")
# What pytest selects in each suite.  A fault is looked for in the first one first.
SUITES = {"default": "not gpu and not heavy and not nightly", "nightly": "nightly and not gpu and not heavy"}
PLUGIN = "tools.planted_faults_plugin"
# A busy machine may take ten times the seconds that were recorded; what takes longer hangs.
LEAST_TIMEOUT_S, TIMEOUT_FACTOR = 1800.0, 10.0


# The copy, and pytest in it.


def copy_tree(target: Path) -> None:
    """Make `target` a copy of what git knows of the checkout and what is new in it; shared data is linked beside it."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, check=True, capture_output=True).stdout.decode().split("\0")
    wanted = {target / name: ROOT / name for name in filter(None, names) if (ROOT / name).is_file()}
    for path in [path for path in target.rglob("*") if path.is_file() and path.suffix != ".pyc"]:
        if path not in wanted:
            path.unlink()
    for path, source in wanted.items():
        if not path.is_file() or path.read_bytes() != source.read_bytes():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
    shared, link = ROOT.parent / "shared", target.parent / "shared"
    if shared.is_dir() and not link.exists():
        link.symlink_to(shared)


class Copy:
    """A copy of the repository in which faults are planted, and in which pytest runs."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self._stamp = max([time.time(), *(path.stat().st_mtime for path in tree.rglob("*.py"))])
        # Imported once, here, by what then forks into each run of pytest; nothing of lowvram is.
        for name in ("pytest", "torch", "numpy", "hypothesis", "pydantic"):
            importlib.import_module(name)

    def write(self, file: str, text: str) -> None:
        """Write a file with a time of its own: Python takes compiled code for that of a file of equal size and time."""
        path = self.tree / file
        path.write_text(text, encoding="utf-8")
        self._stamp += 2.0
        os.utime(path, (self._stamp, self._stamp))

    def environment(self) -> dict[str, str]:
        """Return the variables with which Python finds the copy's packages and not the checkout's."""
        paths = [str(self.tree), str(self.tree / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        kept = [path for path in paths if path and Path(path) not in (ROOT, ROOT / "kernels")]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(kept)}

    def pytest(self, selection: Sequence[str], suite: str, timeout_s: float, options: Sequence[str]) -> list[str]:
        """Run tests; returns the ids of those that failed, or, in parentheses, what else ended them."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "failures"
            words = ["-q", "-p", PLUGIN, "-p", "no:cacheprovider", "-m", SUITES[suite], "--tb=no", *options, *selection]
            child = os.fork()
            if not child:
                self._become_pytest(words, report)
            code = wait_for(child, timeout_s)
            failed = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        if code is None:
            return [f"(no end after {timeout_s:.0f} s)"]
        return failed if failed or code in (0, 5) else [f"(pytest ended with {code})"]  # 5: the marks leave no test

    def _become_pytest(self, words: Sequence[str], report: Path) -> None:
        import pytest

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        os.chdir(self.tree)
        os.environ.update(self.environment(), LOWVRAM_FAILURES=str(report))
        sys.path[:] = [str(self.tree), str(self.tree / "kernels"), *(p for p in sys.path if not is_of_checkout(p))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tools"]:
            del sys.modules[name]
        # Processes that a test starts would import this file as theirs, and with it the checkout's packages.
        sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["pytest", *words]
        code = 3
        try:
            code = int(pytest.main(list(words)))
        finally:
            os._exit(code)


def is_of_checkout(path: str) -> bool:
    """Say whether an entry of sys.path would lead to the checkout."""
    return Path(path or ".").resolve() in (ROOT, ROOT / "kernels", ROOT / "tools")


def wait_for(child: int, timeout_s: float) -> int | None:
    """Return a process's exit code, None where it took too long; however this ends, all that it started ends too."""
    until = time.monotonic() + timeout_s
    try:
        while time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def batches(files: Sequence[tuple[float, str]]) -> Iterator[list[tuple[float, str]]]:
    """Cut a list into runs of pytest, ever longer ones: a start takes seconds, and most faults are found early."""
    start, count = 0, 4
    while start < len(files):
        yield list(files[start : start + count])
        start, count = start + count, count * 2


class Limits(NamedTuple):
    """Which tests are tried.  fails_anyway: those that fail without a fault too, and so say nothing.

    only_near: only the test files that are named after the changed one.
    """

    suites: Sequence[str]
    fails_anyway: Sequence[str] = ()
    only_near: bool = False


def look_for(fault: Fault, copy: Copy, maps: Path, limits: Limits, found_before: Sequence[str] = ()) -> dict[str, Any]:
    """Plant a fault, run the test files that reach it until a test fails, and return the verdict.

    found_before: tests that have found it at another time, which are tried first.
    """
    source = (copy.tree / fault.file).read_text(encoding="utf-8")
    began, tried = time.perf_counter(), 0
    verdict: dict[str, Any] = {"found": False, "suite": None, "test": None}
    options = ["-x", "-n0", *(word for test in limits.fails_anyway for word in ("--deselect", test))]
    copy.write(fault.file, fault.changed(source))
    try:
        for suite, batch in what_to_run(fault, copy, maps, limits, found_before):
            tried += len(batch)
            timeout_s = LEAST_TIMEOUT_S + TIMEOUT_FACTOR * sum(seconds for seconds, _ in batch)
            names = [name for _, name in batch]
            failed = copy.pytest(names, suite, timeout_s, options)
            if failed and not (names[0] in found_before and failed[0].startswith("(")):  # or it is gone by now
                verdict = {"found": True, "suite": suite, "test": failed[0]}
                break
    finally:
        copy.write(fault.file, source)
    return {**verdict, "files_run": tried, "seconds": round(time.perf_counter() - began, 1)}


def what_to_run(
    fault: Fault, copy: Copy, maps: Path, limits: Limits, found_before: Sequence[str]
) -> Iterator[tuple[str, list[tuple[float, str]]]]:
    """Yield runs of pytest: a suite, and seconds and name of test files, or of a test."""
    known = [test for test in dict.fromkeys(found_before) if (copy.tree / test.partition("::")[0]).is_file()]
    for suite in limits.suites:
        yield from ((suite, [(0.0, test)]) for test in known)
        files = [
            (seconds, name) for seconds, name in find_test_files(fault, maps, suite) if (copy.tree / name).exists()
        ]
        if limits.only_near:
            files = [(seconds, name) for seconds, name in files if rank(fault, copy.tree / name) == 0]
        yield from ((suite, batch) for batch in batches(files))


def look_everywhere(fault: Fault, copy: Copy, suites: Sequence[str], workers: str) -> dict[str, Any]:
    """Plant a fault, run whole suites, and return the verdict."""
    source = (copy.tree / fault.file).read_text(encoding="utf-8")
    began = time.perf_counter()
    verdict: dict[str, Any] = {"found": False, "suite": None, "test": None}
    copy.write(fault.file, fault.changed(source))
    try:
        for suite in suites:
            if failed := copy.pytest([], suite, 7200.0, ["-x", "-n", workers]):
                verdict = {"found": True, "suite": suite, "test": failed[0]}
                break
    finally:
        copy.write(fault.file, source)
    return {**verdict, "seconds": round(time.perf_counter() - began, 1)}


def find_failing_anyway(verdicts: dict[str, Any], copy: Copy) -> list[str]:
    """Run the tests that have found something without any fault, and return those that fail all the same."""
    found: list[str] = []
    for suite in SUITES:
        tests = {one["test"] for one in verdicts.values() if one["suite"] == suite and not one["test"].startswith("(")}
        if tests:
            found += copy.pytest(sorted(tests), suite, 7200.0, ["-n0"])
    return found


# The commands.


def record(arguments: argparse.Namespace) -> None:
    """Record the test files that are new or have changed since they were recorded."""
    maps: Path = arguments.work / "maps"
    tree = maps / "tree"
    copy_tree(tree)
    environment = Copy(tree).environment()
    environment["PYTHONPATH"] += os.pathsep + str(prepare(maps, tree))
    for suite, marks in SUITES.items():
        if arguments.suite not in (suite, "both"):
            continue
        wanted = []
        for path in sorted((tree / "tests").rglob("test_*.py")):
            name = path.relative_to(tree).as_posix()
            known = map_path(maps, suite, name)
            is_known = known.exists() and json.loads(known.read_text(encoding="utf-8"))["hash"] == hash_file(path)
            wanted += [] if is_known or not re.search(arguments.only, name) else [name]
        if not wanted:
            continue
        print(f"{suite}: {len(wanted)} test files", flush=True)
        words = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider", "--tb=line"]
        words += ["-n", arguments.workers, "--dist", "loadfile", "-m", marks, *wanted]
        environment |= {"LOWVRAM_COVERAGE": str(maps), "LOWVRAM_COVERAGE_SUITE": suite}
        subprocess.run(words, cwd=tree, env=environment, check=False)


def run(arguments: argparse.Namespace) -> None:
    """Look for the faults that have no verdict under the label yet."""
    faults = read_faults()
    check(faults)
    kind = "whole" if arguments.whole else "verdicts"
    suites = list(SUITES) if arguments.suite == "both" else [arguments.suite]
    faults = [fault for fault in faults if re.search(arguments.only, fault.name)]
    if arguments.whole:
        faults = random.Random(arguments.seed).sample(faults, arguments.whole)
    copy_tree(arguments.work / "copy" / "tree")
    copy = Copy(arguments.work / "copy" / "tree")
    fails_anyway: list[str] = []
    while True:
        done = read_verdicts().get(arguments.label, {}).get(kind, {})
        for fault in (fault for fault in faults if fault.name not in done):
            if arguments.whole:
                verdict = look_everywhere(fault, copy, suites, arguments.workers)
            else:
                limits = Limits(suites, fails_anyway, arguments.only_near)
                verdict = look_for(fault, copy, arguments.work / "maps", limits, find_finders(fault.name))
            print(f"{fault.name}: {verdict['test'] or 'not found'} ({verdict['seconds']} s)", flush=True)
            if verdict["found"] or not arguments.only_found:
                keep_verdict(arguments.label, kind, fault.name, verdict)
        done = read_verdicts().get(arguments.label, {}).get(kind, {})
        said = {fault.name: done[fault.name] for fault in faults if fault.name in done}
        new = [] if arguments.whole else [test for test in find_failing_anyway(said, copy) if test not in fails_anyway]
        if not new:
            return
        print(f"These fail without a fault: {', '.join(new)}", flush=True)
        fails_anyway += new
        for name, verdict in said.items():
            if verdict["test"] in new:
                keep_verdict(arguments.label, kind, name, None)


def read_verdicts() -> dict[str, Any]:
    """Return the file's verdicts: by label, by kind, by fault."""
    return json.loads(VERDICTS.read_text(encoding="utf-8")) if VERDICTS.exists() else {}


def find_finders(name: str) -> list[str]:
    """Return the tests that have found a fault, whatever the label."""
    tables = [kinds.get("verdicts", {}).get(name) for kinds in read_verdicts().values()]
    return [verdict["test"] for verdict in tables if verdict and verdict["found"] and "::" in verdict["test"]]


def keep_verdict(label: str, kind: str, name: str, verdict: dict[str, Any] | None) -> None:
    """Write one verdict into the file, or take it out again; two runs may share the file."""
    with FileLock(Path(tempfile.gettempdir()) / "lowvram-planted-faults.lock"):
        table = read_verdicts()
        verdicts = table.setdefault(label, {}).setdefault(kind, {})
        verdicts.pop(name, None)
        if verdict is not None:
            verdicts[name] = verdict
        table[label][kind] = dict(sorted(verdicts.items()))
        draft = VERDICTS.with_suffix(".tmp")
        draft.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(VERDICTS)


def write_table(_: argparse.Namespace) -> None:
    """Write the table of all faults with the verdicts of each label."""
    faults, table = read_faults(), read_verdicts()
    labels = list(table)
    lines = [
        "# Planted faults",
        "",
        "Written by `python tools/planted_faults.py table`; the faults are in `planted_faults.toml`, the verdicts in",
        "`planted_faults.json`.  A cell names the suite and test that found the fault; an empty one: no verdict yet.",
        "",
    ]
    for label in labels:
        verdicts = table[label].get("verdicts", {}).values()
        counts = {suite: sum(verdict["suite"] == suite for verdict in verdicts) for suite in SUITES}
        found = f"{counts['default']} by the default suite, {counts['nightly']} more by the nightly one"
        lines.append(f"- {label}: of {len(verdicts)} faults {sum(counts.values())} are found, {found}.")
    lines += ["", f"| fault | file | origin | {' | '.join(labels)} |", "| --- " * (3 + len(labels)) + "|"]
    for fault in faults:
        cells = []
        for label in labels:
            verdict = table[label].get("verdicts", {}).get(fault.name)
            test = ((verdict and verdict["test"]) or "").partition("[")[0]
            cells.append("" if verdict is None else f"{verdict['suite']}: {test}" if verdict["found"] else "**no**")
        lines.append(f"| {fault.what} | {fault.file} | {fault.origin} | {' | '.join(cells)} |")
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "record", "run", "table"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "lowvram-planted-faults")
    parser.add_argument("--suite", choices=(*SUITES, "both"), default="both")
    parser.add_argument("--label", default="today", help="under which verdicts are kept (default: %(default)s)")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="faults, or test files to record, whose names match"
    )
    parser.add_argument("--only-near", action="store_true", help="run only test files that are named after the file")
    parser.add_argument("--only-found", action="store_true", help="note no fault as not found: not all is recorded yet")
    parser.add_argument("--whole", type=int, default=0, metavar="N", help="run whole suites for N drawn faults")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--workers", default="2", help="pytest processes of record and --whole (default: %(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through every `finally`
    try:
        if arguments.command == "check":
            check(read_faults())
        else:
            {"record": record, "run": run, "table": write_table}[arguments.command](arguments)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
