"""The GPU report as a command: workers that crash or hang, tests that fail or last, files, tables, no card at all."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import report as gpu_report
from tools.gpu.report import Report, Supervisor, refuse_without_card, run_tests, split_tests
from tools.gpu.table import Roofs, figures_of, judge_aims, page, roofs_of

ROOT = Path(__file__).parents[2]
FACTS = {"device": "cuda", "card": "NVIDIA H200", "capability": [9, 0], "cuda": "13.0"}
FACTS |= {"torch": "2.13", "triton": "3.7", "python": "3.12"}
COPY = {"name": "rate copy", "kind": "rate", "numbers": "copy", "per_second": 4e12, "shape": "1 GiB", "status": "ok"}
BF16 = {"name": "rate bf16", "kind": "rate", "numbers": "bf16", "per_second": 8e14, "shape": "8192³", "status": "ok"}
PUBLISHED = {"copy": 5e12, "bf16": 1e15}


def kernel(**others: Any) -> dict[str, Any]:
    timing = {"seconds": 1e-3, "low": 0.9e-3, "high": 1.1e-3, "samples": 9, "calls": 1, "host_seconds": 2e-5}
    work = {"moved_bytes": 2e9, "operations": 1e11, "numbers": "bf16", "rivals": [], "aims": []}
    return {"name": "multiply 8 × 8", "kind": "kernel", "status": "ok", "error": 0.0, **timing, **work, **others}


def training(**others: Any) -> dict[str, Any]:
    mode = {"step_seconds": 0.5, "tokens_per_second": 2e5, "peak_bytes": 2**30}
    plan = {"micro_batch": 4, "accumulate": 2, "recompute": "none"}
    row = {"name": "train tr-1b in rtx4060", "kind": "training", "status": "ok", "plan": plan, "operations": 2e14}
    row |= {"modes": {"eager": mode}, "tokens_per_second": 2e5, "ledger_bytes": 2**30, "limit_bytes": 2**31}
    return row | {"aims": [{"of": "tokens_per_second", "least": 1e5}]} | others


@pytest.fixture
def report(tmp_path: Path) -> Report:
    made = Report(tmp_path / "measured", "python tools/gpu/report.py")
    made.learn_facts(FACTS)
    return made


def options(minutes: float = 5.0, **others: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"minutes": minutes, "only": [], "tiny": True} | others))


@pytest.mark.nightly
def test_the_whole_command_runs_every_case_where_there_is_no_card(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, str(ROOT / "tools/gpu/report.py"), "--tiny", "--minutes", "8", "--out", str(tmp_path)]
    found = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert found.returncode == 0, found.stdout + found.stderr
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text(encoding="utf-8"))
    assert {row["name"]: row.get("note") for row in written["rows"] if row["status"] != "ok"} == {}
    assert written["missing"] == []
    kinds = {row["kind"] for row in written["rows"]}
    assert kinds == {"rate", "kernel", "tests", "training"}
    assert all(row["error"] <= row["tolerance"] for row in written["rows"] if row["kind"] == "kernel")
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert all(title in text for title in ("## Roofs", "## Tests", "## Kernels", "## Training", "Nothing."))
    assert all(f"| {row['name']} |" in text for row in written["rows"] if row["kind"] == "kernel")
    assert {"card", "driver", "torch", "triton", "date", "command", "commit"} <= set(written)


def test_without_a_card_one_paragraph_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "find_card", lambda: None)
    monkeypatch.setattr(gpu_report, "find_driver", lambda: None)
    with pytest.raises(SystemExit) as raised:
        refuse_without_card()
    said = str(raised.value.code)
    assert "no driver here shows one" in said
    assert "--tiny" in said
    assert "\n" not in said


WORKER = """
import json, os, sys, time
from pathlib import Path
done = json.loads(Path(sys.argv[sys.argv.index("--done") + 1]).read_text())
def tell(event, **values): print(json.dumps({"event": event, **values}), flush=True)
tell("facts", **FACTS)
tell("plan", names=["a", "b", "c", "tests"])
print("what a library prints")
for name in ["a", "b", "c", "tests"]:
    if name in done: continue
    if name == "tests":
        tell("tests"); assert sys.stdin.readline() == "go\\n"; continue
    tell("begin", name=name, limit_s=LIMIT)
    if name == "b": print("an illegal access", file=sys.stderr, flush=True); ENDING
    tell("row", name=name, kind="rate", numbers=name, per_second=1.0, shape="1", status="ok")
tell("end")
"""


def use_worker(monkeypatch: pytest.MonkeyPatch, folder: Path, ending: str, limit_s: float = 60.0) -> None:
    path = folder / "worker.py"
    path.write_text(WORKER.replace("FACTS", repr(FACTS)).replace("ENDING", ending).replace("LIMIT", str(limit_s)))
    monkeypatch.setattr(gpu_report, "WORKER", (sys.executable, str(path)))
    tests = {"name": "tests", "kind": "tests", "status": "ok", "note": "3 passed"}
    monkeypatch.setattr(gpu_report, "run_tests", lambda limit_s, is_tiny: tests)


def test_a_worker_that_crashes_costs_its_case_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Report
) -> None:
    use_worker(monkeypatch, tmp_path, "os._exit(3)")
    Supervisor(report, options()).run()
    assert [row["name"] for row in report.rows] == ["a", "b", "c", "tests"]
    assert [row["status"] for row in report.rows] == ["ok", "failed", "ok", "ok"]
    assert report.rows[1]["note"] == "it took the worker with it: an illegal access"
    written = json.loads((report.folder / "h200.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["a", "b", "c", "tests"]
    assert "- b: failed, it took the worker" in (report.folder / "h200.md").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_a_kernel_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Report) -> None:
    use_worker(monkeypatch, tmp_path, "time.sleep(600)", limit_s=3.0)
    Supervisor(report, options()).run()
    assert [row["status"] for row in report.rows] == ["ok", "failed", "ok", "ok"]
    assert report.rows[1]["note"].endswith("no answer in time")


@pytest.mark.nightly
def test_a_run_that_is_cut_keeps_its_rows_and_names_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Report
) -> None:
    use_worker(monkeypatch, tmp_path, "time.sleep(600)")
    monkeypatch.setattr(gpu_report, "_GRACE_S", 0.0)
    supervisor = Supervisor(report, options())
    supervisor.until = time.time() + 6.0
    supervisor.run()
    assert [(row["name"], row["status"]) for row in report.rows] == [("a", "ok"), ("b", "left out")]
    written = json.loads(report.write()[0].read_text(encoding="utf-8"))
    assert written["missing"] == ["c", "tests"]
    assert "- c: not reached" in (report.folder / "h200.md").read_text(encoding="utf-8")


def test_a_worker_that_cannot_begin_ends_the_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, report: Report
) -> None:
    path = tmp_path / "worker.py"
    path.write_text("raise SystemExit('torch finds no CUDA card')")
    monkeypatch.setattr(gpu_report, "WORKER", (sys.executable, str(path)))
    with pytest.raises(SystemExit, match="torch finds no CUDA card"):
        Supervisor(report, options()).run()


def share(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    path = folder / "test_it.py"
    path.write_text(f"import pytest, time\n{text}")
    monkeypatch.setattr(
        gpu_report, "split_tests", lambda is_tiny: [[str(path), "--rootdir", str(folder), "-c", os.devnull]]
    )


@pytest.mark.nightly
def test_tests_are_counted_and_those_that_fail_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    share(monkeypatch, tmp_path, "def test_a(): pass\ndef test_b(): assert 0\ndef test_c(): pytest.skip('no')\n")
    row = run_tests(60.0, False)
    assert row["status"] == "wrong"
    assert row["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert row["note"].endswith("test_it.py::test_b")


@pytest.mark.nightly
def test_tests_that_last_too_long_are_cut_and_what_passed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import time; print('tests/a.py::test_a PASSED [ 50%]', flush=True); time.sleep(600)"

    def start(arguments: list[str], path: Path) -> gpu_report.Shard:
        with open(path, "wb") as file:
            return gpu_report.Shard(subprocess.Popen([sys.executable, "-S", "-c", script], stdout=file), path)

    monkeypatch.setattr(gpu_report, "start_shard", start)
    row = run_tests(5.0, is_tiny=True)
    assert row["status"] == "failed"
    assert row["counts"] == {"passed": 1}
    assert "1 of them were cut" in row["note"]


def test_without_pytest_the_report_says_that_no_test_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.importlib.util, "find_spec", lambda name: None)
    assert "pytest is not installed" in run_tests(1.0, False)["note"]


def test_every_file_of_the_kernels_tests_is_run_once_and_the_marked_ones_of_the_rest() -> None:
    shards = split_tests(is_tiny=False)
    files = [file for shard in shards for file in shard if file.endswith(".py")]
    assert sorted(files) == sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/kernels").rglob("test_*.py"))
    assert all("gpu or not heavy" in shard for shard in shards[:-1])
    assert shards[-1] == ["tests", "--ignore=tests/kernels", "-m", "gpu"]


def test_a_kernels_figures_are_shares_of_what_bounds_it() -> None:
    roofs = roofs_of([COPY, BF16], PUBLISHED)
    figures = figures_of(kernel(), roofs)
    assert figures["bytes_per_second"] == pytest.approx(2e12)
    assert figures["of_copy"] == figures["of_roof"] == pytest.approx(0.5)  # 0.5 ms of bytes, 0.125 of operations
    assert figures["of_published_roof"] == pytest.approx(0.4)
    assert figures_of(kernel(operations=4e11), roofs)["of_roof"] == pytest.approx(0.5)
    assert figures_of(kernel(operations=6.4e11), roofs)["of_roof"] == pytest.approx(0.8)


def test_a_roof_that_was_not_measured_is_not_guessed() -> None:
    roofs = roofs_of([COPY, BF16 | {"status": "failed"}], {})
    figures = figures_of(kernel(), roofs)
    assert figures["of_copy"] == pytest.approx(0.5)
    assert figures["of_roof"] is None
    assert figures["of_published_roof"] is None


@pytest.mark.parametrize(
    ("aim", "row", "reached"),
    [
        ({"of": "copy", "least": 0.4}, kernel(), 0.5),
        ({"of": "cuBLAS", "least": 1.0}, kernel(rivals=[{"name": "cuBLAS", "seconds": 8e-4}]), 0.8),
        ({"of": "cuBLAS", "least": 1.0}, kernel(rivals=[{"name": "cuBLAS", "note": "RuntimeError: no"}]), None),
        ({"of": "copy", "least": 0.4}, kernel(status="wrong"), None),
        ({"of": "tokens_per_second", "least": 1e5}, training(), 2e5),
    ],
    ids=["bytes", "rival", "rival that refused", "wrong result", "tokens"],
)
def test_an_aim_is_met_missed_or_not_known(aim: dict[str, Any], row: dict[str, Any], reached: float | None) -> None:
    (judged,) = judge_aims(row | {"aims": [aim]}, roofs_of([COPY, BF16], PUBLISHED))
    assert judged["reached"] == (None if reached is None else pytest.approx(reached))
    assert judged["is_met"] == (None if reached is None else reached >= aim["least"])


def test_the_page_names_card_driver_versions_command_and_date() -> None:
    facts = FACTS | {"command": "python tools/gpu/report.py", "date": "2026-01-02T03:04:05+00:00", "took_s": 123.4}
    facts |= {"driver": "580.1", "commit": "abc1234"}
    rivals = [{"name": "cuBLAS", "seconds": 5e-4}, {"name": "other", "note": "RuntimeError: a | b"}]
    rows = [COPY, BF16, kernel(rivals=rivals), training(), kernel(name="bad", status="wrong", note="not timed")]
    text = page(facts, rows, ["never"], Roofs({"copy": 4e12, "bf16": 8e14}, PUBLISHED))
    for words in (
        "NVIDIA H200",
        "580.1",
        "2.13",
        "3.7",
        "`python tools/gpu/report.py`",
        "2026-01-02",
        "abc1234",
        "123 s",
    ):
        assert words in text
    assert "| copy | 4,000 GB/s | 1 GiB | 5,000 GB/s |" in text
    assert "cuBLAS: 500.0 µs, 0.50×<br>other: refused (RuntimeError: a / b)" in text
    assert "| 50% / 40% |" in text
    assert "100,000 tokens/s: met (200,000 tokens/s)" in text
    assert "400.0 (50%)" in text  # 2e14 operations in half a second, of 8e14
    assert "- bad: wrong, not timed\n- never: not reached" in text


def test_a_card_that_the_catalogue_does_not_know_has_a_file_of_its_own(tmp_path: Path) -> None:
    report = Report(tmp_path, "command")
    report.learn_facts(FACTS | {"card": "NVIDIA Unheard-of 9000"})
    assert report.card_id == "nvidia-unheard-of-9000"
    assert report.roofs.published == {}
