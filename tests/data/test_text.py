"""Documents out of files: what is read, and what is refused with which words."""

from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lowvram.data.text import ENDINGS, KINDS, documents, find_files
from lowvram.errors import DataError, MachineError

TEXTS = ["Birinci belge.\nİki satır.", "İkinci belge: ığüşöç 😀", "Üçüncü"]
PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def parquet_bytes(columns: dict[str, list]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def content(kind: str, texts: list[str]) -> bytes:
    if kind == ".txt":
        return "\n\n".join(texts).encode("utf-8")
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode("utf-8")
    if kind in (".csv", ".tsv"):
        quotes, comma = ('"', ",") if kind == ".csv" else ("", "\t")
        rows = [f"{quotes}{text}{quotes}{comma}{number}" for number, text in enumerate(texts)]
        return "\n".join([f"text{comma}id", *rows]).encode("utf-8")
    return parquet_bytes({"text": texts, "id": list(range(len(texts)))})


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refusal(path: Path, field: str = "text", error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        list(documents(path, field))
    assert caught.value.what
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    kind = next(kind for kind in KINDS if ending.startswith(kind))
    texts = [text.replace("\n", " ") for text in TEXTS] if kind == ".tsv" else TEXTS
    packed = PACKINGS[ending.removeprefix(kind)](content(kind, texts))
    assert list(documents(write(tmp_path / f"a{ending}", packed))) == texts


def test_an_ending_in_capitals_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "A.TXT.GZ", gzip.compress(b"bir"))
    assert find_files([tmp_path]) == [path]
    assert list(documents(path)) == ["bir"]


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param("a\n\nb", ["a", "b"], id="one blank line"),
        pytest.param("\n\na\nb\n\n\n\nc\n", ["a\nb", "c"], id="many blank lines"),
        pytest.param("a\n \t\nb", ["a", "b"], id="white space in the blank line"),
        pytest.param("a\n\u00a0\u3000\nb", ["a", "b"], id="unicode white space in the blank line"),
        pytest.param("a\r\nb\r\n\r\nc\r\n", ["a\r\nb", "c"], id="CRLF stays inside a document"),
        pytest.param("  a \n\tb \n\nc \n", ["  a \n\tb ", "c "], id="spaces at the edges stay"),
        pytest.param("\ufeffa\n\nb", ["a", "b"], id="byte order mark"),
        pytest.param("a\u2028\u0085b", ["a\u2028\u0085b"], id="other line ends are no line ends"),
        pytest.param("e\u0301", ["e\u0301"], id="NFD is left alone"),
    ],
)
def test_blank_lines_part_the_documents_of_a_text_file(tmp_path: Path, data: str, expected: list[str]) -> None:
    assert list(documents(write(tmp_path / "a.txt", data.encode("utf-8")))) == expected


def test_blank_lines_and_blank_texts_of_jsonl_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\n{"text": "bir\\n\\niki"}\r\n \n{"text": " "}\n{"text": "\\ud83d\\ude00"}')
    assert list(documents(path)) == ["bir\n\niki", "😀"]


def test_another_field_is_read_when_named(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", b'{"body": "x", "text": 3}\n')
    table = write(tmp_path / "a.parquet", parquet_bytes({"body": ["x", " ", "y"], "text": [1, 2, 3]}))
    assert list(documents(lines, "body")) == ["x"]
    assert list(documents(table, "body")) == ["x", "y"]


def test_zstd_frames_one_after_the_other_are_all_read(tmp_path: Path) -> None:
    pack = PACKINGS[".zst"]
    path = write(tmp_path / "a.txt.zst", pack(b"bir\n\n") + pack(b"") + pack(b"iki\n\n" * 50_000))
    assert list(documents(path)) == ["bir"] + ["iki"] * 50_000


@pytest.mark.parametrize("ending", [".txt.gz", ".txt.zst", ".jsonl.zst"])
def test_a_file_is_never_wholly_in_memory(tmp_path: Path, ending: str) -> None:
    texts = ["kelime " * 2_000] * 2_000
    kind = ending[: ending.rindex(".")]
    path = write(tmp_path / f"a{ending}", PACKINGS[ending.removeprefix(kind)](content(kind, texts)))
    tracemalloc.start()
    count = sum(1 for _ in documents(path))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(texts)
    assert peak_bytes < 28_000_000 / 4


def test_folders_are_searched_sorted_and_each_file_taken_once(tmp_path: Path) -> None:
    wanted = [write(tmp_path / name, b"x") for name in ("a/z.jsonl", "b.txt", "b/c/d.txt.zst", "e.parquet.gz")]
    for name in ("b.md", ".hidden/x.txt", "a/._b.txt", "x.txt.bz2", "shards.json"):
        write(tmp_path / name, b"x")
    (tmp_path / "folder.txt").mkdir()
    assert find_files([tmp_path / "e.parquet.gz", tmp_path, tmp_path / "b.txt"]) == sorted(wanted, key=Path.as_posix)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"yok\.txt does not exist"):
        find_files([tmp_path / "yok.txt"])
    assert "yok.txt does not exist" in refusal(tmp_path / "yok.txt")


def test_a_folder_without_text_says_which_endings_were_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "notes.md", b"x")
    with pytest.raises(
        DataError, match=r"\.txt, \.jsonl, \.ndjson, \.parquet, \.csv, \.tsv, each plain or with \.gz or \.zst"
    ):
        find_files([tmp_path])


def test_a_file_of_another_ending_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.md", b"x")
    with pytest.raises(DataError, match="unknown ending"):
        find_files([path])
    assert "unknown ending" in refusal(path)


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.zst", ".jsonl", ".parquet"])
def test_a_file_without_a_document_is_refused(tmp_path: Path, ending: str) -> None:
    kind, packing = (ending[:4], ending[4:]) if ending.startswith(".txt") else (ending, "")
    data = parquet_bytes({"text": pyarrow.array([], pyarrow.string())}) if kind == ".parquet" else b" \n\n\t\n"
    assert "holds no document" in refusal(write(tmp_path / f"a{ending}", PACKINGS[packing](data)))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert "holds no document" in refusal(write(tmp_path / "a.txt", b""))


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_the_byte_that_is_not_utf8_is_named(tmp_path: Path, ending: str) -> None:
    lines = '{"text": "cok"}\n{"text": "şeker"}\n'.encode("cp1254")
    offset = lines.index(b"\xfe")
    message = refusal(write(tmp_path / f"a{ending}", lines))
    assert f"a{ending}:2 is not UTF-8: byte {offset} is 0xfe" in message
    assert "iconv -f WINDOWS-1254" in message


def test_the_byte_is_counted_from_the_start_even_behind_a_byte_order_mark(tmp_path: Path) -> None:
    assert "byte 4 is 0xff" in refusal(write(tmp_path / "a.txt", b"\xef\xbb\xbfa\xff"))


def test_surrogates_written_as_utf8_are_refused(tmp_path: Path) -> None:
    assert "byte 2 is 0xed" in refusal(write(tmp_path / "a.txt", b"ab\xed\xa0\x80"))


@pytest.mark.parametrize("data", [b"ab\n\x7fELF\0\0", "ab".encode("utf-16-le")], ids=["binary", "utf-16"])
def test_a_binary_file_is_refused_and_its_first_nul_named(tmp_path: Path, data: bytes) -> None:
    assert f"byte {data.index(0)} is NUL" in refusal(write(tmp_path / "a.txt", data))


@pytest.mark.parametrize(
    "line, words",
    [
        pytest.param(b'{"text": "a"', "a.jsonl:2 is not JSON", id="cut off"),
        pytest.param(b"['a']", "a.jsonl:2 is not JSON", id="python"),
        pytest.param(b"[" * 100_000, "a.jsonl:2 is not JSON", id="nested without end"),
        pytest.param(b'["a"]', "a.jsonl:2 is a list, not an object", id="a list"),
        pytest.param(b'{"body": "x", "id": 1}', "a.jsonl:2 has no field 'text'. Fields there: body", id="no field"),
        pytest.param(b"{}", "Fields there: none.", id="no field at all"),
        pytest.param(b'{"text": null}', "a.jsonl:2: the field 'text' is null", id="null"),
        pytest.param(b'{"text": "ab\\ud800"}', "a.jsonl:2 holds half a character: \\ud800 at 2", id="high surrogate"),
        pytest.param(b'{"text": "\\udc00\\ud800"}', "a.jsonl:2 holds half a character: \\udc00 at 0", id="swapped"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, words: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "iyi"}\n' + line + b'\n{"text": "iyi"}\n')
    assert words in refusal(path)
    assert next(documents(path)) == "iyi"


def test_a_missing_or_numeric_parquet_column_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", parquet_bytes({"body": ["x"], "n": [1]}))
    assert "has no field 'text'. Fields there: body, n." in refusal(path)
    assert "row 0: the field 'n' holds a number, not text" in refusal(path, "n")


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    good, bad = b"iyi", b"a\xff"
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0\5\0\0\0"), pyarrow.py_buffer(good + bad)]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)
    path = write(tmp_path / "a.parquet", parquet_bytes({"text": column}))
    assert "row 1: the text is not UTF-8 at its byte 1" in refusal(path)


@pytest.mark.parametrize("ending", [".parquet", ".parquet.gz", ".parquet.zst"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, ending: str) -> None:
    data = PACKINGS[ending.removeprefix(".parquet")](b"this is not it")
    assert "is not a Parquet file" in refusal(write(tmp_path / f"a{ending}", data))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_off_is_refused_not_shortened(tmp_path: Path, packing: str) -> None:
    whole = PACKINGS[packing](bytes(range(33, 127)) * 3 + b"\n\n" + b"kelime " * 100_000)
    assert "cannot be read to its end" in refusal(write(tmp_path / f"a.txt{packing}", whole[:-9]))
    assert "cannot be read to its end" in refusal(write(tmp_path / f"b.txt{packing}", b"not packed at all"))


@pytest.mark.parametrize("ending, package", [(".parquet", "pyarrow"), (".txt.zst", "zstandard")])
def test_a_missing_package_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(write(tmp_path / f"a{ending}", b"x"), error=MachineError)
    assert f"needs the package {package}. It is not installed." in message
    assert message.endswith(f"Type: pip install {package}")


def test_the_shared_text_is_read_to_its_last_byte(shared_data: Path) -> None:
    path = shared_data / "text" / "tr_mix_small.valid.txt.gz"
    raw = gzip.decompress(path.read_bytes()).decode("utf-8")
    assert "\n\n".join(documents(path)) == raw.rstrip("\n")


def test_reading_tells_how_far_it_is_in_the_file_as_it_lies_on_disk(tmp_path: Path) -> None:
    texts = [f"belge {number} " + "kelime " * 3000 for number in range(40)]
    for name, opened in (("a.txt", open), ("b.txt.gz", gzip.open)):
        with opened(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write("\n\n".join(texts))
        told: list[int] = []
        assert len(list(documents(tmp_path / name, tell=told.append))) == 40
        assert told == sorted(told)
        assert told[0] > 0
        assert told[-1] <= (tmp_path / name).stat().st_size
