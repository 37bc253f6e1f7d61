"""Saves a run: when, into which space, and what is never saved; knows no step and no data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import sleep
from typing import Any

from lowvram.config.run_file import to_portable
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DiskFullError
from lowvram.storage.checkpoint import Store, size_of_files
from lowvram.storage.reserve import explain_too_little_room
from lowvram.storage.tensor_files import size_of_tensors
from lowvram.train.divergence import explain_broken_weights, find_not_finite
from lowvram.train.environment import KEY as CONDITIONS
from lowvram.train.environment import current_environment
from lowvram.train.events import Doing, Paused, Resumed, Saved
from lowvram.train.late_read import Pace
from lowvram.train.start import RunLock
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

    def _save_is_due(self) -> bool:
        run, waited_s = self.config.run, time.monotonic() - self._saved_at
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
        if not self.store.reserve.take(self._size_of_save()):
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
        """Save; where the drive is so full that even the reserved space is gone, wait for room first."""
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
        self._refuse_lost_lock()
        self.doing = "saving"
        weights, states = self.state.tensors()
        if broken := find_not_finite(weights | states):
            rate = self.config.train.optimizer.lr
            raise explain_broken_weights(broken, self.state.step, self._healthy_step, rate)
        checkpoint = self.store.save(
            weights,
            states,
            self.state.numbers() | {"plan": self.plan.model_dump(), CONDITIONS: self._conditions()},
            to_portable(self.config, self.config.run.dir),
            self.tokenizer.directory,
            self.hashes,
            None if is_healthy(self.state.numbers()) else self._healthy_step,
        )
        if is_healthy(self.state.numbers()):
            self._healthy_step = self.state.step
        self._saved_step, self._saved_at = self.state.step, time.monotonic()
        return Saved(self.state.step, checkpoint.directory, self._saved_at - began)
