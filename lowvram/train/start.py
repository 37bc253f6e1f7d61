"""Checks before a run starts or resumes: no other process uses its directory, and its configuration has not changed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic import ValidationError

from lowvram.config.base import differences
from lowvram.config.plan import Plan, Recompute, choose_plan
from lowvram.config.run import RunConfig
from lowvram.config.train import TrainConfig
from lowvram.errors import BusyError, CheckpointError, ConfigError, argument
from lowvram.generate.saved_run import saved_config
from lowvram.storage.checkpoint import Checkpoint, find_checkpoint
from lowvram.storage.disk import DISK, Disk, name_beside
from lowvram.storage.json_files import JsonError, read_object
from lowvram.storage.links import refuse_link

_PLAN = "plan.json"
# The model settings that a run may change when it starts from another run's weights.
_ADJUSTABLE = ("positions.yarn", "window", "ffn.balance_rate")
# The settings that may differ when a run resumes: paths (train.start_from is not needed any more), what is saved and
# reported, how long the run goes on, whether spikes are skipped, and what steps the optimizer's states.
_FREE = ("run.", "data.", "train.tokens", "train.start_from", "train.skip_spikes", "train.optimizer.backend")
# A network or USB drive may be unavailable for a moment.
_RETRY_AFTER_S = 2.0


# The changes that a user may allow, and those of the hashes in a manifest.
ALLOWABLE = ("data", "tokenizer")
_KIND_OF = {"training data": "data", "tokenizer": "tokenizer"}


class RunGoneError(BusyError):
    """The run directory was deleted or renamed.  place: where what was learnt can be saved instead."""

    def __init__(self, directory: Path, moved_to: Path | None) -> None:
        self.place = moved_to or name_beside(directory, "rescued")
        self._what = f"The run directory {directory} is gone."
        self._how = f"It was renamed to {moved_to}" if moved_to else "It was deleted, or its drive is gone,"
        super().__init__(
            self._what,
            f"{self._how} while this process was training in it; what was learnt is saved in {self.place}.",
            f"Rename that to {directory} and type the same command again.",
        )

    def unsaved(self) -> BusyError:
        """Return the error for the case that nothing could be saved in `place` either."""
        why = f"{self._how} while this process was training in it, and nothing could be saved in {self.place}."
        return BusyError(self._what, why, "Bring the directory back and type the same command again.")


class RunLock:
    """The lock that this process holds on a run directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / "lock")
        self._identity: tuple[int, int] | None = None
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock, or raise BusyError naming the process that trains in the directory."""
        owner = self._directory / "owner"
        for path in (owner, self._directory / "lock"):
            refuse_link(path)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            who = owner.read_text(encoding="utf-8", errors="replace").strip() if owner.exists() else "unknown"
            raise BusyError(
                f"Another process is training in {self._directory}.",
                f"Its process id is {who}.",
                "Stop that one first (Ctrl-C saves), or give this run another run.dir.",
            ) from error
        self._identity = self._read_identity()
        if self._handle is None and sys.platform != "win32":
            self._handle = os.open(self._directory, os.O_RDONLY)
        owner.write_text(f"{os.getpid()}\n", encoding="utf-8")

    def refuse_lost(self) -> None:
        """Raise RunGoneError where the run directory is gone, BusyError where another process has locked it since.

        Where the lock file alone was deleted, it is taken again.
        """
        identity = self._read_identity()
        if identity is not None and identity == self._identity:
            return
        if not self._directory.is_dir():
            time.sleep(_RETRY_AFTER_S)
            identity = self._read_identity()
            if identity is not None and identity == self._identity:
                return
        if not self._directory.is_dir():
            raise RunGoneError(self._directory, self._find_moved())
        self._lock.release()
        self._lock = FileLock(self._directory / "lock")
        self.acquire()

    def release(self) -> None:
        """Release the lock; the directory may be gone."""
        if self._lock.is_locked:  # else the owner file may belong to another process by now
            (self._directory / "owner").unlink(missing_ok=True)
        self._lock.release()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _find_moved(self) -> Path | None:
        """Return what the run directory is called now; None where it was deleted or the system does not tell."""
        if self._handle is None:
            return None
        try:
            if sys.platform == "darwin":
                import fcntl

                name = fcntl.fcntl(self._handle, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0").decode()
            else:
                name = os.readlink(f"/proc/self/fd/{self._handle}")
            own, there = os.fstat(self._handle), os.stat(name)
        except (OSError, AttributeError):  # no /proc, or nothing there: it was deleted
            return None
        return Path(name) if (own.st_ino, own.st_dev) == (there.st_ino, there.st_dev) else None

    def _read_identity(self) -> tuple[int, int] | None:
        """Return the inode and the device of the lock file; None where there is no lock file."""
        try:
            status = os.stat(self._directory / "lock")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return self._identity  # the drive does not answer, which says nothing about the file
        return status.st_ino, status.st_dev


@contextmanager
def lock_run(directory: Path) -> Iterator[RunLock]:
    """Lock a run directory; raises BusyError naming the process that trains in it.  Even kill -9 releases the lock."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(directory)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


class Change(NamedTuple):
    """A difference between a checkpoint's run and this one, in words.  kind: one of ALLOWABLE, empty for the others."""

    says: str
    kind: str = ""


def list_changes(config: RunConfig, hashes: dict[str, str], checkpoint: Checkpoint) -> list[Change]:
    """Return how the model, recipe, data and tokenizer of `config` differ from those of a checkpoint."""
    saved = saved_config(checkpoint)
    changed = [
        Change(f"{key} was {before!r} and is now {now!r}")
        for key, before, now in differences(saved, config)
        if not key.startswith(_FREE)
    ]
    weights_then, weights_now = ([corpus.weight for corpus in each.data.train] for each in (saved, config))
    if weights_then != weights_now:
        changed.append(Change(f"the weights in data.train were {weights_then} and are now {weights_now}", "data"))
    saved_hashes = checkpoint.manifest.get("hashes", {})
    for name, value in hashes.items():
        if saved_hashes.get(name, value) != value:
            changed.append(Change(f"the {name} has other contents", _KIND_OF[name]))
    return changed


def refuse_changes(
    config: RunConfig, hashes: dict[str, str], checkpoint: Checkpoint, allow: Collection[str] = ()
) -> None:
    """Raise ConfigError if a checkpoint was of another model, recipe, data or tokenizer than `config` says.

    allow: the kinds of change that are accepted.
    """
    changed = list_changes(config, hashes, checkpoint)
    if all(change.kind in allow for change in changed):
        return
    kinds = sorted({change.kind for change in changed})
    accept = "" if "" in kinds else f"; {argument('allow', kinds)} goes on all the same"
    raise ConfigError(
        f"The run in {config.run.dir} was started differently:",
        "; ".join(change.says for change in changed) + ".",
        f"Put that back to go on, or choose a new run.dir (with train.start_from to begin from these weights){accept}.",
    )


def describe_allowed(config: RunConfig, hashes: dict[str, str], checkpoint: Checkpoint) -> str | None:
    """Return a sentence about the changes with which a run goes on; None where there is none."""
    changed = list_changes(config, hashes, checkpoint)
    if not changed:
        return None
    says = "; ".join(change.says for change in changed)
    return f"Changed as you allowed: {says}. The run goes on; no other run can equal it to the bit any more."


def refuse_other_model(config: RunConfig, hashes: dict[str, str], origin: Checkpoint) -> None:
    """Raise ConfigError if start_from's weights do not fit `config`: they are of another model or another tokenizer.

    Equal shapes are not enough: the same matrices may be split into other heads, or the rows belong to other tokens.
    """
    saved = saved_config(origin)
    changed = [
        f"model.{key} was {before!r} and is now {now!r}"
        for key, before, now in differences(saved.model, config.model)
        if not key.startswith(_ADJUSTABLE)
    ]
    if origin.manifest.get("hashes", {}).get("tokenizer", hashes["tokenizer"]) != hashes["tokenizer"]:
        changed.append("its tokenizer is another one")
    if changed:
        raise ConfigError(
            f"train.start_from names {origin.directory}, which is another model:",
            "; ".join(changed) + ".",
            "Make [model] and data.tokenizer equal to that run's; only yarn, window and balance_rate may differ.",
        )


class ResolvedPlan(NamedTuple):
    """A plan and the reason for it.  is_kept: it is the run's plan so far, except for what the user requested."""

    plan: Plan
    reason: str
    is_kept: bool


def resolve_plan(
    directory: Path,
    train: TrainConfig,
    micro_batch: int | None = None,
    recompute: Recompute | None = None,
    compiled: bool | None = None,
    choose: Callable[[int | None, Recompute | None], tuple[Plan, str]] | None = None,
) -> ResolvedPlan:
    """Return the run's plan: its existing one or a new one, changed by the requested values (those that are not None).

    choose: makes the plan of a new run for the requested micro-batch and recomputation (default: `choose_plan`).
    Raises ConfigError for a micro_batch that does not divide the step.
    """
    kept, is_torn = _plan_so_far(directory, train)
    plan, reason = choose_plan(train, micro_batch)
    requested: dict[str, Any] = {"recompute": recompute, "compile": compiled}
    if micro_batch is not None:
        requested |= {"micro_batch": plan.micro_batch, "accumulate": plan.accumulate}
    if kept is not None:
        plan, reason = kept, reason if micro_batch is not None else "this run's plan so far"
        if is_torn:
            reason += f"; {_PLAN} cannot be read, so it is that of the last checkpoint"
    elif choose is not None:
        plan, reason = choose(micro_batch, recompute)
    if kept is None and is_torn:
        reason += f"; {_PLAN} cannot be read, so it is chosen anew"
    plan = plan.model_copy(update={name: value for name, value in requested.items() if value is not None})
    return ResolvedPlan(plan, reason, kept is not None)


def _plan_so_far(directory: Path, train: TrainConfig) -> tuple[Plan | None, bool]:
    """Return the plan in the run directory, or that of its newest checkpoint, and whether the file cannot be read.

    The plan is None where neither fits the batch of a step.  The file is written when the run begins and whenever its
    micro-batch is halved, so it is never older than a checkpoint's plan, which is used where the file was lost.
    """
    path, is_torn = directory / _PLAN, False
    plan: Plan | None
    try:
        plan = Plan.model_validate(read_object(path))
    except FileNotFoundError:
        plan = _saved_plan(directory)
    except (JsonError, ValidationError):
        plan, is_torn = _saved_plan(directory), True
    if plan is None or plan.micro_batch * plan.accumulate != train.batch_samples:
        return None, is_torn
    # A step that updates during backward has a single micro-batch, so an older plan with several does not fit.
    return (plan if plan.micro_batch in train.micro_batches else None), is_torn


def _saved_plan(directory: Path) -> Plan | None:
    try:
        checkpoint, _ = find_checkpoint(directory)
        return Plan.model_validate(checkpoint.numbers()["plan"])
    except (CheckpointError, KeyError, ValidationError):
        return None  # nothing was saved yet, or by another version; corrupt files are reported when the run resumes


def keep_plan(directory: Path, plan: Plan, disk: Disk = DISK) -> None:
    """Save the plan of a run that has really begun, so that it resumes with the same one."""
    disk.write(directory / _PLAN, plan.model_dump_json(indent=1).encode())
