"""A message of the Python interface names arguments, and the command line names options in their place."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

from lowvram.cli.app import build_parser
from lowvram.cli.spelling import _OPTIONS, as_options
from lowvram.errors import argument
from lowvram.shell import quote_command

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "said, shown",
    [
        (argument("out"), "--out"),
        (argument("max_context", 512), "--context 512"),
        (argument("device", "cpu"), "--device cpu"),
        (argument("gpu", "RTX 4060"), '--gpu "RTX 4060"'),
        (argument("newest", True), "--newest"),
        (argument("graphs", True), "--graphs on"),
        (argument("compile", False), "--compile off"),
        (argument("data", Path("shards")), "--data shards"),
        (argument("overrides", ["a=1", "b=2"]), quote_command("--set", "a=1", "--set", "b=2")),
        ("`generate`", "--as base"),
        ("`lowvram fit --gpu CARD`", "`lowvram fit --gpu CARD`"),
        ("`seed=3` of `tok`", "`seed=3` of `tok`"),
    ],
)
def test_an_argument_is_shown_as_its_option_and_all_else_as_it_is(said: str, shown: str) -> None:
    assert as_options(f"Give {said}.") == f"Give {shown}."


def test_every_argument_has_an_option_that_a_command_takes() -> None:
    known: set[str] = set()
    pending: list[argparse.ArgumentParser] = [build_parser()]
    while pending:
        for action in pending.pop()._actions:
            known.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                pending += action.choices.values()
    assert set(_OPTIONS.values()) <= known


# A whole command is the same in Python and in a shell: `lowvram …`, and what pip and llama.cpp are called with.
_COMMAND = re.compile(r"(lowvram|pip) [a-z][^`;]*|^--[a-z-]+ ?$")
_MESSAGES = ("api", "config", "convert", "data", "evaluate", "fit", "generate", "hardware", "storage", "train")
# A table of options, which no message is made of; the arguments of other programs; a command made of pieces.
_TABLES = {
    "config/field_names.py",
    "convert/gguf/verify.py",
    "api/services.py",
    "hardware/detect.py",
    "hardware/wake_lock.py",
}


def test_no_message_below_the_command_line_names_an_option() -> None:
    found = []
    for path in sorted(path for room in _MESSAGES for path in (ROOT / "lowvram" / room).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            is_table = path.relative_to(ROOT / "lowvram").as_posix() in _TABLES
            if text not in docstrings and not is_table and re.search(r"(?<!\w)--[a-z]", _COMMAND.sub("", text)):
                found.append(f"{path.name}: {text}")
    assert found == []
