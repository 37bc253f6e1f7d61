"""Finds the folders that `--data` names: training shards, held-out shards, the tokenizer; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lowvram.config.mix import MIX, is_mix, read_mix
from lowvram.errors import ConfigError, argument


class Folders(NamedTuple):
    """The folders in and beside a folder of data.

    home: the folder in which train, valid and tok are looked for.  train: may hold no shards yet.  valid, tokenizer:
    None where there is none.  is_packed: whether `train` holds shards.  Of a mix train and valid are the mix's folder.
    """

    home: Path
    train: Path
    valid: Path | None
    tokenizer: Path | None
    is_packed: bool

    def as_words(self) -> dict[str, str]:
        """Return those that exist as full paths, by their keys in a run file."""
        named = {"train": self.train, "valid": self.valid, "tokenizer": self.tokenizer}
        return {key: str(folder.resolve()) for key, folder in named.items() if folder is not None}


def find_folders(data: Path) -> Folders:
    """Return the folders for `data`, which holds shards itself, or the shards `train` and perhaps `valid`, or is a mix.

    The tokenizer is a folder `tok` in `data` or beside it.  Raises ConfigError if `data` is more than one of these.
    """
    from lowvram.data.shard_set import INDEX  # imports numpy, which `fit` does not need without a text

    is_itself, has_train = (data / INDEX).is_file(), (data / "train" / INDEX).is_file()
    if is_mix(data):
        if is_itself or has_train:
            what = f"{argument('data', data)} is a mix, and {data if is_itself else data / 'train'} holds other shards."
            fix = f"Move the shards to a folder of their own, or delete {data / MIX}."
            raise ConfigError(what, "Which of them is meant cannot be told.", fix)
        valid = data if read_mix(data).valid(data) else None
        return Folders(data, data, valid, _find_tokenizer(data), True)
    if is_itself and has_train:
        why = "Which of them is meant cannot be told."
        fix = f"Name {data / 'train'}, or move one of them to a folder of its own."
        raise ConfigError(f"{argument('data', data)} holds shards itself, and others in its folder train.", why, fix)
    home = data.resolve().parent if is_itself and data.resolve().name == "train" else data
    train = data if is_itself else data / "train"
    valid = home / "valid"
    has_valid = (valid / INDEX).is_file()
    return Folders(home, train, valid if has_valid else None, _find_tokenizer(home), is_itself or has_train)


def _find_tokenizer(home: Path) -> Path | None:
    candidates = (home / "tok", home.resolve().parent / "tok")
    return next((folder for folder in candidates if folder.is_dir()), None)
