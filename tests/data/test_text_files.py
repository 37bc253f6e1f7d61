"""What names, folders and patterns lead to which files, and how files are read whose names say too little."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lowvram.data.lines import _lines_with_cr
from lowvram.data.text import documents
from lowvram.data.text_files import find_text_files
from lowvram.data.text_stream import TextStream
from lowvram.errors import DataError
from tests.flows.typed import environment, typed


def write(path: Path, data: bytes = b"metin") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_what_a_folder_holds_besides_text_is_counted_and_named(tmp_path: Path) -> None:
    wanted = write(tmp_path / "a.txt")
    for number in range(20):
        write(tmp_path / f"{number}.pdf")
    for name in ("b.docx", "c.DOCX", "README", ".hidden.md", ".git/x.txt", ".git/y.md"):
        write(tmp_path / name)
    write(tmp_path / "elsewhere/deep.txt.gz")
    write(tmp_path / "mix/demo/text/5.txt")
    write(tmp_path / "mix/mix.json", b"{}")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    found = find_text_files([tmp_path])
    assert found.files == [wanted, tmp_path / "elsewhere/deep.txt.gz"]
    told = "\n".join(found.describe())
    assert "23 files in the folders passed over (20 .pdf, 2 .docx, 1 without ending)." in told
    assert f"1 broken link passed over: {tmp_path / 'gone.txt'}." in told
    assert f"1 linked folder not followed (it is read where it is named): {tmp_path / 'linked'}." in told
    assert f"1 mixed folder passed over (its text is packed already, or generated): {tmp_path / 'mix'}." in told
    with pytest.raises(DataError, match=r"mix is a mix\. .* Name the text that it was made of\."):
        find_text_files([tmp_path / "mix"])
    assert find_text_files([wanted]).describe() == []


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root no folder is closed, so the system's answer is given here.
    write(tmp_path / "a.txt")
    write(tmp_path / "closed/b.txt")
    real = os.scandir

    def scan(place: str) -> object:
        if Path(place).name == "closed":
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scan)
    found = find_text_files([tmp_path])
    assert found.files == [tmp_path / "a.txt"]
    assert found.unreadable == [tmp_path / "closed"]
    assert "1 folder passed over for want of permission" in found.describe()[0]


def test_a_file_of_many_names_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt")
    Path("b.txt").symlink_to("a.txt")
    Path("c.txt").hardlink_to("a.txt")
    write(tmp_path / "d.txt")  # of equal bytes, but another file
    found = find_text_files(
        [Path("./a.txt"), Path("a.txt"), tmp_path / "a.txt", Path("b.txt"), Path("."), Path("*.txt")]
    )
    assert [path.name for path in found.files] == ["a.txt", "d.txt"]
    assert {again.name for again, _ in found.repeats} == {"a.txt", "b.txt", "c.txt"}
    assert "of the same file read once" in found.describe()[-1]


def test_a_pattern_that_no_shell_expanded_is_expanded_here(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.jsonl", "deep/d.txt", "e[1].txt"):
        write(tmp_path / name)

    def names(pattern: str) -> list[str]:
        return [path.name for path in find_text_files([tmp_path / pattern]).files]

    assert names("*.txt") == ["a.txt", "b.txt", "e[1].txt"]
    assert names("**/[d]*.txt") == ["d.txt"]
    assert names("e[1].txt") == ["e[1].txt"], "a file of that very name goes first"
    with pytest.raises(DataError, match=r"No file matches .*\*\.md"):
        names("*.md")


def test_a_link_that_leads_nowhere_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a link that leads nowhere"):
        find_text_files([tmp_path / "a.txt"])


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstandard.ZstdCompressor().compress}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name, data", [("a.txt", b"bir\n\niki"), ("a.jsonl", b'{"text": "bir"}\n{"text": "iki"}')])
def test_compression_is_known_by_its_first_bytes(tmp_path: Path, name: str, data: bytes, packing: str) -> None:
    assert list(documents(write(tmp_path / name, PACKINGS[packing](data)))) == ["bir", "iki"]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"PAR1....", r"is a Parquet file\. .*ends in \.parquet"),
        (b"PK\x03\x04....", "is a ZIP archive"),
        (b"%PDF-1.7", "is a PDF"),
        ("\ufeffmetin".encode("utf-32-le"), "is text in UTF-32.*iconv -f UTF-32"),
        (b"BZh91AY", "is compressed by bzip2"),
        (b"\xfd7zXZ\0", "is compressed by xz"),
    ],
)
def test_another_format_under_a_name_of_text_is_called_by_its_own(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=rf"a\.txt {words}"):
        list(documents(write(tmp_path / "a.txt", data)))


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param("bir\n\ufeffiki\n", ["bir", "iki"], id="at a line's start it parts"),
        pytest.param("\ufeffbir\n\n\ufeffiki\n\n\ufeff", ["bir", "iki"], id="behind a blank line"),
        pytest.param("bir\n\ufeff\niki", ["bir", "iki"], id="before a blank line"),
        pytest.param("bir\ufeffiki", ["bir\ufeffiki"], id="inside a line it is a letter"),
        pytest.param("\ufeff\ufeffbir", ["bir"], id="twice"),
    ],
)
def test_a_byte_order_mark_in_a_file_of_text_parts_documents(tmp_path: Path, data: str, expected: list[str]) -> None:
    assert list(documents(write(tmp_path / "a.txt", data.encode()))) == expected


def test_a_byte_order_mark_before_a_line_of_json_is_passed_over(tmp_path: Path) -> None:
    part = b'\xef\xbb\xbf{"text": "bir"}\n'
    assert list(documents(write(tmp_path / "a.jsonl", part * 3))) == ["bir"] * 3


@pytest.mark.parametrize(
    "data, expected",
    [
        pytest.param(b"a\rb\r\rc\r", ["a\rb", "c"], id="CR alone"),
        pytest.param(b"a\rb\r \r\rc", ["a\rb", "c"], id="white space between"),
        pytest.param(b"a\rb\nc", ["a\rb\nc"], id="a lone CR among LF ends no line"),
        pytest.param(b"a\r\r\nb\r\r\nc", ["a\r\r\nb\r\r\nc"], id="CR CR LF is one line end"),
    ],
)
def test_cr_alone_ends_lines_where_nothing_else_does(tmp_path: Path, data: bytes, expected: list[str]) -> None:
    assert list(documents(write(tmp_path / "a.txt", data))) == expected


def test_a_long_file_of_cr_is_cut_at_no_block(tmp_path: Path) -> None:
    texts = [f"belge {number}\r{'ş' * (number % 50)}" for number in range(20_000)]
    assert list(documents(write(tmp_path / "a.txt", "\r\r".join(texts).encode()))) == [
        text.rstrip("\r") for text in texts
    ]


def test_lines_of_cr_are_the_same_however_the_file_comes_in_blocks() -> None:
    class Block(bytes):
        def __radd__(self, before: bytes) -> bytes:
            raise AssertionError("joined to all blocks before it, a line of many takes the square of their number")

    class Blocks:
        """Stands for a buffered reader, whose blocks end where the system pleases."""

        def __init__(self, blocks: list[bytes]) -> None:
            self._blocks = blocks

        def read1(self, _size: int) -> bytes:
            return Block(self._blocks.pop(0)) if self._blocks else b""

    data = b"\rbir\r\r\niki\n\r\n" + b"uzun" * 4 + b"\r\r"
    for size in range(1, len(data) + 1):
        blocks = [data[start : start + size] for start in range(0, len(data), size)]
        stream = TextStream(".txt", Blocks(blocks), lambda: 0, False)  # type: ignore[arg-type]
        assert list(_lines_with_cr(stream)) == data.splitlines(keepends=True), size


def test_a_string_that_is_not_closed_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Unterminated string"):
        list(documents(write(tmp_path / "a.jsonl", b'{"text": "a\n')))


def test_a_field_in_a_field_is_read_and_a_name_with_a_dot_goes_first(tmp_path: Path) -> None:
    rows = [
        {"meta": {"text": f"iç {number}", "n": {"x": "derin"}}, "a.b": "düz", "a": {"b": "iç"}} for number in range(3)
    ]
    lines = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in (lines, tmp_path / "a.parquet"):
        assert list(documents(file, "meta.text")) == ["iç 0", "iç 1", "iç 2"]
        assert list(documents(file, "meta.n.x")) == ["derin"] * 3
        assert list(documents(file, "a.b")) == ["düz"] * 3
        for missing in ("meta.no", "no.text", "meta.text.no"):
            with pytest.raises(DataError, match=f"has no field '{missing}'. Fields there: meta, a.b, a"):
                list(documents(file, missing))


def test_a_field_is_not_looked_for_in_lists_and_maps(tmp_path: Path) -> None:
    kinds = {
        "texts": (pyarrow.list_(pyarrow.string()), ["bir", "iki"]),
        "turns": (pyarrow.list_(pyarrow.struct({"content": pyarrow.string()})), [{"content": "bir"}]),
        "named": (pyarrow.map_(pyarrow.string(), pyarrow.string()), [("a", "bir")]),
        "large": (pyarrow.large_list(pyarrow.string()), ["bir"]),
        "in": (pyarrow.struct({"texts": pyarrow.list_(pyarrow.string())}), {"texts": ["bir"]}),
    }
    columns = [pyarrow.array([value], kind) for kind, value in kinds.values()]
    table = pyarrow.Table.from_arrays([*columns, columns[0]], names=[*kinds, "texts"])  # a name may be there twice
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    inside = ("texts.element", "texts.item", "turns.element", "turns.element.content", "turns.content", "named.key")
    for field in (*inside, "named.key_value", "named.entries", "large.element", "in.texts.element", "texts.list"):
        with pytest.raises(DataError, match=f"has no field '{field}'. Fields there: texts, turns, named, large, in"):
            list(documents(tmp_path / "a.parquet", field))
    for field in ("turns", "named", "in.texts"):
        with pytest.raises(DataError, match=f"row 0: the field '{field}' holds a list, not text"):
            list(documents(tmp_path / "a.parquet", field))


def test_a_value_that_python_has_not_is_no_text(tmp_path: Path) -> None:
    times = pyarrow.array([2**62 + 1], pyarrow.timestamp("ns"))
    pyarrow.parquet.write_table(pyarrow.table({"text": times}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 0: the field 'text' holds a value of type Timestamp, not text"):
        list(documents(tmp_path / "a.parquet"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize(
    "name, data",
    [
        ("pipe", b"bir\n\niki"),
        ("pipe", b'{"text": "bir"}\n{"text": "iki"}'),
        ("pipe", b' {\t"text": "bir"}\n{"text": "iki"}'),
        ("pipe", gzip.compress(b"bir\n\niki")),
        ("pipe.ndjson", b'{"text": "bir"}\n{"text": "iki"}'),
    ],
    ids=["text", "json lines", "json lines with white space", "gzip", "ndjson"],
)
def test_a_pipe_is_read(tmp_path: Path, name: str, data: bytes) -> None:
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=write, args=(tmp_path / name, data))
    writer.start()
    told: list[int] = []
    files = find_text_files([tmp_path / name]).files
    assert [text for file in files for text in documents(file, tell=told.append)] == ["bir", "iki"]
    writer.join()
    assert told == [0, 0], "of unknown length, and never an illegal seek"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize(
    "data, read",
    [
        (b'{\n  "text": "bir"\n}\n', "is not JSON"),
        (b'[{"text": "bir"}]\n', "is a list"),
        (b"[\n  {", "is not JSON"),
        ("[Müzik]".encode(), ["[Müzik]"]),
        (b"{ad} bey", ["{ad} bey"]),
    ],
)
def test_a_pipe_is_json_only_where_it_begins_as_json_does(tmp_path: Path, data: bytes, read: str | list[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=write, args=(tmp_path / "pipe", data))
    writer.start()
    if isinstance(read, list):
        assert list(documents(tmp_path / "pipe")) == read
    else:
        with pytest.raises(DataError, match=read):
            list(documents(tmp_path / "pipe"))
    writer.join()


def test_standard_input_is_packed(tmp_path: Path) -> None:
    text = "\n\n".join(f"belge {number} şöyle" for number in range(40)).encode()
    script = "import sys; from lowvram.cli.app import main; sys.exit(main(sys.argv[1:]))"

    def run(*words: object) -> str:
        command = [sys.executable, "-c", script, *map(str, words)]
        return subprocess.run(command, input=text, check=True, capture_output=True, env=environment()).stdout.decode()

    assert "Next: lowvram data pack - --holdout" in run(
        "tokenizer", "train", "-", "--vocab", 300, "--out", tmp_path / "tok"
    )
    words = ("--tokenizer", tmp_path / "tok", "--out", tmp_path / "shards")
    assert "of 40 documents" in run("data", "pack", "-", *words)
    write(tmp_path / "same.txt", text)
    again = typed("data", "pack", tmp_path / "same.txt", *words, "--processes", 1)
    assert again.code == 0, "the same text, so nothing is replaced"
