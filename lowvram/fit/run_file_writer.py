"""Writes the run file that `fit --out` proposes (a preset and what differs from it), and tables for a further stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowvram.config.base import flatten
from lowvram.config.mix import expand_mixes
from lowvram.config.model import ModelConfig
from lowvram.config.run_file import PLACEHOLDER, TAGS, Table, load_preset, map_paths, relate
from lowvram.config.train import TrainConfig
from lowvram.errors import ConfigError
from lowvram.storage.disk import DISK


def write_run(
    path: Path, preset: str, model: ModelConfig, train: TrainConfig, folders: Mapping[str, str] | None
) -> None:
    """Write the run file of a preset, with every value of the model and of the training that differs from it.

    folders: the full paths of `train`, `tokenizer` and, if there is one, `valid`; None leaves gaps, which `load_run`
    names.  Raises ConfigError where `path` exists.
    """
    import tomlkit  # only here: importing it takes a tenth of the time that `lowvram --help` may take

    refuse_overwriting(path)
    has_gaps = folders is None
    paths: Table = dict.fromkeys(("train", "valid", "tokenizer"), PLACEHOLDER) if folders is None else dict(folders)
    home = path.resolve().parent
    before = load_preset(preset)
    # The vocabulary follows the tokenizer.
    changes = _table_over(before[0].model_dump(mode="json"), model.model_dump(mode="json", exclude={"vocabulary"}))
    tables: dict[str, Table] = {
        "model": {"preset": preset} | flatten(changes),
        "data": paths if has_gaps else _name_data(paths, home),
        "train": flatten(_table_over(before[1].model_dump(mode="json"), train.model_dump(mode="json"))),
        "run": {"dir": f"runs/{preset}"},
    }
    written = tomlkit.document()
    for name, values in tables.items():
        table = tomlkit.table()
        for key, value in values.items():
            written_value = _write_list(value) if name == "data" and isinstance(value, list) else value
            table.append(tomlkit.key(key.split(".")) if "." in key else key, written_value)
        if name == "data" and has_gaps:
            table.add(tomlkit.comment("the key valid can be left out: then nothing is held out for validation"))
        if values:
            written.append(name, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    DISK.write(path, tomlkit.dumps(written).encode())


def _name_data(folders: Table, home: Path) -> Table:
    """Return the table `data` over these folders: a mix with each of its sources, whose weights a person may change."""
    tables: Table = {"data": dict(folders)}
    expand_mixes(tables["data"])
    map_paths(tables, lambda path: relate(path, home))
    data: Table = tables["data"]
    return data


def _write_list(rows: list[Table]) -> Any:
    """Return tables as a list with one of them in a line."""
    import tomlkit

    array = tomlkit.array()
    for row in rows:
        inline = tomlkit.inline_table()
        inline.update(row)
        array.append(inline)
    return array.multiline(True)


def tables_to_go_on(model: ModelConfig, run: Path) -> str:
    """Return the beginning of a run file that trains the model of a run directory further: all but its own choices."""
    import tomlkit

    written = tomlkit.document()
    table = tomlkit.table()
    for key, value in model.model_dump(mode="json", exclude={"vocabulary"}, exclude_none=True).items():
        inner = tomlkit.inline_table()
        inner.update(value if isinstance(value, dict) else {})
        table.append(key, inner if isinstance(value, dict) else value)
    written.append("model", table)
    for name, values in (
        ("data", {"tokenizer": (run / "tokenizer").as_posix()}),
        ("train", {"start_from": run.as_posix()}),
    ):
        written.append(name, tomlkit.item(values))
    return tomlkit.dumps(written).strip()


def refuse_overwriting(path: Path) -> None:
    """Raise ConfigError if a file with the run file's name exists already."""
    if path.exists():
        raise ConfigError(f"{path} exists already.", "It is not overwritten.", "Give `out` another name, or delete it.")


def _table_over(base: Table, whole: Table) -> Table:
    """Return the table that `overlay` must lay over `base` so that the result is `whole`.

    TOML has no null: a value that is None now and was not before is written as "none".  A table of another kind is
    written completely, since `overlay` keeps nothing of the old kind; None there is that kind's default.
    """
    top: Table = {}
    for key, value in whole.items():
        was = base.get(key)
        if value == was:
            continue
        if isinstance(value, dict):
            kept = was if isinstance(was, dict) and all(was.get(tag) == value.get(tag) for tag in TAGS) else {}
            top[key] = _table_over(kept, value)
        else:
            top[key] = "none" if value is None else value
    return top
