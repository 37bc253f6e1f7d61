"""Digests the text of a module and of all that it imports here, to tell whether a table that it made is old.

It knows source text alone: an edited comment is a change, another line end or another day is none.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def digest_sources(module: str, roots: Sequence[Path] = (ROOT, ROOT / "kernels")) -> str:
    """Return 16 digits that change with the text of `module` or of a module under `roots` that it imports."""
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _find(name, roots)
        if name in found or path is None:
            continue
        found[name] = path.read_text(encoding="utf-8")  # in which every line ends with \n, on Windows too
        waiting += _imports(ast.parse(found[name]))
    text = "".join(f"{name}\0{found[name]}\0" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _imports(tree: ast.Module) -> list[str]:
    """Return every name that an import statement may mean as a module, inside functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _find(module: str, roots: Sequence[Path]) -> Path | None:
    for root in roots:
        place = root.joinpath(*module.split("."))
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None
