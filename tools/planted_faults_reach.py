"""Which test files reach a planted fault, by the lines that they were recorded to run; plants and runs nothing."""

from __future__ import annotations

import ast
import difflib
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FAULTS = Path(__file__).with_name("planted_faults.toml")


class Fault(NamedTuple):
    """One change of a text in a file.  origin: "hand", or the commit that mended this fault."""

    name: str
    file: str
    old: str
    new: str
    what: str
    origin: str

    def changed(self, source: str) -> str:
        """Return the file's text with the fault in it; raises ValueError unless it fits exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: the old text is {count} times in {self.file}, not once")
        return source.replace(self.old, self.new)

    def lines(self, source: str) -> set[int]:
        """Return the numbers of the lines that the fault changes, or removes."""
        self.changed(source)
        first = source[: source.index(self.old)].count("\n") + 1
        old, new = (text.splitlines() for text in (self.old, self.new))
        found: set[int] = set()
        for kind, begin, end, _, _ in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if kind != "equal":
                found.update(range(first + begin, first + max(end, begin + 1)))
        return found


def read_faults() -> list[Fault]:
    """Return all faults; raises ValueError where two have one name."""
    tables = tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]
    faults = [Fault(**table) for table in tables]
    double = {fault.name for fault in faults if sum(other.name == fault.name for other in faults) > 1}
    if double:
        raise ValueError(f"Two faults are called {min(double)}.")
    return faults


def check(faults: Sequence[Fault]) -> None:
    """Raise ValueError unless each fault fits its file once and leaves Python."""
    for fault in faults:
        ast.parse(fault.changed((ROOT / fault.file).read_text(encoding="utf-8")), fault.file)


class Reached(NamedTuple):
    """What a fault changes.  lines: inside functions, by file.  is_whole_file: whether any line of its file counts."""

    lines: dict[str, set[int]]
    is_whole_file: bool


def statement_of(tree: ast.Module, line: int) -> tuple[set[int], bool]:
    """Return the lines of the innermost statement that holds a line, and whether it lies in a function's body.

    Of a compound statement only the head counts.
    """
    own, is_inside = {line}, False
    for node in ast.walk(tree):  # outer statements come before inner ones
        if not isinstance(node, ast.stmt):
            continue
        body: list[ast.stmt] = getattr(node, "body", [])
        last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
        if node.lineno <= line <= last:
            own = set(range(node.lineno, last + 1))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and last < line <= (node.end_lineno or 0):
            is_inside = True
    return own, is_inside


def find_reached(fault: Fault, tree: Path) -> Reached:
    """Return what a fault changes.

    What stands outside functions is run by the import.  Of a name that is given there, the lines that mention it count;
    of anything else all lines of the file.
    """
    source = (tree / fault.file).read_text(encoding="utf-8")
    parsed = ast.parse(source)
    lines: dict[str, set[int]] = {}
    for line in fault.lines(source):
        own, is_inside = statement_of(parsed, line)
        if is_inside:
            lines.setdefault(fault.file, set()).update(own)
            continue
        named = re.match(r"(\s*)([A-Za-z_]\w*)\s*(:[^=]*)?=", source.splitlines()[min(own) - 1])
        users = find_users(named[2], fault.file, bool(named[1]), tree) if named else {}
        if not users:
            return Reached({}, True)
        for file, numbers in users.items():
            lines.setdefault(file, set()).update(numbers)
    return Reached(lines, False)


def find_users(name: str, file: str, is_attribute: bool, tree: Path) -> dict[str, set[int]]:
    """Return the lines inside functions that mention a name of a file, by file.

    An attribute of a class is looked for everywhere, another name in its own file and where it is imported.
    """
    word = re.compile(rf"\.{name}\b" if is_attribute else rf"\b{name}\b")
    imported = f"from {file.removeprefix('kernels/').removesuffix('.py').replace('/', '.')} import"
    found: dict[str, set[int]] = {}
    for path in [*tree.glob("lowvram/**/*.py"), *tree.glob("kernels/**/*.py")]:
        source, place = path.read_text(encoding="utf-8"), path.relative_to(tree).as_posix()
        if not word.search(source) or not (is_attribute or place == file or imported in source):
            continue
        parsed = ast.parse(source)
        for number, text in enumerate(source.splitlines(), 1):
            own, is_inside = statement_of(parsed, number) if word.search(text) else (set[int](), False)
            if is_inside:
                found.setdefault(place, set()).update(own)
    return found


def find_test_files(fault: Fault, maps: Path, suite: str) -> list[tuple[float, str]]:
    """Return recorded seconds and name of each test file that reaches a fault.

    Recorded or not, those that are named after the changed file come first, then those that import it; the others
    follow by their seconds.
    """
    tree = maps / "tree"
    reached = find_reached(fault, tree)
    functions = function_lines(tree / fault.file) if reached.is_whole_file else set()
    ranks = {path.relative_to(tree).as_posix(): rank(fault, path) for path in tree.glob("tests/**/test_*.py")}
    found = {name: 0.0 for name, rank in ranks.items() if rank < 2}
    for path in (maps / suite).glob("*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        name, ran = path.name.removesuffix(".json").replace("+", "/"), table["lines"]
        is_reached = any(numbers & set(ran.get(file, ())) for file, numbers in reached.lines.items())
        if is_reached or name in found or functions & set(ran.get(fault.file, ())):
            found[name] = table["seconds"]
    return sorted(((seconds, name) for name, seconds in found.items()), key=lambda one: (ranks.get(one[1], 2), *one))


def rank(fault: Fault, test_file: Path) -> int:
    """Return 0 for a test file that is named after the changed one, 1 for one that imports it, 2 for any other.

    `test_muon.py` and `test_muon_step.py` are named after muon.py and muon_triton.py.
    """
    stem = Path(fault.file).stem.removesuffix("_triton")
    if test_file.stem == f"test_{stem}" or test_file.stem.startswith(f"test_{stem}_"):
        return 0
    module = fault.file.removeprefix("kernels/").removesuffix(".py").replace("/", ".")
    return 1 if re.search(rf"(from|import) {re.escape(module)}\b", test_file.read_text(encoding="utf-8")) else 2


def function_lines(path: Path) -> set[int]:
    """Return the lines of all functions' bodies in a file."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.update(range(node.body[0].lineno, (node.end_lineno or 0) + 1))
    return found
