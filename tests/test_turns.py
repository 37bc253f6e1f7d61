"""The part of a sweep that a test run checks: the same on every day and system, another after a change."""

from __future__ import annotations

from pathlib import Path

from tests.turns import turn_of

MANY = 2**60


def test_only_a_change_of_the_sources_moves_on_to_another_part(tmp_path: Path) -> None:
    trees = []
    for name, line_end in (("linux", b"\n"), ("windows", b"\r\n")):
        root = tmp_path / name
        (root / "package/inner").mkdir(parents=True)
        (root / "package/b.py").write_bytes(b"x = 1" + line_end)
        (root / "package/inner/a.toml").write_bytes(b"y = 2" + line_end)
        (root / "package/notes.md").write_text(name)
        trees.append(root)
    linux, windows = trees
    assert turn_of(MANY, "package", root=linux) == turn_of(MANY, "package", root=windows)
    found = {turn_of(MANY, "package", root=linux), turn_of(MANY, "package/inner", root=linux)}
    (linux / "package/b.py").write_bytes(b"x = 2\n")
    found.add(turn_of(MANY, "package", root=linux))
    (linux / "package/b.py").rename(linux / "package/c.py")
    found.add(turn_of(MANY, "package", root=linux))
    assert len(found) == 4
    assert {turn_of(turns, "package", root=linux) < turns for turns in (1, 2, 18)} == {True}
