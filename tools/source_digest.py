"""Hashes the source of a module and of all that it imports from here, to find out whether its table is outdated.

Only source text counts: an edited comment is a change; other line ends and the date are not.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def digest_sources(module: str, roots: Sequence[Path] = (ROOT, ROOT / "kernels")) -> str:
    """Return 16 digits that change with the text of `module` or of a module under `roots` that it imports."""
    texts: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _find(name, roots)
        if name in texts or path is None:
            continue
        texts[name] = path.read_text(encoding="utf-8")  # in which every line ends with \n, on Windows too
        waiting += _imports(ast.parse(texts[name]))
    text = "".join(f"{name}\0{texts[name]}\0" for name in sorted(texts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _imports(tree: ast.Module) -> list[str]:
    """Return every name in import statements that may be a module, inside functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _find(module: str, roots: Sequence[Path]) -> Path | None:
    for root in roots:
        base = root.joinpath(*module.split("."))
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None
