"""Sign a checkpoint anew after changing it, as a program that writes checkpoints of its own would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowvram.storage.disk import sha256
from lowvram.storage.manifest import MANIFEST, seal


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest as it is given."""
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def sign_anew(directory: Path, **changes: Any) -> None:
    """Make the manifest's sizes, hashes and checksum those of what lies in the directory, with other entries in it."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    files = {name: directory / name for name in manifest["files"]}
    listed = {name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for name, path in files.items()}
    write_manifest(directory, seal({**manifest, "files": listed, **changes}))


def remove_checksum(directory: Path, **changes: Any) -> None:
    """Write the manifest as lowvram did before it had a checksum."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    del manifest["sha256"]
    write_manifest(directory, {**manifest, **changes})
