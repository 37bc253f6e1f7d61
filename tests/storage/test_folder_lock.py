"""A folder is one process' at a time, and one that holds nothing but its lock goes again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.errors import BusyError, DataError
from lowvram.storage.folder_lock import locked_folder

ERRORS = (DataError("no folder"), BusyError("busy"))


def test_a_folder_that_stays_empty_goes_with_those_made_for_it_and_others_stay(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "a/b/c", ".lock", *ERRORS):
        assert (tmp_path / "a/b/c/.lock").is_file()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with locked_folder(tmp_path / "mine", ".lock", *ERRORS):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"], "it was there before"
    with locked_folder(tmp_path / "new", ".lock", *ERRORS):
        (tmp_path / "new/text").touch()
    assert (tmp_path / "new/.lock").is_file()


def test_a_second_holder_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="no folder"), locked_folder(tmp_path / "file/in", "lock", *ERRORS):
        pass
    with locked_folder(tmp_path / "a", "lock", *ERRORS):
        with pytest.raises(BusyError, match="busy"), locked_folder(tmp_path / "a", "lock", *ERRORS):
            pass
        assert (tmp_path / "a/lock").is_file()
