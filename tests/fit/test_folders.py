"""Which folders --data means is told in one place, and a mixture of two meanings is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.errors import ConfigError
from lowvram.fit.epochs import open_folder
from lowvram.fit.folders import find_folders
from tests.fit.test_epochs import pack


def test_shards_in_a_folder_and_in_its_train_are_refused_until_one_is_named(tmp_path: Path) -> None:
    data = pack(tmp_path / "data", 500)
    pack(data / "train", 300)
    pack(data / "valid", 50)
    for look in (find_folders, open_folder):
        with pytest.raises(
            ConfigError, match=r"data\"` holds shards itself, and others in its folder train\. .* Name \S+n"
        ):
            look(data)
    found = find_folders(data / "train")
    assert (found.train, found.valid, found.is_packed) == (data / "train", data / "valid", True)
    assert open_folder(data / "train").tokens == 300
    assert open_folder(data / "train").is_held_out


@pytest.mark.parametrize("place", ["data/tok", "tok", None])
def test_the_tokenizer_lies_in_the_folder_or_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str | None
) -> None:
    pack(tmp_path / "data/train", 300)
    if place is not None:
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "data")
    for data in (tmp_path / "data", tmp_path / "data/train", Path(), Path("train"), Path("../data")):
        found = find_folders(data)
        assert found.tokenizer is None if place is None else found.tokenizer.samefile(tmp_path / place)
        assert found.train.samefile(tmp_path / "data/train")
        words = {"train": str(tmp_path / "data/train")} | ({"tokenizer": str(tmp_path / place)} if place else {})
        assert found.as_words() == words


def test_a_folder_valid_without_shards_is_none(tmp_path: Path) -> None:
    (tmp_path / "valid").mkdir()
    found = find_folders(tmp_path)
    assert (found.valid, found.is_packed, found.train) == (None, False, tmp_path / "train")
