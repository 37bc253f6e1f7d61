"""The law of the house, kept by machine: budgets, who may import whom, who may speak, what must be documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("lowvram/**/*.py"), *ROOT.glob("kernels/**/*.py")])
TOOLS = sorted(ROOT.glob("tools/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*CODE, *TOOLS, *TESTS]}

MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_KERNEL_LINES = 400, 60, 150
LEAST_TEST_SHARE = 0.8
# Tables of words are data: their size says nothing about logic that wants a test.
TABLES = {ROOT / "lowvram/data/sample_words.py"}
# Top to bottom: a module imports from its own row or from one below.
LADDER = [
    ["cli"],
    ["fit"],
    ["train"],
    ["export", "evaluate", "serve"],
    ["generate"],
    ["objective"],
    ["checkpoint", "manifest"],
    ["model", "data"],
    ["config", "architecture", "recipe", "words", "runfile", "profile", "machine", "facts", "checkup", "plan"],
    ["field_names", "card_names"],
    ["errors", "units", "files", "json_files"],
    ["lowvram_kernels", "lowvram"],
]
WORDS = ["config", "recipe", "words", "runfile", "profile", "machine", "facts", "checkup", "plan", "errors", "units"]
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}
SEED_AREAS = {
    "tokenizer": 8,
    "architecture": 6,
    "RMSNorm": 4,
    "ALiBi": 7,
    "GQA": 4,
    "SwiGLU": 3,
    "block": 3,
    "full model": 7,
    "generation": 4,
    "data": 5,
    "schedule": 3,
    "device": 3,
    "numerical stability": 3,
}

each_module = pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
each_file = pytest.mark.parametrize("path", [*CODE, *TOOLS, *TESTS], ids=lambda path: str(path.relative_to(ROOT)))


def module_of(path: Path) -> str:
    """`lowvram.data.text` for lowvram/data/text.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("kernels", "__init__"))


def imports_of(path: Path) -> Iterator[str]:
    """Every module of ours that a file names in an import statement, lazy ones too."""
    known = {module_of(file) for file in CODE}
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name in known:
                yield name
            elif name.rpartition(".")[0] in known:
                yield name.rpartition(".")[0]


def row_of(module: str) -> int:
    parts = module.split(".")
    word = parts[1] if parts[0] == "lowvram" and len(parts) > 1 else parts[0]
    word = "cli" if word == "__main__" else word
    return next(row for row, names in enumerate(LADDER) if word in names)


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@each_file
def test_files_and_functions_keep_their_budget(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_FILE_LINES
    for function in functions_of(path):
        is_kernel = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
        limit = MOST_KERNEL_LINES if is_kernel else MOST_FUNCTION_LINES
        assert function.end_lineno - function.lineno + 1 <= limit, function.name


@each_module
def test_imports_go_down_only(path: Path) -> None:
    own = module_of(path)
    for imported in imports_of(path):
        assert row_of(imported) >= row_of(own), f"{own} imports {imported}, which stands above it"
        neighbours = {own.split(".")[1:2] == ["model"], imported.split(".")[1:2] == ["data"]}
        assert neighbours != {True}, "model knows no data"
        assert not (own.startswith("lowvram.data") and imported.startswith("lowvram.model")), "data knows no model"


def test_imports_have_no_circles_not_even_lazy_ones() -> None:
    graph = {module_of(path): set(imports_of(path)) - {module_of(path)} for path in CODE}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for imported in graph[module]:
                walk(imported, (*way, module))
            done.add(module)

    for module in graph:
        walk(module, ())


def test_the_words_and_the_help_never_import_torch() -> None:
    modules = ", ".join(f"lowvram.{word}" for word in WORDS)
    script = (
        f"import sys, lowvram, {modules}; from lowvram.cli.app import build_parser; build_parser().format_help(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_the_help_imports_no_heavy_package_at_all() -> None:
    heavy = {"torch", "numpy", "pydantic", "rich", "tokenizers", "tiktoken", "psutil", "safetensors"}
    script = (
        "import sys; from lowvram.cli.app import build_parser; build_parser().format_help(); "
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


@each_module
def test_only_the_command_line_prints_reads_arguments_and_exits(path: Path) -> None:
    if "cli" in path.parts or path.name == "__main__.py":
        return
    text = ast.unparse(TREES[path])
    for word in (r"\bprint\(", r"sys\.argv", r"sys\.exit", r"\binput\(", r"sys\.stdout", r"sys\.stderr"):
        assert not re.search(word, text), word


@each_module
def test_only_files_syncs_and_nothing_is_ever_unpickled(path: Path) -> None:
    text = ast.unparse(TREES[path])
    assert path.name == "files.py" or "fsync" not in text
    assert not re.search(r"\bpickle\b|torch\.load\(|torch\.save\(|np\.load\(", text)


@each_file
def test_every_text_file_is_opened_as_utf8(path: Path) -> None:
    for node in ast.walk(TREES[path]):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {keyword.arg for keyword in node.keywords}
        if name == "open" and len(node.args) > 1:
            assert "b" in ast.unparse(node.args[1]) or "encoding" in words, ast.unparse(node)
        if name.endswith((".write_text", ".read_text")):
            assert "encoding" in words or path in TESTS, ast.unparse(node)


@each_module
def test_a_module_says_what_it_knows_and_names_no_drawer(path: Path) -> None:
    assert ast.get_docstring(TREES[path]), "a module opens with one sentence"
    assert not FORBIDDEN_NAMES & set(path.stem.split("_"))


@each_module
def test_nothing_is_caught_blindly(path: Path) -> None:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            assert ast.unparse(node.type) not in ("Exception", "BaseException"), f"line {node.lineno}"


def public_definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


@each_module
def test_every_public_name_is_documented_and_annotated(path: Path) -> None:
    for node in public_definitions(TREES[path]):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        if isinstance(node, ast.FunctionDef) and not is_kernel:  # whose arguments are values of Triton's
            assert node.returns is not None, f"{node.name} does not say what it returns"
            bare = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation is None]
            assert set(bare) <= {"self", "cls", "ctx"}, f"{node.name}: {bare}"


def test_nothing_imports_tools_and_kernels_import_nothing_of_lowvram() -> None:
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) tools\b", text, re.MULTILINE)
        if "kernels" in path.parts:
            assert not re.search(r"^\s*(from|import) lowvram\b", text, re.MULTILINE)


def count_lines(paths: list[Path]) -> int:
    return sum(1 for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def test_no_two_files_of_tests_share_a_name() -> None:
    # Each folder alone would pass: pytest refuses them only where it collects both.
    names = Counter(path.name for path in TESTS if path.name.startswith("test_"))
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_there_is_enough_test_for_the_code() -> None:
    code = count_lines([path for path in CODE if path not in TABLES])
    tests = count_lines(TESTS)
    assert tests >= LEAST_TEST_SHARE * code, f"{tests} lines of test for {code} of code"


def test_every_area_of_the_seed_reports_acceptance_list_is_covered() -> None:
    found: Counter[str] = Counter()
    for path in TESTS:
        for function in functions_of(path):
            for decorator in function.decorator_list:
                if match := re.fullmatch(r"pytest\.mark\.covers\('([^']+)'\)", ast.unparse(decorator)):
                    found[match[1]] += 1
    assert set(found) <= set(SEED_AREAS)
    assert {area: found[area] for area, least in SEED_AREAS.items() if found[area] < least} == {}
    assert sum(SEED_AREAS.values()) == 60


def test_the_readme_shows_the_commands_help_as_it_is() -> None:
    script = ROOT / "tools/write_help.py"
    found = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_readme_names_every_preset_with_its_true_size() -> None:
    from lowvram.config.run_file import load_preset, preset_names

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in preset_names():
        model, _ = load_preset(name)
        assert re.search(rf"\| `{name}` \|.*\| {model.num_parameters():,} \|", readme), name


def test_the_readme_has_its_picture_and_its_figures() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme)
    assert pictures
    assert [picture for picture in pictures if not (ROOT / picture).is_file()] == []
    assert re.search(r"## Measured\n\n(?!MEASURED)\S", readme)
