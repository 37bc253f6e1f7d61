"""The folder of a cleaning: what of an earlier start goes, and what of somebody else stays."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lowvram.api import clean
from lowvram.config.cleaning import load_rules
from lowvram.data.clean.cleaner import clean_each_part
from lowvram.data.clean.work_folder import WorkFolder
from lowvram.errors import DataError
from tests.data.conftest import follow
from tests.data.test_cleaner import run, write_document


@pytest.mark.parametrize("again", ["kısa", "copy"], ids=["removed by a rule", "a copy of another"])
def test_an_output_of_a_start_before_goes_where_nothing_of_its_file_is_left(tmp_path: Path, again: str) -> None:
    generator = random.Random(3)
    first, second = write_document(generator), write_document(generator)
    texts, out = tmp_path / "in", tmp_path / "out"
    texts.mkdir()
    for name, text in (("a", first), ("b", second), ("c", first.upper())):
        (texts / f"{name}.txt").write_text(text, encoding="utf-8")
    work = clean_each_part([texts], out, load_rules(), processes=1, notes=lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        follow(work)
    assert sorted(path.name for path in out.glob("*.jsonl")) == ["a.jsonl", "b.jsonl"]
    (texts / "b.txt").write_text(first if again == "copy" else again, encoding="utf-8")
    report = run(texts, out)
    assert [row["output"] for row in report["files"]] == ["a.jsonl", None, None]
    assert [path.name for path in out.glob("*.jsonl")] == ["a.jsonl"]


@pytest.mark.parametrize("name", ["report.md", "report.json"])
def test_a_report_of_somebody_else_is_replaced_only_when_asked_and_one_of_ours_always(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text(write_document(random.Random(5)), encoding="utf-8")
    out.mkdir()
    (out / name).write_text('{"mine": 1}', encoding="utf-8")
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{name} is in the way"):
            clean(text, out)
        assert (out / name).read_text(encoding="utf-8") == '{"mine": 1}'
    assert clean(text, out, replace=True).documents == 1
    write = WorkFolder.write

    def stop(folder: WorkFolder, path: Path, value: dict) -> None:
        if path.name == "report.json":
            raise OSError("stopped")
        write(folder, path, value)

    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "write", stop)
        with pytest.raises(OSError, match="stopped"):
            clean(text, tmp_path / "next")
    assert (tmp_path / "next/report.md").is_file()
    # Other rules delete the page of the start before, which is ours.
    overrides = {"length.least_words": 3} if name == "report.md" else {}
    assert clean(text, tmp_path / "next", overrides=overrides).documents == 1


def test_a_report_that_names_files_outside_its_folder_deletes_nothing(tmp_path: Path) -> None:
    texts, out = tmp_path / "a.txt", tmp_path / "out"
    texts.write_text(write_document(random.Random(5)), encoding="utf-8")
    clean(texts, out)
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for name in ("../precious", (tmp_path / "precious").as_posix()):
        report["files"][0]["output"] = name
        (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
        with pytest.raises(DataError, match=r"names .*precious as an output"):
            clean(texts, out, replace=True)
        assert (tmp_path / "precious").is_file()
    report["files"][0]["output"] = None
    (out / "None").write_text("precious", encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
    (out / "a.jsonl").unlink()
    clean(texts, out, replace=True)
    assert (out / "None").is_file()


def test_the_report_shows_private_data_only_as_the_marks_that_stand_for_them(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text(f"{write_document(random.Random(5))} Yaz: ali@ornek.com.tr", encoding="utf-8")
    [example] = next(row for row in clean(text, tmp_path / "out").report["rules"] if row["rule"] == "private")[
        "examples"
    ]
    assert example["before"].endswith("Yaz: [E-POSTA]")
    assert "ali@" not in (tmp_path / "out/report.md").read_text(encoding="utf-8")
