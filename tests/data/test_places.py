"""Where documents come from: noted in every format, kept beside shards, taken over from cleaned text."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from lowvram.api import clean
from lowvram.config.cleaning import load_rules
from lowvram.data.clean import cleaner
from lowvram.data.holdout import Holdout
from lowvram.data.nfc import nfc
from lowvram.data.places import Cursor, Place, PlaceList, locate, name_from, read_places
from lowvram.data.shard_documents import open_documents
from lowvram.data.shards import ShardSet, pack, pack_each_shard
from lowvram.data.text import documents
from lowvram.data.tokenizer import Tokenizer
from tests.data.conftest import follow

CSV = 'id,text\n1,bir\n2,"iki\nsatır"\n\n3,üç\n'
ROWS = ["bir", "iki\nsatır", "  ", "üç"]
JSON = "\n".join(["", *(json.dumps({"text": row}) for row in ROWS)])


def lines_of(file: Path) -> list[tuple[str, int]]:
    cursor = Cursor()
    return [(text, cursor.line) for text in documents(file, cursor=cursor)]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "\n\nbir\nbir\n\n\n \niki\n\nüç", [("bir\nbir", 3), ("iki", 8), ("üç", 10)]),
        ("crlf.txt", "bir\r\n\r\niki\r\niki", [("bir", 1), ("iki\r\niki", 3)]),
        ("cr.txt", "bir\r\riki", [("bir", 1), ("iki", 3)]),
        ("bom.txt", "\ufeffbir\n\ufeffiki\n", [("bir", 1), ("iki", 2)]),
        ("a.jsonl", JSON, [("bir", 2), ("iki\nsatır", 3), ("üç", 5)]),
        ("a.csv", CSV, [("bir", 2), ("iki\nsatır", 3), ("üç", 6)]),
        ("a.tsv", "text\nbir\n\niki\n", [("bir", 2), ("iki", 4)]),
    ],
)  # fmt: skip
def test_a_document_is_told_with_the_line_on_which_it_begins(
    tmp_path: Path, name: str, content: str, expected: list[tuple[str, int]]
) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8"))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode("utf-8")))
    assert lines_of(tmp_path / name) == expected
    assert lines_of(tmp_path / f"{name}.gz") == expected


def test_rows_of_parquet_are_counted_from_0_as_in_errors(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ROWS}), tmp_path / "a.parquet")
    assert lines_of(tmp_path / "a.parquet") == [("bir", 0), ("iki\nsatır", 1), ("üç", 3)]
    assert str(Place("a.parquet", 3)) == "a.parquet, row 3"
    words = [str(Place(name, 3)) for name in ("a.jsonl.gz", "hf:owner/name", "a.pdf", "a.parquet.zst")]
    assert words == ["a.jsonl.gz:3", "hf:owner/name, row 3", "a.pdf", "a.parquet.zst, row 3"]


def places_of(shards: ShardSet, tokenizer: Tokenizer) -> list[Place] | None:
    found: list[Place] = []
    for part in shards.parts():
        places = open_documents(shards, part, tokenizer).places
        if places is None:
            return None
        found += places
    return found


def texts_of(shards: ShardSet, tokenizer: Tokenizer) -> list[str]:
    return [data.decode() for part in shards.parts() for data in open_documents(shards, part, tokenizer).all_bytes()]


def test_shards_know_file_and_line_of_each_document_on_both_sides_of_a_split(
    folder: Path, small_tokenizer: Tokenizer, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, _ = follow(pack_each_shard([folder], small_tokenizer, tmp_path / "out", processes=1, holdout=Holdout(0.3)))
    monkeypatch.chdir(tmp_path)
    lines = {name: (folder / name).read_text(encoding="utf-8").split("\n") for name in ("a.txt", "b.txt")}
    seen = 0
    for shards in sides:
        places = places_of(shards, small_tokenizer)
        assert places is not None
        for place, text in zip(places, texts_of(shards, small_tokenizer), strict=True):
            name = Path(place.file)
            assert name.parent == Path("text")
            assert nfc(lines[name.name][place.line - 1]) == text  # each document has one line
            seen += 1
    assert seen == 60


def test_names_are_relative_to_the_shards_so_that_both_can_move(tmp_path: Path) -> None:
    listed = PlaceList(tmp_path / "shards/train")
    for file, line in ((tmp_path / "a.txt", 1), (tmp_path / "a.txt", 7), (Path("-"), 2), (Path("hf:o/n"), 0)):
        listed.add(file, line)
    data = listed.take()
    assert str(tmp_path) not in data.decode()
    found = read_places(data, tmp_path / "moved/to/shards", 4)
    moved = str(tmp_path / "moved/a.txt")
    assert found == [Place(moved, 1), Place(moved, 7), Place("-", 2), Place("hf:o/n", 0)]
    assert read_places(data, tmp_path, 5) is None
    for damaged in (data[:-9], data.replace(b'"steps"', b'"stairs"'), b"[]", b'{"format": 1, "runs": [3]}'):
        assert read_places(damaged, tmp_path, 4) is None
    odd = os.fsdecode(b"k\xf6t\xfc.txt")
    assert locate(name_from(tmp_path / odd, tmp_path), str(tmp_path)).endswith(odd)


def test_shards_of_an_older_version_open_and_packing_again_notes_places_and_encodes_nothing(
    packed: ShardSet, folder: Path, small_tokenizer: Tokenizer
) -> None:
    out = packed.directory
    expected = places_of(packed, small_tokenizer)
    for sidecar in sorted(out.glob("0*.json")):
        stated = json.loads(sidecar.read_text(encoding="utf-8"))
        del stated["places"]
        sidecar.write_text(json.dumps(stated), encoding="utf-8")
        sidecar.with_suffix(".places").unlink()
    older = ShardSet.open(out)
    assert older.hash == packed.hash
    assert places_of(older, small_tokenizer) is None
    inodes = [path.stat().st_ino for path in sorted(out.glob("*.bin"))]
    (again,), seen = follow(pack_each_shard([folder], small_tokenizer, out, processes=1))
    assert seen[-1].reused == seen[-1].shards == len(inodes)
    assert [path.stat().st_ino for path in sorted(out.glob("*.bin"))] == inodes
    assert again.hash == packed.hash
    assert places_of(again, small_tokenizer) == expected
    (out / "00001.places").write_bytes(b"torn")
    assert open_documents(again, again.parts()[1], small_tokenizer).places is None
    pack([folder], small_tokenizer, out, processes=1)
    assert places_of(again, small_tokenizer) == expected


def test_cleaned_text_names_the_users_own_file_also_when_it_is_cleaned_twice_and_packed(
    small_tokenizer: Tokenizer, turkish: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in/law").mkdir(parents=True)
    made = [" ".join(turkish[(n + k) % 16] for k in range(0, 12, 3)) for n in range(6)]
    Path("in/law/a.txt").write_text("kısa\n\n\n" + "\n\n".join(made[:4]), encoding="utf-8")
    rows = [json.dumps({"text": text}) for text in ("kısa", *made[4:])]
    Path("in/b.jsonl").write_text("\n".join(rows), encoding="utf-8")
    off = {"near_duplicates.on": False, "duplicate_lines.on": False}
    for processes in (1, 2):
        clean("in", f"clean{processes}", overrides=off, processes=processes)
    for name in ("law/a.jsonl", "b.jsonl"):
        assert Path("clean1", name).read_bytes() == Path("clean2", name).read_bytes()
    row = json.loads(Path("clean1/law/a.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert row["origin"] == {"file": "../../in/law/a.txt", "line": 4}
    clean("clean1", "again", overrides=off)
    for folder in ("clean1", "again"):
        shards = pack([Path(folder)], small_tokenizer, Path(f"shards-{folder}"), processes=1)
        law, other = str(Path("in/law/a.txt")), str(Path("in/b.jsonl"))
        expected = [Place(other, 2), Place(other, 3), *(Place(law, line) for line in (4, 6, 8, 10))]
        assert places_of(shards, small_tokenizer) == expected


@pytest.mark.parametrize(
    "origin", ["a.txt", {"file": 3, "line": 1}, {"file": "a.txt", "line": True}, {"file": "a"}, None]
)
def test_a_field_of_that_name_in_the_users_own_rows_is_no_place(tmp_path: Path, origin: object) -> None:
    cursor = Cursor()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "bir", "origin": origin}), encoding="utf-8")
    assert [(text, cursor.origin, cursor.line) for text in documents(tmp_path / "a.jsonl", cursor=cursor)] == [
        ("bir", None, 1)
    ]


def test_a_cleaning_that_goes_on_after_lines_or_files_moved_names_the_new_ones(
    turkish: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaner, "PART_BYTES", 1_000)
    made = [" ".join(turkish[(n + k) % 16] for k in range(0, 12, 3)) for n in range(10)]
    (tmp_path / "a.txt").write_text("\n\n".join(made), encoding="utf-8")
    rules = load_rules(None, ("near_duplicates.on=false", "duplicate_lines.on=false"))
    work = cleaner.clean_each_part([tmp_path / "a.txt"], tmp_path / "out", rules, processes=1)
    assert [next(work).stage for _ in range(2)] == ["Cleaning", "Cleaning"]
    work.close()
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.txt").rename(tmp_path / "moved/a.txt")
    work = cleaner.clean_each_part([tmp_path / "moved/a.txt"], tmp_path / "out", rules, processes=1)
    assert [next(work).reused for _ in range(2)] == [0, 0]
    work.close()
    (tmp_path / "moved/a.txt").write_text("\n\n\n" + "\n\n".join(made), encoding="utf-8")
    follow(cleaner.clean_each_part([tmp_path / "moved/a.txt"], tmp_path / "out", rules, processes=1))
    rows = [json.loads(line) for line in (tmp_path / "out/a.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [{"file": "../moved/a.txt", "line": line} for line in range(4, 24, 2)]
    assert [row["origin"] for row in rows] == expected
