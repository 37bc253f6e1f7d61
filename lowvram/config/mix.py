"""A mix: packed sources of text and their shares, as `lowvram data mix` notes them in mix.json; opens no shards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationError

from lowvram.config.base import FrozenConfig
from lowvram.errors import ConfigError

MIX = "mix.json"
# The windows of this many samples are computed together; each corpus has a whole number of samples in a block.
BLOCK = 4096


class MixedSource(FrozenConfig):
    """One source of a mix; the folders of its shards are NAME/train and NAME/valid."""

    name: Annotated[str, Field(min_length=1)]
    """Its path below the folder of the mix, with forward slashes."""
    share: Annotated[float, Field(gt=0.0, le=1.0)]
    """Its share of the tokens that a run reads."""
    tokens: int
    """Of its training shards; `documents` and `text_bytes` too."""
    documents: int
    text_bytes: int
    held_out_tokens: int = 0
    """Of its held-out shards, 0 where there are none."""
    left_out_bytes: int = 0
    """Text that a cap left out."""


class Mix(FrozenConfig):
    """A whole mix.  sources: in order of their names, each once."""

    format: Literal[1] = 1
    temperature: float = 1.0
    sources: Annotated[tuple[MixedSource, ...], Field(min_length=1)]

    @property
    def tokens(self) -> int:
        """The training tokens of all sources."""
        return sum(source.tokens for source in self.sources)

    def train(self, folder: Path) -> list[tuple[Path, float]]:
        """Return the training shards and the share of each source of the mix in `folder`."""
        return [(folder / source.name / "train", source.share) for source in self.sources]

    def valid(self, folder: Path) -> list[tuple[str, Path]]:
        """Return the names and held-out shards of the sources that have such shards."""
        return [(each.name, folder / each.name / "valid") for each in self.sources if each.held_out_tokens]


def is_mix(folder: Path) -> bool:
    """Return whether a folder is a mix that was finished."""
    return (folder / MIX).is_file()


def read_mix(folder: Path) -> Mix:
    """Return the mix in a folder; raises ConfigError where its file is damaged."""
    try:
        return Mix.model_validate_json((folder / MIX).read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        why = f"{where}: {problem['msg']}." if where else f"{problem['msg']}."
        fix = "Type the command `lowvram data mix` again that wrote it."
        raise ConfigError(f"{folder / MIX} cannot be read.", why, fix) from error


def name_folders(paths: Sequence[Path]) -> list[str]:
    """Return short names of folders of shards: of several that are each called train or valid, the way to them."""
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    homes = [path.parent if path.name in ("train", "valid") else path for path in paths]
    above = find_common([home.parent for home in homes])
    return [(home.relative_to(above) if above is not None else home).as_posix() for home in homes]


def find_common(paths: Sequence[Path]) -> Path | None:
    """Return the folder that all paths lie in, which may be one of them; None where there is none, as on two drives."""
    try:
        return Path(os.path.commonpath(paths))
    except ValueError:
        return None


def expand_mixes(data: dict[str, Any]) -> None:
    """Put the corpora of a mix in the place of its folder, in the table `data` of a run file, whose paths are full.

    A mix among other corpora is divided by its sources' shares, and in `valid` a mix may be one of several folders too.
    Without `valid`, what the mixes hold out is named.
    """
    train, held_out = data.get("train"), list[dict[str, str]]()
    if isinstance(train, list) or _find_mix({"path": train}) is not None:
        data["train"] = [
            corpus for entry in (train if isinstance(train, list) else [train]) for corpus in _expand(entry, held_out)
        ]
    valid = data.get("valid")
    if isinstance(valid, list):
        data["valid"] = [source for entry in valid for source in _expand_valid(entry)]
    elif _find_mix({"path": valid}) is not None:
        data["valid"] = _expand_valid(valid)
    elif valid is None and held_out:
        data["valid"] = held_out


def _expand(entry: Any, held_out: list[dict[str, str]]) -> list[Any]:
    """Return the corpora that an entry of `data.train` stands for, and add to `held_out` what they hold out."""
    table = {"path": entry} if isinstance(entry, str) else entry
    folder = _find_mix(table)
    if folder is None:
        return [entry]
    mix, weight = read_mix(folder), cast(Any, table.get("weight", 1.0))
    held_out += _name(mix, folder)
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return [
        {**table, "path": str(path), "weight": weight * share if is_number else weight}
        for path, share in mix.train(folder)
    ]


def _expand_valid(entry: Any) -> list[Any]:
    """Return the sources that an entry of `data.valid` stands for; of a mix that has a name, they begin with it."""
    table = {"path": entry} if isinstance(entry, str) else entry
    folder = _find_mix(table)
    if folder is None:
        return [entry]
    above = table.get("source")
    named = _name(read_mix(folder), folder)
    return [each | {"source": f"{above}/{each['source']}"} for each in named] if isinstance(above, str) else named


def _find_mix(table: Any) -> Path | None:
    path = table.get("path") if isinstance(table, dict) else None
    return Path(path) if isinstance(path, str) and is_mix(Path(path)) else None


def _name(mix: Mix, folder: Path) -> list[dict[str, str]]:
    return [{"source": name, "path": str(path)} for name, path in mix.valid(folder)]
