"""A folder's tokenizer is overwritten by the same one, or on request; whatever was packed with it is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowvram.data.shards import pack
from lowvram.data.tokenizer import Tokenizer, train_tokenizer
from lowvram.data.tokenizer_folder import find_shards_of
from lowvram.errors import TokenizerError
from tests.flows.typed import typed


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def home(tmp_path: Path, turkish: tuple[str, ...]) -> Path:
    """A tokenizer with two folders of shards, and shards of another one."""
    (tmp_path / "text.txt").write_text("\n\n".join(turkish), encoding="utf-8")
    (tmp_path / "other.txt").write_text("\n\n".join(text[::-1] for text in turkish), encoding="utf-8")
    tokenizer = train_tokenizer(iter(turkish), 400, tmp_path / "tok")
    for out in ("shards", "packed/train"):
        pack([tmp_path / "text.txt"], tokenizer, tmp_path / out, processes=1)
    another = train_tokenizer(iter(turkish), 350, tmp_path / "tok2")
    pack([tmp_path / "text.txt"], another, tmp_path / "shards2", processes=1)
    return tmp_path


def test_another_text_replaces_a_tokenizer_only_on_request(home: Path, turkish: tuple[str, ...]) -> None:
    before, reversed_texts = contents(home / "tok"), [text[::-1] for text in turkish]
    with pytest.raises(TokenizerError, match="holds another tokenizer") as caught:
        train_tokenizer(iter(reversed_texts), 400, home / "tok")
    assert f"{home / 'packed/train'}, {home / 'shards'} can be read with it alone" in caught.value.why
    assert "`replace=True`" in caught.value.fix
    assert contents(home / "tok") == before
    assert train_tokenizer(iter(turkish), 400, home / "tok") == Tokenizer.load(home / "tok"), "the same is no harm"
    assert contents(home / "tok") == before
    replaced = train_tokenizer(iter(reversed_texts), 400, home / "tok", replace=True)
    assert replaced == Tokenizer.load(home / "tok") == train_tokenizer(iter(reversed_texts), 400, home / "new")
    assert find_shards_of(home / "tok") == []
    assert find_shards_of(home / "tok2") == [home / "shards2"]


def test_fewer_ids_than_there_are_is_refused_before_a_text_is_read(home: Path, turkish: tuple[str, ...]) -> None:
    unread = iter(turkish)
    with pytest.raises(TokenizerError, match="It has 400 ids, and 399 were asked for"):
        train_tokenizer(unread, 399, home / "tok")
    assert list(unread) == list(turkish)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "edit",
    [lambda data: data[: len(data) // 2], lambda data: data + b"\n", lambda data: b"[1]"],
    ids=["half", "longer", "a list"],
)
def test_a_file_that_was_changed_by_hand_is_not_lost(
    name: str, edit: Callable[[bytes], bytes], home: Path, turkish: tuple[str, ...]
) -> None:
    (home / "tok" / name).write_bytes(edit((home / "tok" / name).read_bytes()))
    before = contents(home / "tok")
    with pytest.raises(TokenizerError, match=f"Its {name} would be overwritten"):
        train_tokenizer(iter(turkish), 400, home / "tok")
    assert contents(home / "tok") == before
    train_tokenizer(iter(turkish), 400, home / "tok", replace=True)
    assert Tokenizer.load(home / "tok").size == 400


def test_the_command_says_at_once_what_is_there_and_takes_replace(home: Path) -> None:
    words = ("tokenizer", "train", home / "other.txt", "--vocab", 400, "--out", home / "tok")
    refused = typed(*words)
    assert (refused.code, refused.out) == (1, "")
    first, second = refused.err.splitlines()
    assert first == f"{home / 'tok'} holds a tokenizer; another one is written there only with --replace."
    assert second.startswith(f"Error: {home / 'tok'} holds another tokenizer. ")
    replaced = typed(*words, "--replace")
    assert replaced.code == 0
    assert "holds a tokenizer" not in replaced.err
    again = typed(*words)
    assert (again.code, again.out) == (0, replaced.out)


def test_a_long_list_of_shards_is_cut(home: Path, turkish: tuple[str, ...]) -> None:
    for number in range(5):
        (home / f"more{number}").mkdir()
        (home / f"more{number}/shards.json").write_bytes((home / "shards/shards.json").read_bytes())
    with pytest.raises(TokenizerError, match=r"more0, .*more4 and others can be read"):
        train_tokenizer(iter(turkish), 300, home / "tok")
