"""The folder of a cleaning: what of an earlier start goes, and what of somebody else stays."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lowvram.api import clean
from lowvram.config.cleaning import load_rules
from lowvram.data.clean.cleaner import clean_each_part
from lowvram.data.clean.output import name_outputs
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


# Private data, alone and where only a repair brings it to light; what no part of any report may hold.
SECRETS = {
    "an address": ("ali@ornek.com.tr", "ali@"),
    "an address with a zero-width space": ("veli\u200b@ornek.com.tr", "ornek.com"),
    "an address with spoilt letters": ("ayse@Ã¶rnek.com.tr", "rnek.com"),
    "an address in parts": ("can@o\u0308rnek.com.tr", "rnek.com"),
    "a telephone": ("0532 123 45 67", "123 45"),
    "an IBAN with hard blanks": ("TR33\u00a00006\u00a01005\u00a01978\u00a06457\u00a08413\u00a026", "6457"),
    "a national number": ("10000000146", "0000146"),
}


@pytest.mark.parametrize("sets", [{}, {"private.on": False}], ids=["replaced", "the rule is off"])
def test_no_example_of_any_rule_shows_private_data(tmp_path: Path, sets: dict[str, object]) -> None:
    generator = random.Random(5)
    spoilt = ["Ã¼zÃ¼m ", "u\u0308zu\u0308m ", "gizli\u200bce ", "boş   \nsatır ", "", "a", "#" * 999]
    texts = [
        f"{before}{write_document(generator)} Yaz: {secret}\n" + ("" if before != "a" else write_document(generator))
        for secret, _ in SECRETS.values()
        for before in spoilt
    ]
    rows = [*texts, *texts[::5], *(f"{text} Bambaşka." for text in texts[::7])]
    long = write_document(generator, 400)
    rows += [f"{long[: 9_990 - shift]} {secret} {long}" for secret, _ in SECRETS.values() for shift in (0, 9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    for only in ({}, {"length.least_words": 150, "length.most_characters": 20_000}):
        out = tmp_path / f"out-{len(only)}"
        report = clean(tmp_path / "a.jsonl", out, overrides={**sets, **only}).report
        shown = {row["rule"]: len(row["examples"]) for row in report["rules"]}
        assert min(shown[rule] for rule in ("mojibake", "composed", "invisible", "spaces")) == 3, shown
        text = json.dumps(report["rules"], ensure_ascii=False) + (out / "report.md").read_text(encoding="utf-8")
        for name, (_, secret) in SECRETS.items():
            assert secret not in text.replace("\u00a0", " ").replace("\\", ""), name
        assert "[E-POSTA]" in text


def test_outputs_have_names_of_their_own() -> None:
    named = {
        ("a/x/b.txt", "a/y/b.txt"): ["x/b.jsonl", "y/b.jsonl"],
        ("a/b.txt.gz",): ["b.jsonl"],
        ("a/b.txt", "a/b.jsonl.zst", "a/c.v2.txt"): ["b.txt.jsonl", "b.jsonl.zst.jsonl", "c.v2.jsonl"],
        ("-", "stdin.txt"): ["stdin-.jsonl", "stdin.txt.jsonl"],
        ("hf:owner/name", "hf:other/name@test"): ["owner-name.jsonl", "other-name@test.jsonl"],
    }
    for files, outputs in named.items():
        found = [name.as_posix() for name in name_outputs([Path(file) for file in files])]
        assert len(set(found)) == len(files)
        if "-" not in files:
            assert found == outputs, files
