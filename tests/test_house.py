"""The rules of this project that a machine can check: lengths, who imports whom, who prints, what is documented."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted([*ROOT.glob("lowvram/**/*.py"), *ROOT.glob("kernels/**/*.py")])
TOOLS = sorted(ROOT.glob("tools/*.py"))
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# Above these a reader starts to scroll: each longer one is listed here with the reason why it is not shorter, as
# "lowvram/data/words.py" (a file) or "lowvram/data/words.py::name" (a function in it).
MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_KERNEL_LINES = 400, 60, 150
LONG: dict[str, str] = {}
# Top to bottom: a module imports from its own row or from one below.
LADDER = [
    ["cli"],
    ["serve"],
    ["api"],
    ["fit"],
    ["train"],
    ["convert", "evaluate"],
    ["generate"],
    ["objective"],
    ["model", "data"],
    ["storage"],
    ["config", "hardware"],
    ["errors", "units", "shell", "finish"],
    ["lowvram_kernels", "lowvram"],
]

FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "misc"}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def code_of(path: Path) -> str:
    """A file's code without its comments, laid out by ast.unparse."""
    return ast.unparse(tree_of(path))


def place(path: Path, line: int = 1) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


def module_of(path: Path) -> str:
    """`lowvram.data.text` for lowvram/data/text.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part not in ("kernels", "__init__"))


@functools.cache
def known_modules() -> set[str]:
    return {module_of(file) for file in CODE}


def imports_of(path: Path) -> Iterator[str]:
    """Every module of ours that a file names in an import statement, lazy ones too."""
    known = known_modules()
    for node in ast.walk(tree_of(path)):
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
    yield from (n for n in ast.walk(tree_of(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def long_ones(path: Path) -> Iterator[tuple[str, str]]:
    """Every file and function above its length: its name in LONG, and how long it is."""
    name = path.relative_to(ROOT).as_posix()
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > MOST_FILE_LINES:
        yield name, f"{name} has {lines} lines, more than {MOST_FILE_LINES}"
    for function in functions_of(path):
        lines = function.end_lineno - function.lineno + 1
        if lines <= MOST_FUNCTION_LINES:
            continue
        most = MOST_KERNEL_LINES if is_kernel(function) else MOST_FUNCTION_LINES
        if lines > most:
            yield (
                f"{name}::{function.name}",
                f"{place(path, function.lineno)} {function.name}: {lines} lines, not {most}",
            )


def test_what_is_long_is_listed_with_its_reason() -> None:
    found = dict(pair for path in [*CODE, *TOOLS, *TESTS] for pair in long_ones(path))
    unlisted = [text for name, text in found.items() if name not in LONG]
    assert unlisted == [], "Why is it not shorter? A good reason belongs into LONG, in tests/test_house.py."
    assert [name for name in LONG if name not in found] == [], "no longer long: take these out of LONG"
    assert [name for name, reason in LONG.items() if len(reason.split()) < 3] == [], "say the reason in a sentence"


def test_imports_go_down_only() -> None:
    wrong = []
    for path in CODE:
        own = module_of(path)
        for imported in imports_of(path):
            if row_of(imported) < row_of(own):
                wrong.append(f"{place(path)} imports {imported}, which stands above it")
            neighbours = own.split(".")[1:2], imported.split(".")[1:2]
            if neighbours in ((["model"], ["data"]), (["data"], ["model"])):
                wrong.append(f"{place(path)} imports {imported}: model and data do not know each other")
    assert wrong == []


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
    rooms = ("lowvram.config.", "lowvram.hardware.", "lowvram.errors", "lowvram.units", "lowvram.shell")
    modules = ", ".join(module for module in map(module_of, CODE) if module.startswith(rooms))
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


def calls_of(path: Path) -> Iterator[ast.Call]:
    yield from (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))


def test_only_the_command_line_prints_reads_arguments_and_exits() -> None:
    words = (r"\bprint\(", r"sys\.argv", r"sys\.exit", r"\binput\(", r"sys\.stdout", r"sys\.stderr")
    quiet = [path for path in CODE if "cli" not in path.parts and path.name != "__main__.py"]
    assert [(place(path), word) for path in quiet for word in words if re.search(word, code_of(path))] == []


def test_only_files_syncs_and_nothing_is_ever_unpickled() -> None:
    assert [place(path) for path in CODE if path.name != "disk.py" and "fsync" in code_of(path)] == []
    unpickles = r"\bpickle\b|torch\.load\(|torch\.save\(|np\.load\("
    assert [place(path) for path in CODE if re.search(unpickles, code_of(path))] == []


def test_every_text_file_is_opened_as_utf8() -> None:
    wrong = []
    for path in [*CODE, *TOOLS, *TESTS]:
        for node in calls_of(path):
            name = ast.unparse(node.func)
            words = {keyword.arg for keyword in node.keywords}
            is_text = name == "open" and len(node.args) > 1 and "b" not in ast.unparse(node.args[1])
            is_text |= name.endswith((".write_text", ".read_text")) and path not in TESTS
            if is_text and "encoding" not in words:
                wrong.append(f"{place(path, node.lineno)} {ast.unparse(node)}")
    assert wrong == []


def test_a_module_says_what_it_knows_and_names_no_drawer() -> None:
    assert [place(path) for path in CODE if not ast.get_docstring(tree_of(path))] == []
    assert [place(path) for path in CODE if FORBIDDEN_NAMES & set(path.stem.split("_"))] == []


def test_nothing_is_caught_blindly() -> None:
    blind = ("None", "Exception", "BaseException")
    assert [
        place(path, node.lineno)
        for path in CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or ast.unparse(node.type) in blind)
    ] == []


def public_definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if "overload" in map(ast.unparse, node.decorator_list):
                continue  # its implementation follows, and is documented
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node)


def test_every_public_name_is_documented_and_annotated() -> None:
    wrong = []
    for path in CODE:
        for node in public_definitions(tree_of(path)):
            here = f"{place(path, node.lineno)} {node.name}"
            wrong += [] if ast.get_docstring(node) else [f"{here} has no docstring"]
            if isinstance(node, ast.FunctionDef) and not is_kernel(node):  # whose arguments are values of Triton's
                wrong += [] if node.returns is not None else [f"{here} does not say what it returns"]
                bare = [a.arg for a in [*node.args.args, *node.args.kwonlyargs] if a.annotation is None]
                wrong += [f"{here}: {name} has no type" for name in bare if name not in ("self", "cls", "ctx")]
    assert wrong == []


def test_nothing_imports_tools_and_kernels_import_nothing_of_lowvram() -> None:
    for path in CODE:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) tools\b", text, re.MULTILINE)
        if "kernels" in path.parts:
            assert not re.search(r"^\s*(from|import) lowvram\b", text, re.MULTILINE)


def test_no_two_files_of_tests_share_a_name() -> None:
    # Each folder alone would pass: pytest refuses them only where it collects both.
    names = Counter(path.name for path in TESTS if path.name.startswith("test_"))
    assert {name: count for name, count in names.items() if count > 1} == {}


def test_the_readme_shows_the_commands_help_as_it_is() -> None:
    script = ROOT / "tools/write_help.py"
    found = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_page_of_presets_names_each_with_its_true_size() -> None:
    from lowvram.config.run_file import load_preset, preset_names

    page = (ROOT / "docs/presets.md").read_text(encoding="utf-8")
    for name in preset_names():
        model, _ = load_preset(name)
        assert re.search(rf"\| `{name}` \|.*\| {model.num_parameters():,} \|", page), name


def test_the_readme_is_short_and_has_its_picture_and_its_figures() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", readme)
    assert pictures
    assert [picture for picture in pictures if not (ROOT / picture).is_file()] == []
    assert "(docs/measured.md)" in readme
    assert len(readme.splitlines()) <= 150
