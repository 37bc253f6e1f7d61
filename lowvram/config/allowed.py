"""Says in plain English which values a key takes, from what pydantic finds wrong with one; knows no key."""

from __future__ import annotations

from typing import Any

_TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "finite_number": "a finite number",
    "string": "text in quotes",
    "path": "a path in quotes",
    "tuple": 'a list, such as ["a", "b"]',
    "list": "a list",
    "dict": "a table",
}
_BOUNDS = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "a number below {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string_unicode": "text in valid Unicode",
}


def describe_allowed(problem: Any) -> str:
    """Return what a value may be, as the rest of a sentence: "it takes a whole number".  problem: one of pydantic's."""
    kind, message = problem["type"], problem["msg"].removesuffix(".")
    if kind in _BOUNDS:
        bounds = {name: _show(value) for name, value in problem.get("ctx", {}).items()}
        return f"it takes {_BOUNDS[kind].format(**bounds)}"
    for name, words in _TYPES.items():
        if kind == name or kind.rpartition("_")[0] == name or kind == f"{name}_from_float":
            return f"it takes {words}"
    message = message.removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _show(bound: Any) -> str:
    return f"{bound:,g}" if isinstance(bound, float) else f"{bound:,}" if isinstance(bound, int) else str(bound)
