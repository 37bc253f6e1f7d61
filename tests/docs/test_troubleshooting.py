"""The page of messages names messages that the code really has."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

from lowvram.cli.spelling import as_options

ROOT = Path(__file__).parents[2]


@functools.cache
def texts_of_the_code() -> str:
    """Return every text in the sources, with `…` where a value is put in, one a line, as a command shows it."""
    found = []
    for path in (ROOT / "lowvram").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return as_options("\n".join(found))


def test_every_message_of_the_page_is_one_of_the_code() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 40
    unknown = [message for message in messages if message not in texts_of_the_code()]
    assert unknown == []
