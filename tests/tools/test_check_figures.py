"""Figures are called older where what they measure computes something else than on the day of the stamp."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_figures import PAGE, ROOT, describe, digest_of, read_stamps, stamp_again

CODE = '"""What it knows."""\n\nimport os\n\n\ndef double(x):\n    """Twice."""\n    return 2 * x  # why\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with one source, `code/a.py`."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text(CODE, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    "change, is_older",
    [
        (lambda text: text.replace("2 * x", "3 * x"), True),
        (lambda text: text + "\n\ndef triple(x):\n    return 3 * x\n", True),
        (lambda text: text.replace("# why", "# because").replace("Twice", "Two times"), False),
        (lambda text: text.replace("import os", "import sys"), False),
    ],
    ids=["a result", "a function", "comments", "an import"],
)
def test_only_what_is_computed_makes_a_figure_older(root: Path, change, is_older: bool) -> None:
    before = digest_of(("code",), root)
    (root / "code/a.py").write_text(change(CODE), encoding="utf-8")
    assert (digest_of(("code",), root) != before) == is_older


def test_a_file_that_only_moves_makes_nothing_older(root: Path) -> None:
    before = digest_of(("code",), root)
    (root / "code/inner").mkdir()
    (root / "code/a.py").rename(root / "code/inner/b.py")
    assert digest_of(("code",), root) == before


def test_a_stamp_is_older_until_it_is_written_again(root: Path) -> None:
    page = "x\n<!-- figures speed: measured 2020-01-02, sources unknown of code code/a.py -->\n| 1 |\n"
    assert [is_current for is_current, _ in describe(read_stamps(page), root)] == [False]
    again = stamp_again(page, "speed", root)
    assert "2020-01-02" not in again
    assert [is_current for is_current, _ in describe(read_stamps(again), root)] == [True]
    with pytest.raises(KeyError):
        stamp_again(page, "size", root)


def test_every_part_of_the_page_has_a_stamp_whose_sources_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    stamps = read_stamps(text)
    assert text.count("<!-- figures ") == len(stamps)
    assert len({stamp.name for stamp in stamps}) == len(stamps)
    assert [source for stamp in stamps for source in stamp.sources if not (ROOT / source).exists()] == []
    for part in text.split("\n## ")[1:]:
        assert "<!-- figures " in part, part.splitlines()[0]
