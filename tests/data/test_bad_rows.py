"""Rows that are no text: each kind stops, is skipped or is reported alike, in every format, whatever the processes."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lowvram.data.bad_rows import MOST_LOST, MOST_SKIPPED, BadRow, BadRows
from lowvram.data.encoding import explain_not_utf8
from lowvram.data.holdout import Holdout
from lowvram.data.shards import pack, pack_each_shard
from lowvram.data.text import documents
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from tests.data.conftest import follow
from tests.flows.typed import Output, typed

GOOD = [f"iyi belge {number}" for number in range(3)]


def jsonl(*middle: bytes) -> bytes:
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    return b"\n".join([good[0], *middle, *good[1:]]) + b"\n"


def parquet(values: list, kind: pyarrow.DataType | None = None) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, kind)}), sink)
    return sink.getvalue().to_pybytes()


# Name of a file, its bytes, the documents that are left, and per bad row: its place and its kind.  Unreadable files end
# too early: nobody knows how much of them would be lost, so they are never skipped.
FAULTS = {
    "NUL in text": ("a.txt", b"iyi belge 0\n\nko\0tu\n\niyi belge 1\n\niyi belge 2", GOOD, [("a.txt:3", "with NUL")]),
    "NUL in a JSON line": ("a.jsonl", jsonl(b'{"text": "a\0b"}'), GOOD, [("a.jsonl:2", "with NUL")]),
    "NUL in a JSON string": ("a.jsonl", jsonl(b'{"text": "a\\u0000b"}'), GOOD, [("a.jsonl:2", "with NUL")]),
    "NUL in Parquet": ("a.parquet", parquet([GOOD[0], "a\0b", *GOOD[1:]]), GOOD, [("a.parquet, row 1", "with NUL")]),
    "null in JSON": ("a.jsonl", jsonl(b'{"text": null}'), GOOD, [("a.jsonl:2", "null")]),
    "null in Parquet": ("a.parquet", parquet([GOOD[0], None, *GOOD[1:]]), GOOD, [("a.parquet, row 1", "null")]),
    "a bad byte takes its document": (
        "a.txt",
        b"iyi belge 0\n\nilk\nk\xf6t\xfc\n\xff\nson\n\niyi belge 1\n\niyi belge 2",
        GOOD,
        [("a.txt:4", "not UTF-8")],
    ),
    "a bad byte in JSON": ("a.jsonl", jsonl(b'{"text": "k\xf6t\xfc"}'), GOOD, [("a.jsonl:2", "not UTF-8")]),
    "broken JSON twice": (
        "a.jsonl",
        jsonl(b"{", b'{"text": "a'),
        GOOD,
        [("a.jsonl:2", "not JSON"), ("a.jsonl:3", "not JSON")],
    ),
    "a lone surrogate": ("a.jsonl", jsonl(b'{"text": "\\ud800"}'), GOOD, [("a.jsonl:2", "with half a character")]),
    "a number": ("a.jsonl", jsonl(b'{"text": 5}'), GOOD, [("a.jsonl:2", "not text")]),
    "a missing field": ("a.jsonl", jsonl(b'{"body": "a"}'), GOOD, [("a.jsonl:2", "without the field")]),
    "a list": ("a.jsonl", jsonl(b'["a"]'), GOOD, [("a.jsonl:2", "not an object")]),
    "an empty file": ("a.txt", b"", [], [("a.txt", "empty")]),
    "Parquet without rows": ("a.parquet", parquet([], pyarrow.string()), [], [("a.parquet", "empty")]),
    "numbers in Parquet": ("a.parquet", parquet([1]), [], [("a.parquet, row 0", "not text")]),
    "no Parquet": ("a.parquet", b"PAR1", [], [("a.parquet", "unreadable")]),
    "a cut gz": (
        "a.txt.gz",
        gzip.compress(b"iyi belge 0\n\n" + bytes(range(33, 127)) * 20, 0)[:60],
        [],  # less than a buffer was read when the end was found missing
        [("a.txt.gz", "unreadable")],
    ),
}


def read(folder: Path, bad_rows: BadRows) -> list[str]:
    found = [text for file in sorted(folder.iterdir()) for text in documents(file, bad_rows=bad_rows)]
    bad_rows.finish()
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize("name, data, left, faults", FAULTS.values(), ids=FAULTS)
def test_each_fault_stops_is_skipped_and_is_reported_at_its_place(
    place: Path, name: str, data: bytes, left: list[str], faults: list[tuple[str, str]]
) -> None:
    (place / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(place, BadRows(hint="Of rows.", file_hint="Of files."))
    assert str(caught.value).startswith(str(place / faults[0][0]))
    ends_file = faults[0][1] == "unreadable"
    assert caught.value.fix.startswith("Of files. " if ends_file else "Of rows. ")
    with pytest.raises(DataError) as caught:
        read(place, BadRows())
    assert caught.value.fix.strip() == caught.value.fix
    if ends_file:
        with pytest.raises(DataError, match=r"Of files\."):
            read(place, BadRows("skip", file_hint="Of files."))
    for action in ("report",) if ends_file else ("skip", "report"):
        told: list[BadRow] = []
        bad_rows = BadRows(action, told.append)
        assert read(place, bad_rows) == left
        assert [row.kind for row in told] == [kind for _, kind in faults]
        for row, (where, _) in zip(told, faults, strict=True):
            assert row.what.startswith(f"{place / where} ") or row.what.startswith(f"{place / where}: ")
        assert (bad_rows.count, bad_rows.rows) == (len(faults), len(left) + len(faults))
        assert bad_rows.can_be_skipped != ends_file


def test_a_file_that_ends_too_early_is_never_skipped_as_one_row(place: Path) -> None:
    (place / "a.txt").write_text("\n\n".join(f"belge {number}" for number in range(2_000)))
    lines = b"".join(b'{"text": "belge %d"}\n' % number for number in range(5_000))
    (place / "b.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    (place / "c.parquet").write_bytes(parquet(GOOD))
    for file, field in (("b.jsonl.gz", "text"), ("c.parquet", "body")):
        bad_rows = BadRows("skip")
        assert len(list(documents(place / "a.txt", bad_rows=bad_rows))) == 2_000, "one in 2,000 would be few"
        with pytest.raises(DataError, match=f"^{place / file} "):
            list(documents(place / file, field, bad_rows=bad_rows))


def test_what_is_skipped_and_what_is_left_does_not_depend_on_processes_or_a_resume(
    small_tokenizer: Tokenizer, tmp_path: Path, place: Path, small_parts: None
) -> None:
    lines = [json.dumps({"text": f"{number}. belge " * 9}).encode() for number in range(600)]
    lines[7] = lines[500] = b"{"
    (place / "a.jsonl").write_bytes(b"\n".join(lines))
    (place / "b.txt").write_bytes(b"k\xff")
    counts = set()
    hashes = set()
    for out, processes in (("one", 1), ("two", 2), ("one", 1)):
        bad_rows = BadRows("skip")
        hashes.add(pack([place], small_tokenizer, tmp_path / out, processes=processes, bad_rows=bad_rows).hash)
        counts.add((bad_rows.rows, *sorted(bad_rows.kinds.items())))
    assert counts == {(601, ("not JSON", 2), ("not UTF-8", 1))}
    assert len(hashes) == 1
    options = {"holdout": Holdout(0.3), "processes": 1, "bad_rows": BadRows("skip")}
    sides = follow(pack_each_shard([place], small_tokenizer, tmp_path / "split", **options))[0]
    assert sum(side.documents for side in sides) == 598


@pytest.mark.parametrize(
    "good, bad, stops",
    [
        pytest.param(0, 10, False, id="ten are always allowed"),
        pytest.param(0, 11, True, id="eleven are more than a hundredth of eleven"),
        pytest.param(1089, 11, False, id="a hundredth"),
        pytest.param(1088, 11, True, id="one row more than a hundredth"),
        pytest.param(MOST_SKIPPED * 200, MOST_SKIPPED, False, id="the most"),
        pytest.param(MOST_SKIPPED * 200, MOST_SKIPPED + 1, True, id="one more than the most"),
        pytest.param(MOST_SKIPPED * 200, MOST_SKIPPED * 2, True, id="far more than the most"),
    ],
)
def test_skipping_ends_at_its_limits_and_reporting_never(good: int, bad: int, stops: bool) -> None:
    def take_all(bad_rows: BadRows) -> None:
        bad_rows.rows = good
        for number in range(bad):
            bad_rows.take(BadRow("not JSON", f"a.jsonl:{number} is not JSON."))
        bad_rows.finish()

    take_all(reported := BadRows("report"))
    assert reported.can_be_skipped != stops
    if stops:
        with pytest.raises(
            DataError, match=r"rows so far are bad.*not JSON.*The first: a\.jsonl:0 .*`check_texts` lists"
        ):
            take_all(BadRows("skip"))
    else:
        take_all(BadRows("skip"))


@pytest.mark.parametrize(
    "good, lost, stops",
    [
        pytest.param(0, MOST_LOST, False, id="a little is always allowed"),
        pytest.param(0, MOST_LOST + 1, True, id="one character more"),
        pytest.param(99 * (MOST_LOST + 1), MOST_LOST + 1, False, id="a hundredth"),
        pytest.param(99 * (MOST_LOST + 1) - 1, MOST_LOST + 1, True, id="a little more than a hundredth"),
        pytest.param(99 * MOST_LOST, 100 * MOST_LOST, True, id="half"),
    ],
)
def test_few_rows_that_are_much_text_are_not_skipped(good: int, lost: int, stops: bool) -> None:
    for action in ("report", "skip"):
        bad_rows = BadRows(action)
        bad_rows.count_text(good)
        bad_rows.take(BadRow("not UTF-8", "a.txt:1 is not UTF-8.", characters=lost))
        assert bad_rows.can_be_skipped != stops
        if stops and action == "skip":
            words = rf"1 bad row holds {lost:,} of {lost + good:,} characters.*1%.*The first: a\.txt:1"
            with pytest.raises(DataError, match=words):
                bad_rows.finish()
        else:
            bad_rows.finish()


def test_all_the_text_that_goes_with_a_bad_row_is_counted(place: Path) -> None:
    (place / "a.txt").write_bytes(b"1234\n\n12\nk\xff\n123\n\xff\0\n1\n\n12345\n\n\xff\n\xef\xbb\xbf1\n")
    (place / "b.jsonl").write_bytes(jsonl(b'{"text": 1234}'))
    told: list[BadRow] = []
    bad_rows = BadRows("skip", told.append)
    assert read(place, bad_rows) == ["1234", "12345", "1", *GOOD]
    assert [row.characters for row in told] == [3 + 3 + 4 + 3 + 2, 2, len('{"text": 1234}\n')]
    assert bad_rows.lost_characters == sum(row.characters for row in told)
    assert bad_rows.characters == sum(map(len, ["1234", "12345", "1", *GOOD]))


def test_a_file_of_bad_rows_is_not_read_to_its_end(place: Path) -> None:
    (place / "a.jsonl").write_bytes(b"{\n" * 5_000)
    bad_rows = BadRows("skip")
    with pytest.raises(DataError, match="1,001 of 1,001 rows"):
        read(place, bad_rows)


TURKISH = "Şükrü Bey'in dükkânında çiğ köfte; Iğdır'ın ağacı, İzmir'in yazı. " * 20


@pytest.mark.parametrize(
    "sample, words",
    [
        pytest.param(TURKISH.encode() + b"\xfe" + TURKISH.encode(), "Mend or delete", id="one damaged byte"),
        pytest.param("çok ".encode() + "şey".encode("cp1254"), "Mend or delete", id="two encodings"),
        pytest.param(TURKISH.encode("cp1254"), "iconv -f WINDOWS-1254", id="Windows"),
        pytest.param(TURKISH.encode("iso8859_9"), "iconv -f WINDOWS-1254", id="Latin-5, which Windows' contains"),
        pytest.param(TURKISH.encode("cp857"), "iconv -f CP857", id="DOS"),
        pytest.param(TURKISH.encode("mac_turkish"), "iconv -f MACTURKISH", id="old Macs"),
        pytest.param("кошка".encode("cp1251"), "Find out which it is", id="Russian"),
        pytest.param(b"don\x92t", "Find out which it is", id="a quotation mark alone"),
    ],
)
def test_a_conversion_is_advised_only_where_it_makes_text_of_the_file(sample: bytes, words: str) -> None:
    assert words in explain_not_utf8(sample).fix


@pytest.mark.parametrize("command", ["tokenizer train", "data pack"])
def test_the_command_line_stops_skips_and_reports(
    command: str, place: Path, small_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_tokenizer.save(tmp_path / "my tok")
    (place / "a.jsonl").write_bytes(jsonl(*[b'{"text": 1}'] * 7))
    (place / "not.pdf").write_bytes(b"%PDF")

    options = ["--vocab", "300", "--out", "my tok"]
    if command == "data pack":
        options = ["--tokenizer", "my tok", "--out", "my shards", "--processes", "1"]
    options += ["--replace"]

    def run(action: str) -> Output:
        return typed(*typed_as(action))

    def typed_as(action: str) -> list[str]:
        return [*command.split(), "in", "--on-bad-row", action, *options]

    stopped, skipped, reported = run("stop"), run("skip"), run("report")
    assert stopped.code == 1
    assert "a.jsonl:2: the field 'text' holds a number" in stopped.err
    assert "--on-bad-row skip leaves such rows out" in stopped.err
    assert "1 file in the folders passed over (1 .pdf)" in stopped.err
    assert skipped.code == 0
    assert skipped.err.count("Skipped: in/a.jsonl:") == 5
    assert "Skipped 7 of 10 rows: 7 not text." in skipped.err
    if command == "tokenizer train":
        assert "Next: lowvram data pack in --on-bad-row skip --holdout" in skipped.out
    assert reported.code == 1
    lines = reported.out.splitlines()
    assert [line.split(": ")[0] for line in lines[:7]] == [f"in/a.jsonl:{number}" for number in range(2, 9)]
    assert lines[7] == "7 of 10 rows are bad: 7 not text."
    assert typed_words(lines[8]) == [*typed_as("skip"), "(or", "repair", "them)"]
    (place / "a.jsonl").write_bytes(jsonl())
    options += ["--holdout", "12.5%"]
    whole = run("report")
    assert (whole.code, whole.err) == (0, reported.err)
    assert whole.out.startswith("All 3 rows of 1 file are text.\n")
    assert typed_words(whole.out.splitlines()[1]) == typed_as("stop")
    (place / "b.txt.gz").write_bytes(gzip.compress(b"kesik")[:-1])
    (place / "a.jsonl").unlink()
    cut = run("report").out.splitlines()
    assert cut[0] == "in/b.txt.gz cannot be read to its end. It was cut short: its compressed data end too early."
    assert cut[1] == "1 of 1 row is bad: 1 unreadable."
    assert cut[2] == "skip would stop, too: repair these files, or leave files out with --leave-out."
    del options[-2:]  # the folder holds shards that were packed without --holdout
    assert "Such a file is never used in part; --leave-out leaves it out" in run("skip").err
    assert "All files are left out." in typed(*typed_as("skip"), "--leave-out", "in/b.txt.gz").err
    (place / "a.jsonl").write_bytes(jsonl(b"{"))
    answer = run("report").out.splitlines()[3]
    assert typed_words(answer) == [*typed_as("skip"), "--leave-out", "in/b.txt.gz", "(or", "repair", "them)"]
    left_out = typed(*typed_words(answer)[:-3])
    assert (left_out.code, "Left out as asked: in/b.txt.gz." in left_out.err) == (0, True)
    assert "1 of 4 rows: 1 not JSON. That is more than 1 %; up to 10 rows are always skipped." in left_out.err
    assert "names no file that is read" in typed(*typed_as("skip"), "--leave-out", place.parent / "my tok").err


def typed_words(line: str) -> list[str]:
    return shlex.split(line.removeprefix("Next: lowvram "))


def test_a_report_packs_nothing_and_text_that_is_all_skipped_is_said(
    place: Path, small_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (place / "a.jsonl").write_bytes(b"{\n")
    out = tmp_path / "shards"
    assert typed("data", "pack", place, "--out", out, "--on-bad-row", "report").code == 1
    assert not out.exists()
    with pytest.raises(DataError, match="no text to pack"):
        pack([place], small_tokenizer, out, bad_rows=BadRows("skip"))
