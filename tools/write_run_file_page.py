"""Writes docs/run-file.md, every key of a run file with its type, default and meaning, or checks that it is current.

python tools/write_run_file_page.py [--check]

Keys, types and defaults come from the configuration classes, meanings from the docstrings below their fields.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lowvram.config.base import Count, Size
from lowvram.config.model import ModelConfig
from lowvram.config.run import RunConfig

PAGE = ROOT / "docs" / "run-file.md"
_HEAD = """\
# Every key of a run file

Written by machine: `python tools/write_run_file_page.py`.

A run file is TOML. `lowvram train RUN.toml` trains what it describes, and `lowvram fit RUN.toml` says what that takes.
Any value can also be set on the command line: `--set train.optimizer.lr=3e-4`, or shorter `--set optimizer.lr=3e-4`.
With `[model] preset = "tr-25m"` every key below `model` and `train` has a value already, which the file may change;
without one the keys marked *required* must be there. Counts may be written `"500M"`, `"1.2e9"` or `"16k"`, sizes
`"40GB"`. Paths are relative to the file. An optional part of a preset is switched off with `"none"`.
"""
# Not a field of the configuration: `load_run` replaces it by the preset's values.
_PRESET = "| `preset` | text | none | Name of a preset, from which every key that the file leaves out is taken. |"

# Values that `load_run` fills in although the configuration itself has no default.
_FOLLOWS: dict[tuple[type[BaseModel], str], str] = {(ModelConfig, "vocabulary"): "the tokenizer's"}


def docs_of(config: type[BaseModel]) -> dict[str, str]:
    """Return the meaning of each field: the docstring below it in the source."""
    tree = classes_of(config.__module__)[config.__name__]
    meanings = {}
    for field_and_below in zip(tree.body, tree.body[1:], strict=False):
        match field_and_below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                meanings[name] = " ".join(str(text).split())
    return meanings


@functools.cache
def classes_of(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes in a module's source by name."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def configs_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the configuration classes that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for inner in typing.get_args(annotation) for config in configs_in(inner)]


def name_type(annotation: Any) -> str:
    """Return what a person writes for a field: `whole number`, `"bf16" or "fp32"`, `list of text`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Count, Size):
        return "count" if annotation == Count else "size"
    if origin is typing.Annotated:
        return name_type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(name_type(inner) for inner in arguments if inner is not type(None)))
    if origin is tuple:
        return f"list of {name_type(arguments[0])}"
    if configs_in(annotation):
        return "table"
    return {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", Path: "path"}[annotation]


def name_default(field: FieldInfo) -> str:
    """Return the default as a run file writes it."""
    value = field.default
    if value is PydanticUndefined:
        return "*required*"
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        tags = [f'{tag} = "{getattr(value, tag)}" ' for tag in ("kind", "name") if hasattr(value, tag)]
        return f"`{{ {tags[0]}}}`" if tags else "as below"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}`"


def sections(config: type[BaseModel], title: str) -> Iterator[str]:
    """Yield a table of a class's keys, then those of the tables in it."""
    meanings = docs_of(config)
    rows = [
        f"| `{key}` | {type_of(field)} | {_FOLLOWS.get((config, key)) or name_default(field)} | {meanings[key]} |"
        for key, field in config.model_fields.items()
    ]
    rows = [_PRESET, *rows] if config is ModelConfig else rows
    about = " ".join((inspect.getdoc(config) or "").split("\n\n")[0].split())
    yield "\n".join(
        [f"## {title}", "", about, "", "| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]
    )
    for key, field in config.model_fields.items():
        inner = configs_in(field.annotation)
        for member in inner:
            yield from sections(member, f"{title.split(' ')[0].rstrip('.')}.{key}{tag_of(member)}")


def type_of(field: FieldInfo) -> str:
    """Return a field's type; a number that may have a unit is recognised by its validator."""
    names = {item.func.__name__ for item in field.metadata if getattr(item, "func", None)}
    if names & {"round_count", "parse_bytes"}:
        return "count" if "round_count" in names else "size"
    return name_type(field.annotation)


def tag_of(member: type[BaseModel]) -> str:
    """Return the tag of a table that exists in several kinds, as ` (kind = "gqa")`, "" for other tables."""
    for tag in ("kind", "name"):
        if tag in member.model_fields:
            return f' ({tag} = "{member.model_fields[tag].default}")'
    return ""


def page() -> str:
    """Return the whole page."""
    parts = [_HEAD]
    for home, field in RunConfig.model_fields.items():
        [config] = configs_in(field.annotation)
        parts += [f"{section}\n" for section in sections(config, home)]
    return "\n".join(parts)


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where the page differs; write nothing")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE.name} is not current; run: python tools/write_run_file_page.py")


if __name__ == "__main__":
    main()
