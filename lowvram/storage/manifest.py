"""The manifest of a checkpoint: its format, its checksum, and how an altered one is recognised.

    {"format": 1, "step": 120, "versions": {name: version}, "hashes": {name: hash},
     "files": {name: {"bytes": size, "sha256": hash}}, "sha256": checksum}

The checksum covers every other entry, so one flipped bit anywhere in the manifest is found.  Checkpoints of lowvram
0.1.0 may lack it, and that version ignores it; every later format must keep it, computed by `checksum`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lowvram
from lowvram.errors import CheckpointError
from lowvram.storage.json_files import JsonError, read_object
from lowvram.storage.links import refuse_linked

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS, STATE = "weights.safetensors", "state.safetensors"
NUMBERS, CONFIG = "state.json", "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
STEP_NAME = re.compile(r"step-([0-9]{8,})")

_CHECKSUM = "sha256"
_REQUIRED_FILES = (WEIGHTS, STATE, NUMBERS, CONFIG, *TOKENIZER_FILES)
_WITHOUT_CHECKSUM = {"format", "step", "versions", "hashes", "files"}
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Such a name cannot refer to a file outside the directory, on any system.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
# The manifests that lowvram writes take less than 2 kB.
_MOST_BYTES = 1 << 20


class OtherVersionError(CheckpointError):
    """Another version of lowvram wrote the checkpoint and this one cannot read it.  It is whole, so never skipped."""


def checksum(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 over every entry but the checksum, as sorted JSON in ASCII without white space."""
    rest = {name: value for name, value in manifest.items() if name != _CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with its checksum."""
    return {**manifest, _CHECKSUM: checksum(manifest)}


def is_sealed(manifest: dict[str, Any]) -> bool:
    """Say whether a manifest has a checksum."""
    return _CHECKSUM in manifest


@contextmanager
def explain_bad_drive(path: Path) -> Iterator[None]:
    """Raise CheckpointError where the drive cannot read the file `path` inside the block: that is damage too."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CheckpointError(f"{path} cannot be read.", f"The drive says: {error.strerror}.") from error


def list_checkpoints(run: Path) -> list[Path]:
    """Return the directories of a run's checkpoints, the newest first; opens none of them."""
    directories = [path for path in run.glob("step-*") if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(directories, key=step_of, reverse=True)


def step_of(directory: Path) -> int:
    """Return the step that a checkpoint directory is named after."""
    return int(directory.name.removeprefix("step-"))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint directory after checking its checksum and its entries.

    Raises CheckpointError where it is missing or was altered, OtherVersionError where it has another format and a
    correct checksum, which shows that it is not damaged.
    """
    path = directory / MANIFEST
    refuse_linked(path)
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}.", "It is not a checkpoint, or was not finished.")
    try:
        with explain_bad_drive(path):
            manifest = read_object(path, _MOST_BYTES)
    except JsonError as error:
        raise CheckpointError(f"{path} cannot be read as a manifest: {error}.") from error
    if is_sealed(manifest) and manifest[_CHECKSUM] != checksum(manifest):
        raise CheckpointError(f"{path} was altered.", "Its checksum does not match its contents.")
    format = manifest.get("format")
    if is_sealed(manifest) and _is_count(format) and format != FORMAT:
        raise _other_format(directory, manifest)
    if problem := _find_problem(manifest, directory.name):
        raise CheckpointError(f"{path} was altered: {problem}.")
    return manifest


def _other_format(directory: Path, manifest: dict[str, Any]) -> OtherVersionError:
    versions = manifest.get("versions")
    version = versions.get("lowvram") if isinstance(versions, dict) else None
    return OtherVersionError(
        f"{directory} has checkpoint format {manifest['format']}.",
        f"This lowvram ({lowvram.__version__}) reads format {FORMAT}.",
        f"Update lowvram to the version that wrote it{f': {version}' if version else ''}.",
    )


def _find_problem(manifest: dict[str, Any], directory_name: str) -> str | None:
    """Return half a sentence about the first entry that no manifest of this version can have; None if all are valid."""
    if missing := sorted(_WITHOUT_CHECKSUM - manifest.keys()):
        return f"it has no {missing[0]!r}"
    unknown = sorted(manifest.keys() - _WITHOUT_CHECKSUM)
    if unknown and not is_sealed(manifest):
        return f"it has no checksum but an entry {unknown[0]!r}"
    # Without a checksum another format number may be damage.  JSON's true would equal 1.
    if not _is_count(manifest["format"]) or manifest["format"] != FORMAT:
        return f"its format is {manifest['format']!r}, and its checksum is missing"
    step, named = manifest["step"], STEP_NAME.fullmatch(directory_name)
    if not _is_count(step):
        return f"its step is {step!r}"
    if named and int(named[1]) != step:
        return f"its step is {step}, and the directory is called {directory_name}"
    for entry in ("versions", "hashes"):
        table = manifest[entry]
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            return f"{entry!r} is not a table of strings"
    return _find_problem_of_files(manifest["files"])


def _find_problem_of_files(files: object) -> str | None:
    if not isinstance(files, dict):
        return "'files' is not a table"
    if missing := [name for name in _REQUIRED_FILES if name not in files]:
        return f"'files' does not list {missing[0]}"
    for name, entry in files.items():
        if not _PLAIN_NAME.fullmatch(name):
            return f"'files' lists {name!r}, which is not a plain file name"
        is_table = isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
        if not is_table or not _is_count(entry["bytes"]) or not _is_sha256(entry["sha256"]):
            return f"'files' gives no size and SHA-256 for {name}"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None
