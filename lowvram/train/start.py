"""What must be true before a run starts or goes on: the directory is free, the question is still the same one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic import ValidationError

import lowvram
from lowvram.config.base import differences
from lowvram.config.plan import Plan, Recompute, choose_plan
from lowvram.config.run import RunConfig
from lowvram.config.run_file import from_portable
from lowvram.config.train import TrainConfig
from lowvram.errors import BusyError, CheckpointError, ConfigError
from lowvram.generate.weights import CheckpointReader, refuse_other_tensors
from lowvram.storage.checkpoint import Checkpoint, find_checkpoint
from lowvram.storage.disk import DISK, Disk
from lowvram.storage.json_files import JsonError, read_object
from lowvram.storage.manifest import CONFIG, OtherVersionError

_PLAN = "plan.json"
# What a further stage may change about a model whose weights it takes over.
_ADJUSTABLE = ("positions.yarn", "window", "ffn.balance_rate")
# May differ between two starts: where things lie (a run that goes on needs its origin no more), what is kept and
# told, and how long the run goes on.
_FREE = ("run.", "data.", "train.tokens", "train.start_from")
# What pydantic calls a key, a kind or a choice that this version does not know.
_LATER = ("extra_forbidden", "union_tag_invalid", "literal_error")
# A network or USB drive may be away for a moment.
_AWAY_S = 2.0


class RunLock:
    """The lock that this process holds on a run directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / "lock")
        self._identity: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Take it, or raise BusyError naming the process that trains in the directory."""
        owner = self._directory / "owner"
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            who = owner.read_text(encoding="utf-8", errors="replace").strip() if owner.exists() else "unknown"
            raise BusyError(
                f"Another process is training in {self._directory}.",
                f"Its process id is {who}.",
                "Stop that one first (Ctrl-C saves), or give this run another run.dir.",
            ) from error
        self._identity = self._found()
        owner.write_text(f"{os.getpid()}\n", encoding="utf-8")

    def refuse_lost(self) -> None:
        """Raise BusyError where the run directory is gone, or another process has taken it since.

        Where the lock file alone was deleted, it is taken again.
        """
        found = self._found()
        if found is not None and found == self._identity:
            return
        if not self._directory.is_dir():
            time.sleep(_AWAY_S)
            found = self._found()
            if found is not None and found == self._identity:
                return
        if not self._directory.is_dir():
            raise BusyError(
                f"The run directory {self._directory} is gone.",
                "It was deleted or renamed while this process was training in it, so nothing more was saved.",
                "If it was renamed, give it its name back and type the same command again.",
            )
        self._lock.release()
        self._lock = FileLock(self._directory / "lock")
        self.acquire()

    def release(self) -> None:
        """Give it back; the directory may be gone."""
        if self._lock.is_locked:  # else the note is another process's by now
            (self._directory / "owner").unlink(missing_ok=True)
        self._lock.release()

    def _found(self) -> tuple[int, int] | None:
        """Return what the lock file is now; None where there is none."""
        try:
            found = os.stat(self._directory / "lock")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return self._identity  # the drive does not answer, which says nothing about the file
        return found.st_ino, found.st_dev


@contextmanager
def lock_run(directory: Path) -> Iterator[RunLock]:
    """Hold a run directory; raises BusyError naming the process that trains in it.  Freed even by kill -9."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = RunLock(directory)
    lock.acquire()
    try:
        yield lock
    finally:
        lock.release()


def saved_config(checkpoint: Checkpoint) -> RunConfig:
    """Return the run that a checkpoint is of.

    Raises CheckpointError where there is no such run; OtherVersionError where another lowvram wrote it, which may know
    more keys and choices than this one.  A version number alone does not tell: it is the same for many commits.
    """
    is_later = False
    try:
        return from_portable(checkpoint.config(), checkpoint.directory.parent)
    except ValidationError as error:
        problems = error.errors()
        problem = next((one for one in problems if one["type"] in _LATER), problems[0])
        is_later = problem["type"] in _LATER
        why = f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}."
    except (ConfigError, AttributeError, TypeError) as error:  # a text or a list where a table belongs
        why = f"{error}."
    what = f"{checkpoint.directory / CONFIG} describes a run that this lowvram does not know."
    version = checkpoint.manifest["versions"].get("lowvram", "")
    if is_later or version != lowvram.__version__:
        which = f" to {version}, which wrote it" if version not in ("", lowvram.__version__) else ""
        raise OtherVersionError(what, why, f"Update lowvram{which}.")
    raise CheckpointError(what, f"{why}  This version wrote it, so it was altered.")


def check_readable(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where a checkpoint's weights are not those of the model that it describes."""
    refuse_other_tensors(CheckpointReader(checkpoint, saved_config(checkpoint).model))


def refuse_changes(what: RunConfig, hashes: dict[str, str], checkpoint: Checkpoint) -> None:
    """Raise ConfigError if a checkpoint was learnt from another model, recipe, data or tokenizer than `what` says."""
    was = saved_config(checkpoint)
    changed = [
        f"{key} was {before!r} and is now {now!r}"
        for key, before, now in differences(was, what)
        if not key.startswith(_FREE)
    ]
    weights_then, weights_now = ([corpus.weight for corpus in config.data.train] for config in (was, what))
    if weights_then != weights_now:
        changed.append(f"the weights in data.train were {weights_then} and are now {weights_now}")
    kept = checkpoint.manifest.get("hashes", {})
    changed += [f"the {name} has other contents" for name, value in hashes.items() if kept.get(name, value) != value]
    if changed:
        raise ConfigError(
            f"The run in {what.run.dir} was started differently:",
            "; ".join(changed) + ".",
            "Put that back to go on, or choose a new run.dir (with train.start_from to begin from these weights).",
        )


def refuse_other_model(what: RunConfig, hashes: dict[str, str], origin: Checkpoint) -> None:
    """Raise ConfigError if start_from's weights mean something else in `what`: another form, or another tokenizer.

    Equal shapes are not enough: the same matrices cut into other heads, or rows of other tokens, are no beginning.
    """
    was = saved_config(origin)
    changed = [
        f"model.{key} was {before!r} and is now {now!r}"
        for key, before, now in differences(was.model, what.model)
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


class Settled(NamedTuple):
    """A plan and why it is this one.  is_kept: it is the run's own so far, but for what was asked."""

    plan: Plan
    reason: str
    is_kept: bool


def settle_plan(
    directory: Path,
    train: TrainConfig,
    micro_batch: int | None = None,
    recompute: Recompute | None = None,
    compiled: bool | None = None,
    choose: Callable[[int | None, Recompute | None], tuple[Plan, str]] | None = None,
) -> Settled:
    """Return the run's plan: the one that it had or a new one, changed by what was asked for (what is not None).

    choose: makes a new run's plan around the micro-batch and the recomputation that were asked for (default:
    `choose_plan`).
    Raises ConfigError for a micro_batch that does not divide the step.
    """
    kept, is_torn = _plan_so_far(directory, train)
    plan, reason = choose_plan(train, micro_batch)
    asked_for: dict[str, Any] = {"recompute": recompute, "compile": compiled}
    if micro_batch is not None:
        asked_for |= {"micro_batch": plan.micro_batch, "accumulate": plan.accumulate}
    if kept is not None:
        plan, reason = kept, reason if micro_batch is not None else "this run's plan so far"
        if is_torn:
            reason += f"; {_PLAN} cannot be read, so it is that of the last checkpoint"
    elif choose is not None:
        plan, reason = choose(micro_batch, recompute)
    if kept is None and is_torn:
        reason += f"; {_PLAN} cannot be read, so it is chosen anew"
    plan = plan.model_copy(update={name: value for name, value in asked_for.items() if value is not None})
    return Settled(plan, reason, kept is not None)


def _plan_so_far(directory: Path, train: TrainConfig) -> tuple[Plan | None, bool]:
    """Return the plan in the run directory, or that of its newest checkpoint, and whether the file cannot be read.

    The plan is None where neither makes up the step.  The file is written when the run begins and whenever its
    micro-batch is halved, so it is never older than a checkpoint's plan; that one counts where the file was lost.
    """
    path, is_torn = directory / _PLAN, False
    try:
        plan = Plan.model_validate(read_object(path))
    except FileNotFoundError:
        plan = _saved_plan(directory)
    except (JsonError, ValidationError):
        plan, is_torn = _saved_plan(directory), True
    if plan is None or plan.micro_batch * plan.accumulate != train.batch_samples:
        return None, is_torn
    # A step that updates during backward takes what an older plan had cut as one.
    return (plan if plan.micro_batch in train.micro_batches else None), is_torn


def _saved_plan(directory: Path) -> Plan | None:
    try:
        checkpoint, _ = find_checkpoint(directory)
        return Plan.model_validate(checkpoint.numbers()["plan"])
    except (CheckpointError, KeyError, ValidationError):
        return None  # nothing was saved yet, or by another version; what is corrupt is said when the run resumes


def keep_plan(directory: Path, plan: Plan, disk: Disk = DISK) -> None:
    """Keep the plan of a run that has really begun, so that it goes on with the same one."""
    disk.write(directory / _PLAN, plan.model_dump_json(indent=1).encode())
