"""Saves a run: when, into which space, and what is never saved; knows no step and no data."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import sleep
from typing import Any

from lowvram.config.run_file import to_portable
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import BusyError, DiskFullError
from lowvram.storage.checkpoint import Checkpoint, Store, size_of_files
from lowvram.storage.reserve import explain_too_little_room
from lowvram.storage.tensor_files import size_of_tensors
from lowvram.train.background_save import BackgroundSave, Snapshot, may_copy, take_snapshot
from lowvram.train.best_checkpoint import KEY as VALID
from lowvram.train.best_checkpoint import BestCheckpoint, better_of
from lowvram.train.conditions import KEY as CONDITIONS
from lowvram.train.divergence import explain_broken_weights, find_not_finite
from lowvram.train.environment import compare_environments, current_environment
from lowvram.train.events import Doing, Paused, Resumed, Saved
from lowvram.train.late_read import Pace
from lowvram.train.start import RunLock, describe_allowed
from lowvram.train.state import is_healthy
from lowvram.train.step_launcher import StepLauncher

# A paused run asks so often whether there is room again.
ROOM_ASKED_EVERY_S = 5.0


@dataclass
class RunSaver(StepLauncher):
    """A run that can save itself.

    allow: which changes since the last save are accepted.  doing: the work in progress; other threads may read it.
    """

    tokenizer: Tokenizer
    store: Store
    hashes: dict[str, str]
    lock: RunLock | None = None
    allow: tuple[str, ...] = ()
    doing: Doing = field(default="starting", init=False)
    _stopping: bool = field(default=False, init=False)
    _saved_step: int = field(default=-1, init=False)
    _healthy_step: int | None = field(default=None, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _size_bytes: int | None = field(default=None, init=False)
    _pace: Pace = field(default_factory=Pace, init=False)
    _background: BackgroundSave = field(default_factory=BackgroundSave, init=False)
    # Of the save in the background: when it was begun, and how long training stood still for the copy.
    _began_save_at: float = field(default=0.0, init=False)
    _held_s: float = field(default=0.0, init=False)
    _last_valid: tuple[int, float] | None = field(default=None, init=False)  # step and bits per byte
    _best: BestCheckpoint | None = field(default=None, init=False)

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint that this run has written or read; None before the first."""
        return self._saved_step if self._saved_step >= 0 else None

    def stop(self) -> None:
        """Tell the loop to save and end after the step in progress."""
        self._stopping = True

    def _conditions(self) -> dict[str, Any]:
        device, backend = self.state.model.embedding.device, self.config.train.optimizer.backend
        return current_environment(device, backend, self.plan)

    def _notices(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        other = compare_environments(checkpoint.numbers().get(CONDITIONS), self._conditions())
        allowed = describe_allowed(self.config, self.hashes, checkpoint)
        return tuple(sentence for sentence in (checkpoint.notice, allowed, other) if sentence)

    def _save_is_due(self) -> bool:
        run, waited_s = self.config.run, time.monotonic() - self._saved_at
        if self._background.is_busy:
            return False
        # While steps are skipped nothing is learnt, and a new checkpoint would only replace a healthy one.
        if waited_s < run.save_interval_s(0) or self.state.skipped_in_row:
            return False  # decided first, because measuring the state is too slow for every step
        return waited_s >= run.save_interval_s(self._size_of_save())

    def _size_of_save(self) -> int:
        """Return the bytes of a checkpoint; measured once, after a step, because it copies experts to host memory."""
        if self._size_bytes is None:
            self._size_bytes = size_of_tensors(*self.state.tensors()) + size_of_files(self.tokenizer.directory)
        return self._size_bytes

    def _keep_room(self) -> Iterator[Paused | Resumed]:
        """Reserve space for the next save; where the drive has none, wait until it has, or the run is to stop."""
        self._refuse_lost_lock()
        if not self._stopping and not self.store.reserve.take(self._size_of_save()):
            yield from self._wait_for_room()

    def _wait_for_room(self) -> Iterator[Paused | Resumed]:
        size_bytes, began = self._size_of_save(), time.monotonic()
        self.doing = "waiting for room on the disk"
        yield Paused(self.state.step, explain_too_little_room(self.store.run, size_bytes))
        while not self._stopping:
            sleep(ROOM_ASKED_EVERY_S)
            self._refuse_lost_lock()
            if self.store.reserve.take(size_bytes):
                yield Resumed(self.state.step, time.monotonic() - began)
                break
        self._pace.begin(self.state.tokens)

    def _refuse_lost_lock(self) -> None:
        if self.lock is not None:
            self.lock.refuse_lost()

    def _save(self) -> Iterator[Saved | Paused | Resumed]:
        """Save before the next step; where the drive is so full that even the reserve is gone, wait for room first."""
        while True:
            try:
                yield self._save_now()
                return
            except DiskFullError:
                if self._stopping:
                    raise
            yield from self._wait_for_room()

    def _save_now(self) -> Saved:
        began = time.monotonic()
        self.doing = "saving"
        checkpoint = self._prepare_save()()
        took_s = time.monotonic() - began
        return self._record_save(checkpoint, took_s, held_s=took_s)

    def _begin_save(self) -> Iterator[Saved | Paused | Resumed]:
        """Save in the background where a copy of the state fits into host memory, else before the next step."""
        if not may_copy(self._size_of_save()):
            yield from self._save()
            yield from self._keep_room()
            return
        self._began_save_at = time.monotonic()
        self.doing = "saving"
        self._background.begin(self._prepare_save(copied=True))
        self._held_s = time.monotonic() - self._began_save_at

    def _end_save(self) -> Iterator[Saved | Paused | Resumed]:
        """Wait for the save in the background, if there is one; where it failed, save what is new before any step."""
        if not self._background.is_busy:
            return
        began = time.monotonic()
        self.doing = "saving"
        try:
            checkpoint = self._background.take()
        except DiskFullError:
            if self._stopping:
                return  # the last save tries once more, and tells
            yield from self._wait_for_room()
            yield from self._save()
        except (OSError, BusyError):  # a drive that was away for a moment; where it still is, this save tells
            yield from self._save()
        else:
            ended = time.monotonic()
            yield self._record_save(checkpoint, ended - self._began_save_at, self._held_s + ended - began)
        yield from self._keep_room()

    def _prepare_save(self, copied: bool = False) -> Callable[[], Checkpoint]:
        """Return the work that writes the state as it is now.  copied: later steps may change the state meanwhile."""
        self._refuse_lost_lock()
        further: dict[str, Any] = {"plan": self.plan.model_dump(), CONDITIONS: self._conditions()}
        if self._last_valid is not None:
            further[VALID] = list(self._last_valid)
        snapshot = take_snapshot(self.state, **further)
        self._best = better_of(self._best, snapshot.step, snapshot.numbers)
        return functools.partial(self._write, snapshot.copy() if copied else snapshot, self._healthy_step, self._best)

    def _write(self, snapshot: Snapshot, healthy_step: int | None, best: BestCheckpoint | None) -> Checkpoint:
        """Write a checkpoint; runs beside training, so it reads nothing that a step changes."""
        if broken := find_not_finite(snapshot.weights | snapshot.states):
            raise explain_broken_weights(broken, snapshot.step, healthy_step, self.config.train.optimizer.lr)
        return self.store.save(
            snapshot.weights,
            snapshot.states,
            snapshot.numbers,
            to_portable(self.config, self.config.run.dir),
            self.tokenizer.directory,
            self.hashes,
            stays=None if is_healthy(snapshot.numbers) else healthy_step,
            best=self._step_of(best),
        )

    def _step_of(self, best: BestCheckpoint | None) -> int | None:
        """Return the step of the best checkpoint where it is kept."""
        return best.step if best is not None and self.config.run.keep_best else None

    def _record_save(self, checkpoint: Checkpoint, took_s: float, held_s: float) -> Saved:
        if is_healthy(checkpoint.numbers()):
            self._healthy_step = checkpoint.step
        self._saved_step, self._saved_at = checkpoint.step, time.monotonic()
        return Saved(checkpoint.step, checkpoint.directory, took_s, held_s)
