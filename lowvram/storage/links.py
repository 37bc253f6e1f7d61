"""Symbolic links in the place of files that lowvram writes or trusts; knows no file's contents."""

from __future__ import annotations

from pathlib import Path

from lowvram.errors import CheckpointError


def refuse_link(path: Path) -> None:
    """Raise CheckpointError where a file that lowvram would write through its name is a symbolic link."""
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a symbolic link.",
            f"Writing it would change {path.readlink()}, which may belong to another program.",
            "Delete the link and type the same command again.",
        )


def leads_out(path: Path, directory: Path) -> bool:
    """Say whether a path in `directory` is a symbolic link to a plain file outside of it."""
    if not path.is_symlink():
        return False
    target = path.resolve()
    return directory.resolve() not in target.parents and (target.is_file() or not target.exists())


def refuse_linked(path: Path) -> None:
    """Raise CheckpointError where a file, or a directory, that belongs to a checkpoint is a symbolic link."""
    if path.is_symlink():
        raise CheckpointError(
            f"{path} is a symbolic link to {path.readlink()}.",
            "What it leads to may change without this checkpoint, so a run does not rely on it.",
            "Put the file or directory itself in its place.",
        )
