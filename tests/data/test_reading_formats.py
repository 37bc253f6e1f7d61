"""Tables, lists in rows, other encodings, lines without end, PDF, DOCX and data sets, as `documents` reads them."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lowvram.data import lines
from lowvram.data.bad_rows import BadRow, BadRows
from lowvram.data.encoding import is_windows_1254
from lowvram.data.text import documents
from lowvram.data.text_files import find_text_files
from lowvram.errors import DataError, MachineError
from tests.flows.typed import typed

TURKISH = "Şu ağacın gölgesinde, ılık bir öğleden sonra; “çiçekler” İzmir'de açtı.\n"


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


def read(path: Path, field: str = "text") -> tuple[list[str], list[BadRow], BadRows]:
    """The documents of a file, its bad rows, and their account."""
    found: list[BadRow] = []
    account = BadRows("report", found.append)
    return list(documents(path, field, bad_rows=account)), found, account


@pytest.mark.parametrize(
    "name, data, texts",
    [
        ("a.csv", 'id;text\n1;"bir; ""iki""\nüç"\n2;dört\n', ['bir; "iki"\nüç', "dört"]),
        ("a.csv", "\ufefftext,id\r\nbir,1\r\n\r\niki,2\r\n", ["bir", "iki"]),
        ("a.csv", "text|id\nbir, iki|1\n", ["bir, iki"]),
        ("a.csv", "text\nbir\niki", ["bir", "iki"]),
        ("a.tsv", 'text\tid\n"bir\t1\niki"\t2\n', ['"bir', 'iki"']),
    ],
    ids=["semicolons and quotation marks", "byte order mark and CRLF", "bars", "one column", "a .tsv has no quotes"],
)
def test_a_table_is_read_as_its_header_says(tmp_path: Path, name: str, data: str, texts: list[str]) -> None:
    assert read(write(tmp_path / name, data))[:2] == (texts, [])


def test_bad_rows_of_a_table_are_named_by_their_line_and_rows_behind_them_keep_their_places(tmp_path: Path) -> None:
    data = b'id,text\n1,bir\n2,b\xfcr,x\n3\n4,a\0b\n5,"iki\n\xff"\n6,iyi\n'
    texts, bad, account = read(write(tmp_path / "a.csv", data))
    assert texts == ["bir", "iyi"]
    assert [(row.what.split(" ")[0].split("/")[-1], row.kind) for row in bad] == [
        ("a.csv:3", "not UTF-8"),
        ("a.csv:4", "with other columns"),
        ("a.csv:5", "with NUL"),
        ("a.csv:7", "not UTF-8"),
    ]
    assert account.rows == 6
    with pytest.raises(DataError, match=r"a\.csv:1 has no field 'body'. Fields there: id, text"):
        list(documents(tmp_path / "a.csv", "body"))


@pytest.mark.parametrize("most", [1_000, 64 << 20], ids=["up to the limit", "up to the end"])
@pytest.mark.parametrize("quote", ["", '"'], ids=["plain rows", "rows in marks"])
def test_a_quotation_mark_that_is_never_closed_costs_its_line_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, quote: str
) -> None:
    monkeypatch.setattr("lowvram.data.table_rows.MOST_LINE_BYTES", most)
    rows = "".join(f"{number},{quote}satır{quote}\n" for number in range(1_000))
    texts, bad, _ = read(write(tmp_path / "a.csv", f'id,text\n1,bir\n2,"iki\n{rows}'))
    assert texts == ["bir", *["satır"] * 1_000]
    [row] = bad
    reason = "has a quotation mark in the wrong place" if quote else "longer than" if most < 10_000 else "is not closed"
    assert "a.csv:3 " in row.what
    assert reason in row.what


def test_a_carriage_return_inside_a_line_costs_its_row_alone_and_is_named_as_such(tmp_path: Path) -> None:
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        data = "id,text\n1,bir\n2,i\rki\n3,üç\n".replace(",", mark)
        texts, bad, _ = read(write(tmp_path / name, data))
        assert texts == ["bir", "üç"]
        assert [f"{name}:3 has a carriage return" in row.what and "longer" not in row.what for row in bad] == [True]
        with pytest.raises(DataError, match=rf"{name}:1 has a carriage return \(CR\) inside"):
            list(documents(write(tmp_path / name, "i\rd,text\n1,bir\n".replace(",", mark))))
    assert read(write(tmp_path / "b.csv", 'id,text\n1,"i\rki"\n'))[0] == ["i\rki"]


def test_the_texts_of_a_list_are_joined_in_every_format(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [{"role": "user", "content": "Merhaba"}, {"role": "assistant", "content": "Selam"}],
            "t": ["a", "b"],
        },
        {"messages": [], "t": ["c"]},
    ]
    write(tmp_path / "a.json", "\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "a.parquet"):
        assert read(tmp_path / name, "messages[].content")[:2] == (["Merhaba\nSelam"], [])
        assert read(tmp_path / name, "t[]")[0] == ["a\nb", "c"]
        for missing in ("messages[].text", "t[].x", "messages.content", "none[].x"):
            with pytest.raises(DataError, match="has no field"):
                list(documents(tmp_path / name, missing))
    broken = '{"t": ["a", 1]}\n{"t": "a"}\n'
    assert [row.kind for row in read(write(tmp_path / "b.jsonl", broken), "t[]")[1]] == [
        "not text",
        "without the field",
    ]


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"], ids=["little endian", "big endian"])
@pytest.mark.parametrize("packing", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_utf16_is_converted_and_told(tmp_path: Path, mark: bytes, packing: type) -> None:
    encoding = "utf-16-le" if mark == b"\xff\xfe" else "utf-16-be"
    data = mark + ("😀".join([TURKISH] * 5_000) + "\n\nson").encode(encoding)
    texts, bad, account = read(write(tmp_path / "a.txt", packing(data)))
    assert (texts[1:], bad) == (["son"], [])
    assert texts[0] == "😀".join([TURKISH] * 5_000).rstrip("\n")
    assert account.describe_encodings() == [f"Read as UTF-16: {tmp_path / 'a.txt'}."]
    with pytest.raises(DataError, match=r"a\.txt cannot be read to its end.*damaged UTF-16"):
        list(documents(write(tmp_path / "a.txt", data[:-1])))


def test_windows_1254_is_converted_where_it_is_certain_and_only_there(tmp_path: Path) -> None:
    spoilt = ("Line one\n\n" + TURKISH * 9 + "\n" + "UTF-8 değil\n").encode("cp1254")
    texts, bad, account = read(write(tmp_path / "a.txt", spoilt + "\nşu satır UTF-8\n".encode()))
    assert (bad, texts[0]) == ([], "Line one")
    assert texts[1:] == [(TURKISH * 9).rstrip(), "UTF-8 değil", "şu satır UTF-8"]
    assert account.describe_encodings() == [f"Read as Windows-1254: {tmp_path / 'a.txt'}."]
    german = "Die größten Mädchen hören früh, daß schöne Äpfel süß sind; fünf Füße, über Öfen."
    for text, encoding in (
        (german, "cp1252"),
        (TURKISH * 3, "cp857"),
        (TURKISH * 3, "mac_turkish"),
        ("ığüş", "cp1254"),
    ):
        kinds = [row.kind for row in read(write(tmp_path / "b.txt", text.encode(encoding, "ignore")))[1]]
        assert set(kinds) == {"not UTF-8"}, (text, encoding)
    damaged = (TURKISH * 9).encode() + b"\xfd\xfe\xf0\n"
    assert [row.kind for row in read(write(tmp_path / "c.txt", damaged))[1]] == ["not UTF-8"]
    assert not is_windows_1254(bytes(range(128, 256)) * 5)


def test_the_commands_say_which_files_they_converted(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", (TURKISH * 30).encode("cp1254"))
    answer = typed("tokenizer", "train", tmp_path / "a.txt", "--vocab", 300, "--out", tmp_path / "tok")
    assert answer.code == 0
    assert f"Read as Windows-1254: {tmp_path / 'a.txt'}." in answer.err
    report = typed("data", "pack", tmp_path / "a.txt", "--on-bad-row", "report")
    assert (report.code, "Read as Windows-1254" in report.err) == (0, True)


@pytest.mark.parametrize("end", [b"\n", b"\r"], ids=["LF", "CR"])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz"])
def test_a_line_without_end_is_one_bad_row_and_stays_out_of_memory(tmp_path: Path, name: str, end: bytes,
    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(lines, "MOST_LINE_BYTES", 1 << 20)
    row = {"a.txt.gz": b"%d" + 2 * end, "a.jsonl.gz": b'{"text": "%d"}' + end, "a.csv.gz": b"%d" + end}[name]
    head = b"text" + end if name == "a.csv.gz" else b""
    with gzip.open(tmp_path / name, "wb", 1) as file:
        file.write(head + row % 1)
        for _ in range(60):
            file.write(b"uzun" * (1 << 18))
        file.write(2 * end + row % 2)
    tracemalloc.start()
    texts, bad, _ = read(tmp_path / name)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["1", "2"]
    assert [(row.kind, row.characters >> 20) for row in bad] == [("longer than lines may be", 60)]
    assert peak_bytes < 12 << 20


def test_a_text_without_blank_lines_is_cut_at_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowvram.data.text.MOST_LINE_BYTES", 100)
    texts = read(write(tmp_path / "a.txt", "".join(f"satır {number}\n" for number in range(60))))[0]
    assert len(texts) == 5
    assert "\n".join(texts).split("\n") == [f"satır {number}" for number in range(60)]


def test_kinds_that_are_seldom_text_are_read_where_they_are_named_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "bir")
    write(tmp_path / "config.json", '{"text": "iki"}')
    found = find_text_files([tmp_path])
    assert found.files == [tmp_path / "a.txt"]
    assert "(1 .json)" in found.describe()[0]
    assert ".json, .pdf, .docx" in found.describe()[0]
    assert find_text_files([tmp_path / "*.json"]).files == [tmp_path / "config.json"]


def pdf_bytes(text: str) -> bytes:
    """A PDF of one page, written by hand."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode("latin-1")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /MediaBox [0 0 612 792] "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n%strailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (
        table,
        start,
    )


def test_the_text_of_a_pdf_is_one_document(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    assert read(write(tmp_path / "a.pdf", pdf_bytes("Merhaba dunya")))[0] == ["Merhaba dunya"]
    assert read(write(tmp_path / "a.pdf.gz", gzip.compress(pdf_bytes("Merhaba dunya"))))[0] == ["Merhaba dunya"]
    for data, message in ((b"%PDF-1.7", "is a damaged PDF"), (b"text", "is a damaged PDF"), (pdf_bytes(""), "no text")):
        with pytest.raises(DataError, match=message):
            list(documents(write(tmp_path / "b.pdf", data)))


def test_an_encrypted_pdf_names_the_package_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pypdf = pytest.importorskip("pypdf")

    def decrypt(*_: object) -> str:
        raise pypdf.errors.DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf.PageObject, "extract_text", decrypt)
    with pytest.raises(MachineError, match=r"a\.pdf needs the package cryptography"):
        list(documents(write(tmp_path / "a.pdf", pdf_bytes("Merhaba"))))


def test_the_paragraphs_and_tables_of_a_docx_are_one_document(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_paragraph("Şöyle başlar.")
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "bir", "iki"
    document.add_paragraph("Öyle biter.")
    buffer = io.BytesIO()
    document.save(buffer)
    path = write(tmp_path / "a.docx", buffer.getvalue())
    assert read(path)[0] == ["Şöyle başlar.\nbir\tiki\nÖyle biter."]
    empty = io.BytesIO()
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("a", "b")
    junk = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as whole, zipfile.ZipFile(junk, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, b"<junk/>" if name == "word/document.xml" else whole.read(name))
    for data in (b"PK\x03\x04 torn", empty.getvalue(), junk.getvalue(), b"text"):
        with pytest.raises(DataError, match="is a damaged DOCX"):
            list(documents(write(tmp_path / "b.docx", data)))


def test_a_data_set_of_a_local_folder_is_read_row_by_row(tmp_path: Path) -> None:
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(MachineError, match="needs the package datasets"):
            list(documents(Path(f"hf:{tmp_path}")))
        pytest.skip("needs the package datasets, which is not installed")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set/train.jsonl", "".join(json.dumps({"m": {"text": f"belge {n}"}}) + "\n" for n in range(3)))
    [file] = find_text_files([Path(f"hf:{tmp_path / 'set'}")]).files
    assert list(documents(file, "m.text")) == ["belge 0", "belge 1", "belge 2"]
    with pytest.raises(DataError, match=r"row 0 has no field 'text'"):
        list(documents(file))
    with pytest.raises(DataError, match="cannot be read"):
        list(documents(Path(f"hf:{tmp_path / 'none'}")))
