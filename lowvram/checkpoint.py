"""A checkpoint is a directory that is written whole or not at all, and read only after it is verified.

    step-00000120/  weights.safetensors   the model, fp32; opens without the rest
                    state.safetensors     optimizer
                    state.json            step, tokens, loss scale
                    config.json           the whole run configuration
                    tokenizer.json, tokenizer_config.json
                    manifest.json         written last: format, versions, SHA-256 of every other file

Knows tensors and names, not what they mean.  Nothing here is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lowvram
from lowvram.errors import CheckpointError
from lowvram.files import DISK, Disk, explain_full_disk, free_bytes, sha256

FORMAT = 1
_NAME = "step-{:08d}"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """One complete directory."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.manifest["step"])

    @property
    def size_bytes(self) -> int:
        """What its files take on disk."""
        return sum(int(file["bytes"]) for file in self.manifest["files"].values())

    def weights(self) -> dict[str, Tensor]:
        """Return the model's tensors by name."""
        return load_file(self.directory / "weights.safetensors")

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors by name."""
        return load_file(self.directory / "state.safetensors")

    def numbers(self) -> dict[str, Any]:
        """Return step, tokens and the other plain values of the training state."""
        return _read_json(self.directory / "state.json")

    def config(self) -> dict[str, Any]:
        """Return the run configuration, as plain tables."""
        return _read_json(self.directory / "config.json")


def open_checkpoint(directory: Path) -> Checkpoint:
    """Return a directory's checkpoint after comparing every file with its SHA-256.

    Raises CheckpointError naming the file that is missing, altered or of a newer format.
    """
    manifest_path = directory / _MANIFEST
    if not manifest_path.is_file():
        raise CheckpointError(f"{directory} has no {_MANIFEST}.", "It is no checkpoint, or was not finished.")
    try:
        manifest = _read_json(manifest_path)
        files: dict[str, dict[str, Any]] = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest_path} cannot be read as a manifest.", f"{error!r}.") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} has checkpoint format {manifest.get('format')}.",
            f"This lowvram ({lowvram.__version__}) reads format {FORMAT}.",
            "Install the lowvram that wrote it: pip install --upgrade lowvram.",
        )
    for name, facts in files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.", f"The manifest lists it with {facts['bytes']} bytes.")
        if path.stat().st_size != facts["bytes"]:
            has = f"{path} has {path.stat().st_size} bytes."
            raise CheckpointError(has, f"The manifest says {facts['bytes']}.")
        if sha256(path) != facts["sha256"]:
            raise CheckpointError(f"{path} was altered.", "Its SHA-256 is not the manifest's.")
    return Checkpoint(directory, manifest)


def find_checkpoint(path: Path) -> tuple[Checkpoint, list[CheckpointError]]:
    """Return the checkpoint that `path` is, or the newest whole one of the run directory `path`.

    The list names newer ones that were passed over because they are corrupt.  Raises CheckpointError if none is whole.
    """
    if not path.is_dir():
        fix = "Name a run directory or one of its step-… folders."
        raise CheckpointError(f"There is no directory {path}.", fix=fix)
    if (path / _MANIFEST).is_file() or path.name.startswith("step-"):
        return open_checkpoint(path), []
    problems: list[CheckpointError] = []
    for directory in _newest_first(path):
        try:
            return open_checkpoint(directory), problems
        except CheckpointError as problem:
            problems.append(problem)
    if problems:
        raise CheckpointError(f"No checkpoint in {path} is whole.", " ".join(str(problem) for problem in problems))
    raise CheckpointError(f"There is no checkpoint in {path}.", "The run has saved nothing yet.", "Train it first.")


def _newest_first(run: Path) -> Iterator[Path]:
    found = [p for p in run.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    yield from sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run directory.

    keep: how many of the newest stay.  milestone_steps: every multiple of it stays for good.
    budget_bytes: the oldest that are not the newest go, milestones last, while all together are larger.
    """

    run: Path
    keep: int = 2
    milestone_steps: int | None = None
    budget_bytes: int | None = None
    disk: Disk = DISK

    def latest(self) -> tuple[Checkpoint | None, list[CheckpointError]]:
        """Return the newest whole checkpoint, or None where none was written, and the corrupt ones passed over.

        Raises CheckpointError where there are checkpoints and none of them is whole.
        """
        if next(_newest_first(self.run), None) is None:
            return None, []
        return find_checkpoint(self.run)

    def save(
        self,
        weights: dict[str, Tensor],
        state: dict[str, Tensor],
        numbers: dict[str, Any],
        config: dict[str, Any],
        tokenizer: Path,
        hashes: dict[str, str],
    ) -> Checkpoint:
        """Write step `numbers["step"]` beside its final name, sync it, rename it, and delete what retention lets go.

        hashes: of what was learnt from (data, tokenizer), kept in the manifest.
        """
        final = self.run / _NAME.format(numbers["step"])
        draft = final.with_name(f"{final.name}.tmp")
        self.run.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        needed = sum(t.numel() * t.element_size() for t in (*weights.values(), *state.values()))
        with explain_full_disk(self.run, needed):
            try:
                if free_bytes(self.run) < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
                draft.mkdir()
                self._write_tensors(draft / "weights.safetensors", weights)
                self._write_tensors(draft / "state.safetensors", state)
                self.disk.write(draft / "state.json", _to_json(numbers))
                self.disk.write(draft / "config.json", _to_json(config))
                for name in ("tokenizer.json", "tokenizer_config.json"):
                    self.disk.write(draft / name, (tokenizer / name).read_bytes())
                manifest = _manifest(draft, int(numbers["step"]), hashes)
                self.disk.write(draft / _MANIFEST, _to_json(manifest))
                self.disk.sync_directory(draft)
                if final.exists():
                    self.disk.delete(final)
                self.disk.rename(draft, final)
            except OSError:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        self._let_go(final)
        return Checkpoint(final, manifest)

    def _write_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        whole = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, path)
        except safetensors.SafetensorError as error:
            # safetensors reports a full disk as its own error; the plain one is raised for it.
            raise OSError(*_errno_of(error)) from error
        path.chmod(0o644)
        self.disk.sync_file(path)

    def _let_go(self, newest: Path) -> None:
        old = [path for path in _newest_first(self.run) if path != newest][::-1]
        doomed = [path for path in old[: max(0, len(old) - (self.keep - 1))] if not self._is_milestone(path)]
        if self.budget_bytes is not None:
            size = {path: _size_of(path) for path in [*old, newest]}
            left = sum(size.values()) - sum(size[path] for path in doomed)
            # Ordinary ones go before milestones, and the older before the newer; the newest always stays.
            for path in sorted(old, key=self._is_milestone):
                if left > self.budget_bytes and path not in doomed:
                    doomed.append(path)
                    left -= size[path]
        for path in doomed:
            self.disk.delete(path)

    def _clear_leftovers(self) -> None:
        """Free what a save or a deletion that was killed left behind, of whichever step."""
        for leftover in (*self.run.glob("step-*.tmp"), *self.run.glob("step-*.deleted")):
            shutil.rmtree(leftover, ignore_errors=True)

    def _is_milestone(self, path: Path) -> bool:
        step = int(path.name.removeprefix("step-"))
        return self.milestone_steps is not None and step % self.milestone_steps == 0


def _errno_of(error: Exception) -> tuple[int, str]:
    text = str(error)
    full = "No space left" in text or "os error 28" in text or "os error 112" in text
    return (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, text)


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _manifest(directory: Path, step: int, hashes: dict[str, str]) -> dict[str, Any]:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(directory.iterdir())}
    versions = {"lowvram": lowvram.__version__, "torch": str(torch.__version__)}
    return {"format": FORMAT, "step": step, "versions": versions, "hashes": hashes, "files": files}
