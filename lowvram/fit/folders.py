"""Which folders `--data` means: shards to learn from, shards that are held out, the tokenizer; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lowvram.errors import ConfigError


class Folders(NamedTuple):
    """What lies in a folder of data and beside it.

    home: where train, valid and tok are looked for.  train: may hold no shards yet.  valid, tokenizer: None where there
    is none.  is_packed: whether `train` holds shards.
    """

    home: Path
    train: Path
    valid: Path | None
    tokenizer: Path | None
    is_packed: bool

    def as_words(self) -> dict[str, str]:
        """Return those that exist as a run file names them, as full paths."""
        named = {"train": self.train, "valid": self.valid, "tokenizer": self.tokenizer}
        return {key: str(folder.resolve()) for key, folder in named.items() if folder is not None}


def find_folders(data: Path) -> Folders:
    """Return what is meant by shards, or by a folder that holds the shards `train` and perhaps `valid`.

    The tokenizer is a folder `tok` in it or beside it.  Raises ConfigError where it holds shards itself and in `train`.
    """
    from lowvram.data.shard_set import INDEX  # numpy, which an answer without a text does not need

    is_itself, has_train = (data / INDEX).is_file(), (data / "train" / INDEX).is_file()
    if is_itself and has_train:
        why = "Which of them is meant cannot be told."
        fix = f"Name {data / 'train'}, or move one of them to a folder of its own."
        raise ConfigError(f"--data {data} holds shards itself, and others in its folder train.", why, fix)
    home = data.resolve().parent if is_itself and data.resolve().name == "train" else data
    train = data if is_itself else data / "train"
    valid = home / "valid"
    beside = (home / "tok", home.resolve().parent / "tok")
    tokenizer = next((place for place in beside if place.is_dir()), None)
    return Folders(home, train, valid if (valid / INDEX).is_file() else None, tokenizer, is_itself or has_train)
