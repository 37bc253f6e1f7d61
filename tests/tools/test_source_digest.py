"""The digest of a module's sources: it changes with what the module imports, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.source_digest import digest_sources

ROOT = Path(__file__).parents[2]


def write_tree(root: Path, line_end: str = "\n") -> Path:
    sources = {
        "house/__init__.py": "",
        "house/door.py": "from house.lock import turn\nimport json",
        "house/lock.py": "def turn():\n    from house import key\n    return key",
        "house/key.py": "TEETH = 5",
        "house/garden.py": "import house.door",
    }
    for name, text in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text.replace("\n", line_end), encoding="utf-8", newline="")
    return root


@pytest.mark.parametrize("name", ["door", "lock", "key"])
def test_a_change_of_the_module_or_of_what_it_imports_changes_the_digest(name: str, tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    before = digest_sources("house.door", [root])
    with (root / f"house/{name}.py").open("a", encoding="utf-8") as file:
        file.write("\nX = 1\n")
    assert digest_sources("house.door", [root]) != before


def test_line_ends_and_modules_that_are_not_imported_leave_the_digest(tmp_path: Path) -> None:
    linux, windows = write_tree(tmp_path / "linux"), write_tree(tmp_path / "windows", "\r\n")
    before = digest_sources("house.door", [linux])
    assert digest_sources("house.door", [windows]) == before
    (linux / "house/garden.py").write_text("import house.key", encoding="utf-8")
    assert digest_sources("house.door", [linux]) == before


def test_the_digest_of_a_rehearsal_reads_the_model_and_the_kernels() -> None:
    names = [ROOT, ROOT / "kernels"]
    assert digest_sources("lowvram.fit.rehearse", names) != digest_sources("lowvram.fit.rehearse", names[:1])
    assert digest_sources("lowvram.fit.rehearse", names) != digest_sources("lowvram.model.transformer", names)
