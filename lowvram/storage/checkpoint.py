"""Checkpoints: directories that are written whole or not at all, and read only after they are verified.

    step-00000120/  weights.safetensors   the model, in the dtypes that it is kept in; opens without the rest
                    state.safetensors     optimizer
                    state.json            step, tokens, loss scale, plan
                    config.json           the whole run configuration
                    tokenizer.json, tokenizer_config.json
                    manifest.json         written last: SHA-256 of every other file, and of itself; see `manifest`

Knows tensors and names, not what they mean.  Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

import lowvram
from lowvram.errors import BusyError, CheckpointError, DiskFullError
from lowvram.storage.disk import DISK, Disk, explain_full_disk, free_bytes, name_beside, sha256
from lowvram.storage.json_files import JsonError, read_object
from lowvram.storage.links import refuse_linked
from lowvram.storage.manifest import (
    CONFIG,
    FORMAT,
    MANIFEST,
    NUMBERS,
    STATE,
    STEP_NAME,
    TOKENIZER_FILES,
    WEIGHTS,
    OtherVersionError,
    explain_bad_drive,
    is_sealed,
    list_checkpoints,
    read_manifest,
    seal,
    step_of,
)
from lowvram.storage.missing_run import explain_no_checkpoint, explain_no_directory
from lowvram.storage.reserve import Reserve
from lowvram.storage.tensor_files import MappedTensors, size_of_tensors, write_tensors

_NAME = "step-{:08d}"
# Configuration, counters and manifest take a few KiB; safetensors' headers some hundred bytes a tensor.
_JSON_BYTES = 1 << 18
_LEFTOVER = re.compile(r"step-[0-9]{8,}(\.[0-9]+)?\.(tmp|deleted)")
# What `Disk.write` leaves of the run's other files, such as its plan.
_TORN_FILE = re.compile(r"[a-z-]+\.json\.([0-9]+)\.tmp")


def size_of_files(tokenizer: Path) -> int:
    """Return about the bytes of a checkpoint's other files: the tokenizer's, and some of JSON."""
    return sum((tokenizer / name).stat().st_size for name in TOKENIZER_FILES) + _JSON_BYTES


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint directory that is complete."""

    directory: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """The optimizer step after which it was written."""
        return int(self.manifest["step"])

    @property
    def notice(self) -> str | None:
        """A notice for the user if an older lowvram wrote the checkpoint; else None."""
        if is_sealed(self.manifest):
            return None
        return f"{self.directory} was saved by an older lowvram: its manifest has no checksum. The next save has one."

    @property
    def size_bytes(self) -> int:
        """Bytes that its files take on disk."""
        return sum(int(file["bytes"]) for file in self.manifest["files"].values())

    def weights(self) -> dict[str, Tensor]:
        """Return the model's tensors by name."""
        return self.map_weights().read_all()

    def map_weights(self) -> MappedTensors:
        """Return the model's tensors without loading any."""
        return MappedTensors(self.directory / WEIGHTS)

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors by name."""
        return self.map_state().read_all()

    def map_state(self) -> MappedTensors:
        """Return the optimizer's tensors without loading any."""
        return MappedTensors(self.directory / STATE)

    def numbers(self) -> dict[str, Any]:
        """Return step, tokens and the other plain values of the training state."""
        return _read_json(self.directory / NUMBERS)

    def config(self) -> dict[str, Any]:
        """Return the run configuration, as plain tables."""
        return _read_json(self.directory / CONFIG)


Check = Callable[[Checkpoint], object]


def open_checkpoint(directory: Path, needs_state: bool = True) -> Checkpoint:
    """Return a directory's checkpoint after comparing every file with its SHA-256.

    needs_state: False where the weights are enough; the optimizer's tensors may then be missing, and are not read.
    Raises CheckpointError naming the file that is missing, altered or of a newer format.
    """
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        if name == STATE and not needs_state:
            continue
        path = directory / name
        refuse_linked(path)
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.", f"The manifest lists it with {entry['bytes']} bytes.")
        if path.stat().st_size != entry["bytes"]:
            what = f"{path} has {path.stat().st_size} bytes."
            raise CheckpointError(what, f"The manifest says {entry['bytes']}.")
        with explain_bad_drive(path):
            digest = sha256(path)
        if digest != entry["sha256"]:
            raise CheckpointError(f"{path} was altered.", "Its SHA-256 is not the manifest's.")
    checkpoint = Checkpoint(directory, manifest)
    _check_contents(checkpoint, needs_state)
    return checkpoint


def _check_contents(checkpoint: Checkpoint, needs_state: bool) -> None:
    """Raise CheckpointError where files have the right SHA-256 but are of another step or another format."""
    step = checkpoint.numbers().get("step")
    if step != checkpoint.step or isinstance(step, bool):
        why = f"The manifest says {checkpoint.step}."
        raise CheckpointError(f"{checkpoint.directory / NUMBERS} is of step {step!r}.", why)
    checkpoint.config()
    checkpoint.map_weights()
    if needs_state:
        checkpoint.map_state()


def find_checkpoint(
    path: Path, needs_state: bool = True, check: Check | None = None
) -> tuple[Checkpoint, list[CheckpointError]]:
    """Return the checkpoint that `path` is, or the newest whole one of the run directory `path`.

    needs_state: see `open_checkpoint`.  check: raises CheckpointError where a whole one cannot be used by the caller.
    The list holds the errors of newer checkpoints that were skipped.
    Raises CheckpointError if none is whole, or the newest is of a later lowvram.
    """
    if not path.is_dir():
        raise explain_no_directory(path)
    directories = list_checkpoints(path)
    if (path / MANIFEST).is_file() or (STEP_NAME.fullmatch(path.name) and not directories):
        return _open_checked(path, needs_state, check), []
    if not directories:
        raise explain_no_checkpoint(path, sorted({found.parent for found in path.glob("*/step-????????")}))
    checkpoint, skipped = _open_newest(directories, needs_state, check)
    return checkpoint, list(skipped.values())


class _RefusedError(CheckpointError):
    """A checkpoint is whole, but its reader cannot use it."""


def _open_checked(directory: Path, needs_state: bool, check: Check | None) -> Checkpoint:
    checkpoint = open_checkpoint(directory, needs_state)
    try:
        if check is not None:
            check(checkpoint)
    except OtherVersionError:
        raise
    except CheckpointError as problem:
        raise _RefusedError(problem.what, problem.why, problem.fix) from problem
    return checkpoint


def _open_newest(
    directories: list[Path], needs_state: bool, check: Check | None
) -> tuple[Checkpoint, dict[Path, CheckpointError]]:
    """Return the first of the directories that is whole, and what is wrong with those before it."""
    problems: dict[Path, CheckpointError] = {}
    for directory in directories:
        try:
            _refuse_linked_step(directory)
            return _open_checked(directory, needs_state, check), problems
        except OtherVersionError:
            raise
        except CheckpointError as problem:
            problems[directory] = problem
    why = " ".join(str(problem) for problem in problems.values())
    raise CheckpointError(f"No checkpoint in {directories[0].parent} is whole.", why)


def _refuse_linked_step(directory: Path) -> None:
    try:
        refuse_linked(directory)
    except CheckpointError as problem:  # not damaged, so retention must not delete the user's link
        raise _RefusedError(problem.what, problem.why, problem.fix) from problem


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except JsonError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run directory.

    keep: how many of the newest are kept.  milestone_steps: every multiple of it is kept for good.
    budget_bytes: while all checkpoints together are larger, the oldest is deleted, milestones last, never the newest.
    """

    run: Path
    keep: int = 2
    milestone_steps: int | None = None
    budget_bytes: int | None = None
    disk: Disk = DISK
    # Checkpoints that `latest` skipped; retention does not count them.  The next save deletes the damaged ones; those
    # that are whole stay until a save of the same step replaces them, since another version may read them.
    _corrupt: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)
    _refused: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def reserve(self) -> Reserve:
        """The space that is kept for the last save."""
        return Reserve(self.run, self.disk)

    def latest(self, check: Check | None = None) -> tuple[Checkpoint | None, list[CheckpointError]]:
        """Return the newest whole checkpoint, or None where none was written, and the errors of the skipped ones.

        check: see `find_checkpoint`.
        Raises CheckpointError where there are checkpoints and none of them is whole, or the newest is of a later
        lowvram.
        """
        directories = list_checkpoints(self.run)
        if not directories:
            return None, []
        checkpoint, skipped = _open_newest(directories, True, check)
        for directory, problem in skipped.items():
            (self._refused if isinstance(problem, _RefusedError) else self._corrupt).add(directory)
        return checkpoint, list(skipped.values())

    def at(self, step: int, check: Check | None = None) -> Checkpoint:
        """Return the checkpoint of a step; check: see `find_checkpoint`.  Raises CheckpointError if it is damaged."""
        return _open_checked(self.run / _NAME.format(step), True, check)

    def numbers_by_step(self, up_to: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the step and the plain values of each checkpoint of at most `up_to`, newest first; reads no tensors."""
        for directory in list_checkpoints(self.run):
            if step_of(directory) > up_to:
                continue
            try:
                yield step_of(directory), _read_json(directory / NUMBERS)
            except (OSError, CheckpointError):
                continue  # opening the checkpoint reports what is wrong with it

    def newest_step(self, accepts: Callable[[dict[str, Any]], bool], up_to: int) -> int | None:
        """Return the newest step, at most `up_to`, whose state.json `accepts` accepts; reads no other file."""
        return next((step for step, numbers in self.numbers_by_step(up_to) if accepts(numbers)), None)

    def clear_leftovers(self) -> None:
        """Remove what killed writes and deletions left behind, of any step; only the run's owner may call it."""
        for path in self.run.glob("*"):
            if _LEFTOVER.fullmatch(path.name) and path.is_dir():
                self.disk.remove_tree(path, ignore_errors=True)
            # A thread of this process, or `lowvram pause` in another one, may be writing one just now.
            elif (torn := _TORN_FILE.fullmatch(path.name)) and not psutil.pid_exists(int(torn[1])):
                self.disk.delete(path)

    def save(
        self,
        weights: dict[str, Tensor],
        state: dict[str, Tensor],
        numbers: dict[str, Any],
        config: dict[str, Any],
        tokenizer: Path,
        hashes: dict[str, str],
        stays: int | None = None,
        best: int | None = None,
    ) -> Checkpoint:
        """Write step `numbers["step"]` beside its final name, sync it, rename it, and delete what is not to be kept.

        hashes: of the training data and the tokenizer, written to the manifest.  stays: a step whose checkpoint is kept
        in any case.  best: a step whose checkpoint is kept as far as the budget allows.  Where the drive is full, the
        reserved space is given back and the checkpoint written into it.
        Raises DiskFullError where that is too little, and BusyError where Windows cannot replace the same step since a
        process has it open.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        self.clear_leftovers()
        final = self.run / _NAME.format(numbers["step"])
        draft = name_beside(final, "tmp")
        needed = size_of_tensors(weights, state)
        try:
            with explain_full_disk(self.run, needed):
                if free_bytes(self.run) < needed:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(draft))
                draft.mkdir()
                write_tensors(draft / WEIGHTS, weights, self.disk)
                write_tensors(draft / STATE, state, self.disk)
                self.disk.write(draft / NUMBERS, _to_json(numbers))
                self.disk.write(draft / CONFIG, _to_json(config))
                for name in TOKENIZER_FILES:
                    self.disk.write(draft / name, (tokenizer / name).read_bytes())
                manifest = _manifest(draft, int(numbers["step"]), hashes)
                self.disk.write(draft / MANIFEST, _to_json(manifest))
                self.disk.sync_directory(draft)
                if final.exists() and not self.disk.delete_unless_in_use(final):
                    raise BusyError(f"{final} cannot be replaced.", "Another process has it open.", "End that one.")
                self.disk.rename(draft, final)
                self._delete_old(final, stays, best)
        except (OSError, DiskFullError, BusyError) as error:
            self.disk.remove_tree(draft, ignore_errors=True)
            if isinstance(error, DiskFullError) and self.reserve.give_back():
                return self.save(weights, state, numbers, config, tokenizer, hashes, stays, best)
            raise
        return Checkpoint(final, manifest)

    def tidy(self, step: int, stays: int | None = None, best: int | None = None) -> None:
        """Delete what is not to be kept beside the newest checkpoint, of `step`: what a kill right after its save left.

        stays, best: see `save`.
        """
        newest = self.run / _NAME.format(step)
        if newest.is_dir():
            self._delete_old(newest, stays, best)

    def _delete_old(self, newest: Path, stays: int | None, best: int | None) -> None:
        self._refused.discard(newest)
        settled = {newest, *self._refused}
        others = [path for path in list_checkpoints(self.run) if path not in settled and step_of(path) != stays][::-1]
        # A checkpoint above the step just saved was skipped, or the run would have gone on from it.
        lost = [path for path in others if path in self._corrupt or step_of(path) > step_of(newest)]
        old = [path for path in others if path not in lost]
        too_many = old[: max(0, len(old) - (self.keep - 1))]
        doomed = [path for path in too_many if not self._is_milestone(path) and step_of(path) != best]
        if self.budget_bytes is not None:
            size = {path: _size_of(path) for path in [*old, newest]}
            left = sum(size.values()) - sum(size[path] for path in doomed)
            # Milestones are deleted late, older ones before newer ones; then the best; and the newest never.
            for path in sorted(old, key=lambda path: (step_of(path) == best, self._is_milestone(path))):
                if left > self.budget_bytes and path not in doomed:
                    doomed.append(path)
                    left -= size[path]
        for path in (*lost, *doomed):
            # One that a process has open on Windows is tried again at the next save.
            self.disk.delete_unless_in_use(path)
        self._corrupt.discard(newest)

    def _is_milestone(self, path: Path) -> bool:
        return self.milestone_steps is not None and step_of(path) % self.milestone_steps == 0


def _size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _manifest(directory: Path, step: int, hashes: dict[str, str]) -> dict[str, Any]:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(directory.iterdir())}
    versions = {"lowvram": lowvram.__version__, "torch": str(torch.__version__)}
    return seal({"format": FORMAT, "step": step, "versions": versions, "hashes": hashes, "files": files})
