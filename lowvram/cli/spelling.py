"""Writes the arguments that a message of the Python interface names as the options that a user of commands types."""

from __future__ import annotations

import json
import re

from lowvram.shell import quote_command

# The options whose name is not the argument's.
_OTHER_NAMES = {"max_context": "context", "max_tokens": "tokens", "overrides": "set", "preset": "model"}
_OTHER_NAMES |= {
    "origin": "from",
    "all_documents": "all",
    "hashes": "hash",
    "least_bytes": "least",
    "caps": "cap",
    "weights": "weight",
}
_SAME_NAMES = (
    "above against allow below boring cache chart choices compile data demo desktop device device_check dtype exclude "
    "field gpu graphs harness holdout items language languages leave_out levels license listed measure memory "
    "micro_batch newest on_bad_row out pairs parallel precision processes ram recompute replace sample samples size "
    "stems steps strangest suffixes tariff temperature text to tokenizer tokens "
    "verify"
)
_OPTIONS = {name: f"--{name.replace('_', '-')}" for name in _SAME_NAMES.split()}
_OPTIONS |= {name: f"--{option}" for name, option in _OTHER_NAMES.items()}
# Arguments that are on, off or left to lowvram, and not merely given or not.
_SWITCHES = {"compile", "device_check", "graphs"}
# Functions of the Python interface, and the option that does the same.
_FUNCTIONS = {"generate": "--as base", "check_texts": "--on-bad-row report"}
_ARGUMENT = re.compile(r"`([a-z_]+)(?:=([^`]+))?`")


def as_options(text: str) -> str:
    """Return a message with its arguments, as `errors.argument` writes them, replaced by options."""
    return _ARGUMENT.sub(_as_option, text)


def _as_option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    if name in _FUNCTIONS and value is None:
        return _FUNCTIONS[name]
    if name not in _OPTIONS:
        return found[0]
    option = _OPTIONS[name]
    if value is None:
        return option
    if value in ("True", "False"):
        return f"{option} {'on' if value == 'True' else 'off'}" if name in _SWITCHES else option
    try:
        read = json.loads(value)
    except ValueError:
        return f"{option} {value}"
    if isinstance(read, list):
        return " ".join(quote_command(option, str(item)) for item in read)
    # Quotation marks that the shell needs stay as they are read.
    return f"{option} {read}" if quote_command(str(read)) == str(read) else f"{option} {value}"
