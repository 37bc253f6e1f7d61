"""Checks and times every kernel and whole training steps on this machine's CUDA card, and writes a report.

python tools/gpu/report.py [--minutes 9]
python tools/gpu/report.py --only NAME … [--out FOLDER]     cases with one of these in their name, such as "train tr-1b"
python tools/gpu/report.py --tiny [--out FOLDER]            smallest shapes, on a processor too, to see that all runs

Writes profiles/measured/CARD.json and CARD.md after every case, so that an interrupted run keeps its results.  Each
kernel is compared with its reference before it is timed; one with a wrong result is reported as wrong, without a time.
A worker process measures: if it crashes, hangs or loses the card, only its case fails, and another worker continues.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from lowvram.errors import ConfigError
from lowvram.hardware.detect import explain_mismatch, find_card, find_driver, find_torch
from lowvram.hardware.profile import Profile, find_profile
from lowvram.storage.disk import DISK
from tools.gpu.table import Roofs, Row, figures_of, is_ok, judge_aims, page, roofs_of

MEASURED = ROOT / "profiles" / "measured"
# The share of the total time that the tests may take.
_TESTS_SHARE = 0.25
# The most test processes at a time: most of a kernel's test is compilation, which runs on the processor.
_MOST_SHARDS = 4
_STARTING_S = 120.0
_GRACE_S = 10.0
WORKER = (sys.executable, str(ROOT / "tools" / "gpu" / "worker.py"))
_TINY_TESTS = ("tests/test_units.py",)


class Shard(NamedTuple):
    """One pytest process, and the file that it writes to."""

    process: subprocess.Popen[bytes]
    path: Path


class Report:
    """All rows so far, and the two files to which they are written after every row."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.began = folder, time.time()
        self.facts: Row = {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.facts |= {"driver": find_driver_version(), "commit": find_commit()}
        self.rows: list[Row] = []
        self.names: list[str] = []
        self.profile: Profile | None = None

    def learn_facts(self, facts: Row) -> None:
        """Add a worker's facts about this machine."""
        self.facts |= facts
        try:
            self.profile = find_profile(facts["card"])[0] if facts["device"] == "cuda" else None
        except ConfigError:
            self.profile = None  # the catalogue does not know it

    @property
    def card_id(self) -> str:
        """Return the name of the files, without ending."""
        if self.profile is not None:
            return self.profile.id
        return re.sub(r"[^a-z0-9]+", "-", str(self.facts.get("card", "unknown")).lower()).strip("-")

    @property
    def roofs(self) -> Roofs:
        """Return the rates that bound a kernel, measured and published."""
        published: dict[str, float] = {}
        if self.profile is not None:
            published = {number: 1e12 * tflops for number, tflops in self.profile.tflops.items()}
            if self.profile.bandwidth_bytes_per_s is not None:
                published["copy"] = self.profile.bandwidth_bytes_per_s
        return roofs_of(self.rows, published)

    def add(self, row: Row) -> None:
        """Add a row, print it and write the files."""
        self.rows.append(row)
        print(f"{time.time() - self.began:6.0f} s  {say(row, self.roofs)}", flush=True)
        self.write()

    def write(self) -> list[Path]:
        """Write both files; returns them."""
        roofs, done = self.roofs, {row["name"] for row in self.rows}
        missing = [name for name in self.names if name not in done]
        facts = self.facts | {"took_s": time.time() - self.began}
        rows = [row | {"aims": judge_aims(row, roofs)} if "aims" in row else row for row in self.rows]
        rows = [row | figures_of(row, roofs) if row.get("kind") == "kernel" and is_ok(row) else row for row in rows]
        self.folder.mkdir(parents=True, exist_ok=True)
        both = [self.folder / f"{self.card_id}.{ending}" for ending in ("json", "md")]
        values = {**facts, "roofs": roofs._asdict(), "missing": missing, "rows": rows}
        DISK.write(both[0], (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
        DISK.write(both[1], page(facts, self.rows, missing, roofs).encode())
        return both


def say(row: Row, roofs: Roofs) -> str:
    """Return a row in one line."""
    start = f"{row['name']}: "
    if not is_ok(row) or row.get("kind") == "tests":
        return f"{start}{row['status']}, {row.get('note', '')}"
    if row["kind"] == "rate":
        return f"{start}{row['per_second']:.3g} a second"
    aims = ["met" if aim["is_met"] else "missed" for aim in judge_aims(row, roofs) if aim["is_met"] is not None]
    ending = f", aims {', '.join(aims)}" if aims else ""
    if row["kind"] == "training":
        return f"{start}{row['tokens_per_second']:,.0f} tokens/s{ending}"
    of_roof = figures_of(row, roofs)["of_roof"]
    share = "" if of_roof is None else f", {of_roof:.0%} of the roof"
    return f"{start}{row['seconds'] * 1e6:,.1f} µs{share}{ending}"


def find_driver_version() -> str:
    """Return the version of the NVIDIA driver, "none" if there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return "none"
    except pynvml.NVMLError:
        return "none"
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def find_commit() -> str:
    """Return the checkout's commit, marked as dirty if files differ from it; "unknown" without git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def read_events(stream: IO[str]) -> queue.Queue[Row | None]:
    """Return a queue of a worker's events, which another thread fills; None marks the end."""
    events: queue.Queue[Row | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            if line.startswith('{"event"'):
                events.put(json.loads(line))
            else:
                print(line, end="", file=sys.stderr)
        events.put(None)

    threading.Thread(target=read, daemon=True).start()
    return events


class Supervisor:
    """Starts workers until every case has a row or the time is over."""

    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self.report, self.options = report, options
        self.until = report.began + 60 * options.minutes

    def run(self) -> None:
        """Measure everything; raises SystemExit if a worker ends before it has finished a case."""
        while not self._has_all() and time.time() < self.until:
            with tempfile.TemporaryDirectory() as folder:
                count = len(self.report.rows)
                ending = self._follow(Path(folder))
                if ending == "":
                    return
                if len(self.report.rows) == count:
                    raise SystemExit(f"The worker ended before its first case: {ending}")
                print(f"the worker ended ({ending}); another one goes on", file=sys.stderr)

    def _has_all(self) -> bool:
        return bool(self.report.names) and set(self.report.names) <= {row["name"] for row in self.report.rows}

    def _follow(self, folder: Path) -> str:
        """Follow one worker to its end; returns why it ended early, "" if all is done."""
        done, errors = folder / "done.json", folder / "stderr.txt"
        done.write_text(json.dumps([row["name"] for row in self.report.rows]), encoding="utf-8")
        command = [*WORKER, "--until", str(self.until), "--done", str(done)]
        command += ["--tiny"] * self.options.tiny + (["--only", *self.options.only] if self.options.only else [])
        with open(errors, "w", encoding="utf-8") as log:
            worker = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert worker.stdin is not None
        assert worker.stdout is not None
        running = ""
        try:
            for event in self._events(read_events(worker.stdout)):
                running = self._take(event, running, worker.stdin)
                if event["event"] == "end":
                    return ""
            worker.wait(_GRACE_S)
            why = last_line(errors) or f"exit status {worker.returncode}"
        except queue.Empty:
            why = "no time was left" if time.time() > self.until else "no answer in time"
        finally:
            worker.kill()
            worker.wait()
        if running:
            status = "left out" if time.time() > self.until else "failed"
            self.report.add({"name": running, "status": status, "note": f"it took the worker with it: {why}"})
        return why

    def _events(self, events: queue.Queue[Row | None]) -> Iterator[Row]:
        limit_s = _STARTING_S
        while True:
            left_s = self.until + _GRACE_S - time.time()
            event = events.get(timeout=max(0.1, min(limit_s, left_s)))
            if event is None:
                return
            limit_s = event.get("limit_s", _STARTING_S)
            yield event

    def _take(self, event: Row, running: str, answer: IO[str]) -> str:
        """Act on an event; returns the case that is running now."""
        values = {name: value for name, value in event.items() if name != "event"}
        match event["event"]:
            case "facts":
                self.report.learn_facts(values)
            case "plan":
                self.report.names = values["names"]
            case "begin":
                return str(values["name"])
            case "row":
                self.report.add(values)
            case "tests":
                share_s = 60 * self.options.minutes * _TESTS_SHARE
                self.report.add(run_tests(min(share_s, self.until - time.time()), self.options.tiny))
                answer.write("go\n")
                answer.flush()
        return ""


def environment() -> dict[str, str]:
    """Return this process's environment, changed so that Python imports this checkout."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def last_line(path: Path) -> str:
    """Return the last line of a file that is not empty."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def run_tests(limit_s: float, is_tiny: bool) -> Row:
    """Run the tests that need a card and those of the kernels in several processes; returns their row."""
    row: Row = {"name": "tests", "kind": "tests"}
    if importlib.util.find_spec("pytest") is None:
        return row | {"status": "left out", "note": "pytest is not installed, so no test ran: pip install pytest"}
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        shards = [start_shard(files, Path(folder) / f"{i}.txt") for i, files in enumerate(split_tests(is_tiny))]
        for shard in shards:
            try:
                shard.process.wait(max(0.1, began + limit_s - time.time()))
            except subprocess.TimeoutExpired:
                shard.process.kill()
                shard.process.wait()
        return row | count_tests(shards, time.time() - began)


def split_tests(is_tiny: bool) -> list[list[str]]:
    """Return each pytest process's arguments: the kernels' tests in equal parts, and the other tests marked gpu."""
    if is_tiny:
        return [list(_TINY_TESTS)]
    files = sorted((ROOT / "tests" / "kernels").rglob("test_*.py"), key=lambda path: -path.stat().st_size)
    count = max(1, min(_MOST_SHARDS, (os.cpu_count() or 2) // 2) - 1)
    shards = [[str(path.relative_to(ROOT)) for path in files[start::count]] for start in range(count)]
    return [*([*shard, "-m", "gpu or not heavy"] for shard in shards), ["tests", "--ignore=tests/kernels", "-m", "gpu"]]


def start_shard(arguments: list[str], path: Path) -> Shard:
    """Start pytest; it writes a line for each test."""
    # Without the project's own pytest options, which would start more processes.
    plain = ["-o", "addopts=", "-v", "--tb=line", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plain, *arguments]
    with open(path, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    return Shard(process, path)


def count_tests(shards: list[Shard], took_s: float) -> Row:
    """Return how the tests ended; of a process that was stopped early, only the tests that it had finished."""
    ended: dict[str, list[str]] = {}
    for shard in shards:
        text = shard.path.read_text(encoding="utf-8", errors="replace")
        for match in re.finditer(r"^(\S+\.py::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", text, re.MULTILINE):
            ended.setdefault(match[2].lower(), []).append(match[1])
    # 5: pytest found nothing to run.
    broken = [shard for shard in shards if shard.process.returncode not in (0, 1, 5)]
    wrong = [*ended.get("failed", ()), *ended.get("error", ())]
    counts = ", ".join(f"{len(names)} {word}" for word, names in sorted(ended.items())) or "none ran"
    note = f"{counts}, {took_s:.0f} s, {len(shards)} processes"
    note += f"; {len(broken)} of them were cut or broke off" if broken else ""
    note += f"; not passed: {', '.join(wrong)}" if wrong else ""
    status = "wrong" if wrong else "ok" if ended and not broken else "failed"
    return {"status": status, "note": note, "seconds": took_s, "counts": {word: len(n) for word, n in ended.items()}}


def refuse_without_card() -> None:
    """Raise SystemExit with an explanation if there is no card to measure."""
    mismatch = explain_mismatch(find_driver(), find_torch())
    if find_card() is None or mismatch is not None:
        why = mismatch or "This report times kernels on an NVIDIA card, and no driver here shows one."
        raise SystemExit(f"{why}  To see that every case runs, at its smallest and untimed, type: {_TINY_COMMAND}")


_TINY_COMMAND = "python tools/gpu/report.py --tiny"


def main() -> None:
    """Read the options and make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="what all of it may take (default: 9)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases with one of these in their name")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, on a card or in Triton's interpreter")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: profiles/measured, for a part a new one")
    options = parser.parse_args()
    if options.tiny and find_card() is None:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by the worker
    elif not options.tiny:
        refuse_without_card()
    is_part = options.tiny or options.only
    folder = options.out or (Path(tempfile.mkdtemp(prefix="lowvram-report-")) if is_part else MEASURED)
    report = Report(folder, shlex.join(["python", "tools/gpu/report.py", *sys.argv[1:]]))
    try:
        Supervisor(report, options).run()
    finally:
        written = report.write()
    print(f"wrote {' and '.join(map(str, written))}", flush=True)


if __name__ == "__main__":
    main()
