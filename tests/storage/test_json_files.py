"""JSON that is read back is one object within limits, or one kind of error that says why."""

from pathlib import Path

import pytest

from lowvram.storage.json_files import MOST_LEVELS, JsonError, parse_object, read_object


@pytest.mark.parametrize(
    "data, why",
    [
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1', "not JSON"),
        (b'{"a": 1} {}', "not JSON: Extra data"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": NaN}', "NaN is no number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds null"),
        (b"true", "holds true or false"),
        (b"3", "holds a number"),
        (b'"{}"', "holds a string"),
    ],
    ids=str,
)
def test_what_is_no_object_is_an_error_that_says_why(data: bytes, why: str) -> None:
    with pytest.raises(JsonError, match=why):
        parse_object(data)


@pytest.mark.parametrize("data", [b'\xef\xbb\xbf{"a": 1}', '\ufeff{"a": 1}'], ids=["bytes", "text"])
def test_the_byte_order_mark_of_an_editor_is_passed_over(data: bytes | str) -> None:
    assert parse_object(data) == {"a": 1}


def nested(levels: int) -> str:
    """An object inside an object …, so many of them."""
    return '{"a":' * (levels - 1) + "{}" + "}" * (levels - 1)


@pytest.mark.parametrize("levels", [MOST_LEVELS + 1, 100 * MOST_LEVELS, 1_000_000])
def test_deep_nesting_is_refused_and_never_a_crash(levels: int) -> None:
    parse_object(nested(MOST_LEVELS))
    with pytest.raises(JsonError, match=f"nested deeper than {MOST_LEVELS} levels"):
        parse_object(nested(levels))
    with pytest.raises(JsonError):
        parse_object('{"a":' + "[" * levels)


def test_a_file_is_read_up_to_its_limit_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "' + b"x" * 91 + b'"}')
    assert read_object(path, 100) == {"a": "x" * 91}
    for size in (101, 10_000):
        path.write_bytes(b'{"a": "' + b"x" * (size - 9) + b'"}')
        with pytest.raises(JsonError, match="larger than 100 B"):
            read_object(path, 100)
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none.json")
