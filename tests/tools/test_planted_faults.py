"""Which lines a planted fault changes, and which test files are run for it."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tools.planted_faults_reach import Fault, find_reached, find_test_files, statement_of

SOURCE = """\
LIMIT = 3


class Box:
    size = 4

    def double(self) -> int:
        total = sum(
            [
                self.size,
            ]
        )
        if total > LIMIT:
            total += 1
        return total
"""


def fault(old: str, new: str) -> Fault:
    return Fault("a-name", "lowvram/box.py", old, new, "what", "hand")


def write_tree(maps: Path, tests: dict[str, tuple[float, list[int]]]) -> None:
    """Write the source, and for each test file its recorded seconds and lines."""
    for name in ("lowvram/box.py", "tests/test_box.py"):
        (maps / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (maps / "tree" / name).write_text(SOURCE if name.startswith("lowvram") else "", encoding="utf-8")
    (maps / "default").mkdir()
    for name, (seconds, lines) in tests.items():
        table = {"hash": "", "seconds": seconds, "lines": {"lowvram/box.py": lines}}
        (maps / "default" / (name.replace("/", "+") + ".json")).write_text(json.dumps(table), encoding="utf-8")


@pytest.mark.parametrize("old", ["total", "nothing of the kind"])
def test_a_fault_that_does_not_fit_exactly_once_is_refused(old: str) -> None:
    with pytest.raises(ValueError, match="a-name"):
        fault(old, "x").changed(SOURCE)


def test_only_the_lines_that_differ_are_changed() -> None:
    old = "        if total > LIMIT:\n            total += 1\n        return total\n"
    assert fault(old, "        if total > LIMIT:\n            pass\n        return total\n").lines(SOURCE) == {14}
    assert fault(old, "        if total > LIMIT:\n            total += 1\n").lines(SOURCE) == {15}


@pytest.mark.parametrize(
    "line, lines, is_inside",
    [
        pytest.param(1, {1}, False, id="module"),
        pytest.param(5, {5}, False, id="class"),
        pytest.param(7, {7}, False, id="head-of-a-function"),
        pytest.param(10, {8, 9, 10, 11, 12}, True, id="call-over-lines"),
        pytest.param(13, {13}, True, id="head-of-an-if"),
        pytest.param(14, {14}, True, id="inside-an-if"),
    ],
)
def test_a_line_stands_for_its_innermost_statement(line: int, lines: set[int], is_inside: bool) -> None:
    assert statement_of(ast.parse(SOURCE), line) == (lines, is_inside)


@pytest.mark.parametrize(
    "old, lines",
    [
        pytest.param("LIMIT = 3", {13}, id="constant"),
        pytest.param("size = 4", {8, 9, 10, 11, 12}, id="attribute"),
    ],
)
def test_what_the_import_runs_counts_where_it_is_used(old: str, lines: set[int], tmp_path: Path) -> None:
    write_tree(tmp_path, {})
    reached = find_reached(fault(old, old + "0"), tmp_path / "tree")
    assert reached == ({"lowvram/box.py": lines}, False)


def test_the_files_that_ran_the_line_are_run_quick_ones_first_behind_the_one_of_that_name(tmp_path: Path) -> None:
    ran, other = [13, 14], [13, 15]
    tests = {"tests/test_a.py": (9.0, ran), "tests/test_b.py": (2.0, ran), "tests/test_c.py": (1.0, other)}
    write_tree(tmp_path, tests)
    found = find_test_files(fault("total += 1", "total += 2"), tmp_path, "default")
    assert found == [(0.0, "tests/test_box.py"), (2.0, "tests/test_b.py"), (9.0, "tests/test_a.py")]
