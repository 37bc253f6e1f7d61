"""Reads run files and presets: TOML and `--set` in, a checked RunConfig out; explains what is wrong in them."""

from __future__ import annotations

import functools
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lowvram.config.allowed import describe_allowed
from lowvram.config.field_names import answer_key
from lowvram.config.mix import expand_mixes
from lowvram.config.model import ModelConfig
from lowvram.config.run import RunConfig, check_vocabulary
from lowvram.config.train import TrainConfig, check_rotation
from lowvram.errors import ConfigError, argument, name_nearest

# What `fit --out` writes where no folder was given.
PLACEHOLDER = "PUT A FOLDER HERE"
# The keys that name which member of a tagged union a table is.
TAGS = ("kind", "name")
# The vocabulary with which a run's values are checked before its tokenizer is opened.
_STANDS_IN = 32_768
PRESETS = Path(__file__).with_name("presets")
Table = dict[str, Any]
Config = typing.TypeVar("Config", bound=BaseModel)


def preset_names() -> list[str]:
    """Return the names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(name: str) -> Table:
    """Return a preset's tables `model` and `train`; raises ConfigError that names the nearest presets."""
    if name not in preset_names():
        raise ConfigError(f'model.preset is "{name}"; there is no such preset.', fix=name_nearest(name, preset_names()))
    return tomllib.loads((PRESETS / f"{name}.toml").read_text(encoding="utf-8"))


def load_preset(name: str, sets: Sequence[str] = ()) -> tuple[ModelConfig, TrainConfig]:
    """Return a preset's model and training configuration, changed by `--set a.b=c` as a run file would change it.

    Raises ConfigError that names the nearest presets, or the unknown key.
    """
    tables: Table = {}
    assigned = {_assign(tables, assignment): assignment for assignment in sets}
    unknown = sorted(set(tables) - {"model", "train"})
    if unknown:
        raise ConfigError(
            f"`overrides` name {unknown[0]}, which a preset does not have.", fix="Set values of model and train."
        )
    where = f"preset {name}"
    _check_tables(tables, where)
    _lay_over_preset(name, tables)
    model = _check(ModelConfig, tables["model"], where, assigned, "model")
    train = _check(TrainConfig, tables["train"], where, assigned, "train")
    try:
        check_rotation(model, train)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.") from error
    return model, train


def load_run(
    path: Path,
    sets: Sequence[str],
    vocabulary_of: Callable[[Path], int],
    with_gaps: bool = False,
    check: Callable[[RunConfig], None] = lambda config: None,
) -> RunConfig:
    """Read a run file, lay it over its preset, apply `--set a.b=c`, and check every value.

    Paths in it are relative to the file.  vocabulary_of: maps the tokenizer's directory to its number of ids.
    with_gaps: accept the placeholders that `write_run` writes for unknown folders.  check: called when all values are
    known to be right, and before any folder is opened; its configuration may have another vocabulary.
    Raises ConfigError that names file, key and value, and for an unknown key the nearest known ones.
    """
    tables, assigned = _read_tables(path, sets)
    _check_tables(tables, str(path))
    model = tables.get("model", {})
    stated = model.get("vocabulary")
    _lay_over_preset(model.pop("preset", None), tables)
    gaps = _find_gaps(tables)
    _resolve_paths(tables, path.resolve().parent)
    expand_mixes(tables.get("data", {}))
    tokenizer = tables.get("data", {}).get("tokenizer")
    if not isinstance(tokenizer, str):
        fix = 'Write [data] tokenizer = "tok".'
        raise ConfigError(f"{path} names no tokenizer.", "The vocabulary comes from it.", fix)
    tables.setdefault("model", {}).setdefault("vocabulary", _STANDS_IN)
    check(_check(RunConfig, tables, str(path), assigned))
    if gaps and not with_gaps:
        raise _explain_gaps(path, gaps)
    size = vocabulary_of(Path(tokenizer))
    check_vocabulary(stated, size, Path(tokenizer))
    tables["model"]["vocabulary"] = size
    return _check(RunConfig, tables, str(path), assigned)


def _check_tables(tables: Table, where: str) -> None:
    """Raise ConfigError if a part of a run is a value instead of a table."""
    for part in RunConfig.model_fields:
        if not isinstance(tables.get(part, {}), dict):
            fix = f"Write its values below a line [{part}]."
            raise ConfigError(f"{where}: {part} is {tables[part]!r}, not a table.", fix=fix)


def _lay_over_preset(name: object, tables: Table) -> None:
    """Complete the tables `model` and `train` in place from a preset, if one is named, and remove what is "none"."""
    preset = {} if name is None else read_preset(str(name))
    for part in ("model", "train"):
        if part in preset or part in tables:
            tables[part] = overlay(preset.get(part, {}), tables.get(part, {}))
            _switch_off(tables[part])


def _read_tables(path: Path, sets: Sequence[str]) -> tuple[Table, dict[str, str]]:
    """Return a run file's tables with what is laid over them, and the assignment of each key that has one."""
    tables = _read_toml(path)
    return tables, {_assign(tables, assignment): assignment for assignment in sets}


def name_vocabulary(path: Path, sets: Sequence[str]) -> int | None:
    """Return the vocabulary that a run file or its preset states, None where neither does."""
    model = _read_tables(path, sets)[0].get("model", {})
    if "vocabulary" in model or "preset" not in model:
        stated = model.get("vocabulary")
        return stated if isinstance(stated, int) and stated > 0 else None
    return int(read_preset(str(model["preset"]))["model"]["vocabulary"])


def _find_gaps(tables: Table) -> list[str]:
    """Return the keys whose folder is still to be written into the file."""
    return [f"data.{key}" for key, value in tables.get("data", {}).items() if value == PLACEHOLDER]


def _explain_gaps(path: Path, gaps: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{path} leaves {', '.join(gaps)} open.",
        "A run needs packed shards and the tokenizer that packed them.",
        "Write their folders there: lowvram tokenizer train and lowvram data pack make them.",
    )


def overlay(base: Table, top: Mapping[str, Any]) -> Table:
    """Return `base` with the values of `top`, sub-tables merged; one of another kind (or name) replaces the old one."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        same_kind = (
            isinstance(below, dict)
            and isinstance(value, Mapping)
            and all(value.get(tag, below.get(tag)) == below.get(tag) for tag in TAGS)
        )
        merged[key] = overlay(typing.cast(Table, below), value) if same_kind else value
    return merged


def _switch_off(table: Table) -> None:
    """Turn "none" into None, which TOML cannot write, so that a file can switch off a preset's yarn or window."""
    for key, value in table.items():
        if isinstance(value, dict):
            _switch_off(value)
        elif value == "none":
            table[key] = None


def _read_toml(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        fix = "Check the name, or write one: lowvram fit --data shards --out run.toml."
        raise ConfigError(f"There is no run file {path}.", fix=fix) from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path} is a directory.", "A run is described by a TOML file.", "Name that file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fix = "Correct that line; paths on Windows go in 'single quotes'."
        raise ConfigError(f"{path} is not TOML:", f"{error}.", fix) from error


def _assign(tables: Table, assignment: str) -> str:
    """Lay one assignment over the tables, and return the full name of its key."""
    name, equals, text = assignment.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"{argument('overrides', [assignment])} is not an assignment.", fix="Write optimizer.lr=3e-4."
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if keys == ["preset"]:
        keys.insert(0, "model")
    if keys[0] not in RunConfig.model_fields:
        parts = [part for part, field in RunConfig.model_fields.items() if keys[0] in known_keys(field.annotation)]
        if len(parts) != 1:
            fix = answer_key(keys[0], full_names(), full_names())
            raise ConfigError(f"{argument('overrides', [assignment])}: there is no key {keys[0]}.", fix=fix)
        keys.insert(0, parts[0])
    table = tables
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{argument('overrides', [assignment])}: {key} is a value, not a table.")
    table[keys[-1]] = value
    return ".".join(keys)


def _resolve_paths(tables: Table, home: Path) -> None:
    map_paths(tables, lambda path: os.path.normpath(home / Path(path).expanduser()))


def map_paths(tables: Table, change: Callable[[str], str]) -> None:
    """Change every path in a run's tables in place; a value that is no text is left for the later check to report."""
    data = tables.get("data", {})
    several: list[Any] = []
    for part in ("train", "valid"):
        if isinstance(data.get(part), list):
            data[part] = [{"path": one} if isinstance(one, str) else one for one in data[part]]
            several += data[part]
    path_keys: list[tuple[Any, tuple[str, ...]]] = [
        (data, ("valid", "tokenizer", "train")),
        (tables.get("run", {}), ("dir", "pairs", "suffixes", "choices")),
        (tables.get("train", {}), ("start_from",)),
        *((corpus, ("path",)) for corpus in several),
    ]
    for table, keys in path_keys:
        for key in keys:
            if isinstance(table, dict) and isinstance(table.get(key), str):
                table[key] = change(table[key])


def known_keys(annotation: Any, tag: str | None = None) -> list[str]:
    """Return the keys that a configuration type takes; of a union, those of the member tagged `tag`, or of all."""
    keys: list[str] = []
    for member in _configs_in(annotation):
        tags = _tags_of(member)
        if tag is None or not tags or tag in tags:
            keys += [key for key in member.model_fields if key not in keys]
    return keys


@functools.cache
def full_names() -> Mapping[str, str]:
    """Return every key of a run file with its full name; a key that several tables have is left out."""
    names_by_key: dict[str, list[str]] = {}

    def walk(config: type[BaseModel], prefix: str) -> None:
        for key, field in config.model_fields.items():
            names_by_key.setdefault(key, []).append(f"{prefix}{key}")
            for inner in _configs_in(field.annotation):
                walk(inner, f"{prefix}{key}.")

    walk(RunConfig, "")
    return {key: names[0] for key, names in names_by_key.items() if len(set(names)) == 1}


def _configs_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [config for inner in typing.get_args(annotation) for config in _configs_in(inner)]
    return []


def _check(config: type[Config], tables: Table, where: str, assigned: Mapping[str, str], prefix: str = "") -> Config:
    """Return the tables as a configuration; raises ConfigError naming who is wrong: the file, or an assignment.

    where: the file or the preset.  assigned: the assignments by the full names of their keys.
    """
    try:
        return config.model_validate(tables)
    except ValidationError as error:
        by_place: dict[str, list[str]] = {}
        for path, sentence in _explain(config, tables, error, prefix):
            mine = [text for key, text in assigned.items() if f"{path}.".startswith(f"{key}.")]
            place = argument("overrides", mine[-1:]) if mine else where
            by_place.setdefault(place, []).append(sentence)
        says = [f"{place}: {' '.join(dict.fromkeys(sentences))}" for place, sentences in by_place.items()]
        raise ConfigError(" ".join(says)) from error


def _explain(config: type[BaseModel], tables: Table, error: ValidationError, prefix: str) -> list[tuple[str, str]]:
    """Return the full name of each key that is wrong, and a sentence about it."""
    found: list[tuple[str, str]] = []
    problems = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")
    misspelt: list[str] = []
    for problem in problems:
        path, level = _locate(config, problem, prefix)
        kind, ctx = problem["type"], problem.get("ctx", {})
        if kind == "extra_forbidden":
            word = str(problem["loc"][-1])
            known = [key for c in level for key in c.model_fields]
            full = ".".join(filter(None, (path, word)))
            # If another kind of the same table has the key, "it is model.attention.kv_heads" would be no help for MLA.
            others = {key: name for key, name in full_names().items() if name != full}
            answer = answer_key(word, known, others)
            misspelt += [key for key in known if answer == f"Did you mean {key}?"]
            found.append((full, f"{'There' if found else 'there'} is no key {full}. {answer}"))
        elif kind == "missing" and path in misspelt:
            continue  # it stands there under the name that was not known
        elif kind == "missing":
            found.append((path, f"{path} is missing."))
        elif kind == "union_tag_not_found":
            tag, kinds = (ctx["discriminator"].strip(chr(39)), [repr(one) for c in level for one in _tags_of(c)])
            found.append((path, f"{path}.{tag} is missing; there are {', '.join(kinds)}."))
        elif kind == "union_tag_invalid":
            tag = f"{path}.{ctx['discriminator'].strip(chr(39))}"
            found.append((tag, f"{tag} is {ctx['tag']!r}; there are {ctx['expected_tags']}."))
        elif kind == "value_error":
            found.append((path, f"{problem['msg'].removeprefix('Value error, ')}."))
        elif kind.startswith("model_") and level:
            expected = f"a table with {', '.join(level[0].model_fields)}"
            found.append((path, f"{path} is {problem['input']!r}; it takes {expected}."))
        else:
            given = "" if isinstance(problem["input"], dict) else f" is {problem['input']!r}"
            found.append((path, f"{path}{given}; {describe_allowed(problem)}."))
    return found


def _locate(config: type[BaseModel], problem: Any, prefix: str) -> tuple[str, list[type[BaseModel]]]:
    """Return the full name of the key that a problem of pydantic's is about, and the tables that may stand there."""
    keys, level = [prefix] if prefix else [], [config]
    for part in problem["loc"][:-1] if problem["type"] == "extra_forbidden" else problem["loc"]:
        if isinstance(part, str):
            inner = [f for c in level for f in [c.model_fields.get(part)] if f is not None]
            if inner:
                keys.append(part)
                level = [c for f in inner for c in _configs_in(f.annotation)]
            else:
                level = [c for c in level if part in _tags_of(c)] or level
        else:
            keys[-1] += f"[{part}]"
    return ".".join(keys), level


def _tags_of(config: type[BaseModel]) -> tuple[Any, ...]:
    """Return the tags of a member of a tagged union; none if it is no such member."""
    field = config.model_fields.get("kind") or config.model_fields.get("name")
    return typing.get_args(field.annotation) if field is not None else ()


def to_portable(what: RunConfig, home: Path) -> Table:
    """Return a run's configuration as plain tables whose paths are relative to `home`, so that both can be moved."""
    tables = what.model_dump(mode="json")
    map_paths(tables, lambda path: relate(path, home))
    return tables


def from_portable(tables: Table, home: Path) -> RunConfig:
    """Return the configuration that `to_portable` wrote, with its paths resolved from where `home` is now."""
    _resolve_paths(tables, home.resolve())
    return RunConfig.model_validate(tables)


def relate(path: str, home: Path) -> str:
    """Return a path relative to `home`, with forward slashes; unchanged if there is no relative path."""
    try:
        return Path(os.path.relpath(path, home)).as_posix()
    except ValueError:  # another drive of Windows has no relative path
        return path
