"""The training loop, as a generator of events; prints nothing, parses nothing, and does not choose the device."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.config.run_file import to_portable
from lowvram.data.loader import Loader
from lowvram.data.shards import ShardSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import DataError
from lowvram.generate.saved_run import check_readable
from lowvram.objective import Batch, count_targets
from lowvram.storage.checkpoint import Checkpoint, Store, find_checkpoint
from lowvram.train.compilation import compiled, forget_compiled
from lowvram.train.cuda_graph import CapturedPass
from lowvram.train.divergence import MOST_SKIPPED, explain_broken_weights, explain_divergence, find_not_finite
from lowvram.train.environment import KEY as CONDITIONS
from lowvram.train.environment import compare_environments, current_environment
from lowvram.train.events import Doing, Event, Halved, Rotated, Saved, Started, StepDone, Stopped
from lowvram.train.oom import (
    explain_out_of_memory,
    explain_out_of_memory_in_backward,
    explain_out_of_memory_in_update,
    explain_out_of_memory_in_validation,
    free_memory,
    halve,
    is_out_of_memory,
    memory_in_use,
)
from lowvram.train.optim import learning_rate
from lowvram.train.start import RunLock, refuse_changes, refuse_other_model
from lowvram.train.state import FIRST_LOSS_SCALE, TrainState, is_healthy
from lowvram.train.step import StepStats, add_gradients, discard, gradients, learn_in_backward, loss_for, update
from lowvram.train.validation import evaluate, evaluate_masters, write_sample


@dataclass
class Trainer:
    """`run()` trains until all tokens are seen or `stop()` is called, and yields events.

    The same `config`, `plan`, device and thread count give the same bits, however often the run is interrupted.  doing:
    the work in progress.  micro_batches_begun: those of the step in progress.  Other threads may read both at any time.
    """

    config: RunConfig
    plan: Plan
    state: TrainState
    loader: Loader
    tokenizer: Tokenizer
    store: Store
    hashes: dict[str, str]
    valid: ShardSet | None = None
    lock: RunLock | None = None
    captured_pass: CapturedPass | None = field(default=None, init=False)
    doing: Doing = field(default="starting", init=False)
    micro_batches_begun: int = field(default=0, init=False)
    _stopping: bool = field(default=False, init=False)
    _saved_step: int = field(default=-1, init=False)
    _healthy_step: int | None = field(default=None, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _size_bytes: int | None = field(default=None, init=False)
    _pace: list[tuple[float, int]] = field(default_factory=list, init=False)

    @property
    def saved_step(self) -> int | None:
        """The step of the newest checkpoint that this run has written or read; None before the first."""
        return self._saved_step if self._saved_step >= 0 else None

    def stop(self) -> None:
        """Tell the loop to save and end after the step in progress."""
        self._stopping = True

    def run(self) -> Iterator[Event]:
        """Resume if there is something to resume, then train."""
        yield self._begin()
        self._start_clock()
        while self.state.step < self.config.train.steps and not self._stopping:
            try:
                yield from self._advance()
                yield from self._validate_and_sample()
            except DataError:  # a shard was changed: the step has not begun
                yield from self._rescue()
                raise
            self._refuse_lost_lock()
            if self._save_is_due():
                yield self._save()
                yield from self._validate_masters()
        is_finished = self.state.step >= self.config.train.steps
        if self._saved_step != self.state.step:
            yield self._save()
            if is_finished:  # a user who stops a run should wait for the save only
                yield from self._validate_masters()
        yield Stopped(self.state.step, is_finished)

    def _begin(self) -> Started:
        self.store.clear_leftovers()
        checkpoint, passed_over = self.store.latest(self._check)
        began_from: Path | None = None
        if self.config.train.precision == "fp16":
            self.state.loss_scale = FIRST_LOSS_SCALE
        if checkpoint is not None:
            self.state.restore(checkpoint)
            self._saved_step = checkpoint.step
            self._healthy_step = self.store.newest_step(is_healthy, checkpoint.step)
        elif self.config.train.start_from is not None:
            origin, passed_over = find_checkpoint(self.config.train.start_from, False, check_readable)
            refuse_other_model(self.config, self.hashes, origin)
            self.state.take_weights(origin)
            began_from = origin.directory
        resumed_from = checkpoint.directory if checkpoint else None
        notices = self._notices(checkpoint) if checkpoint is not None else ()
        return Started(self.state.step, self.config.train.steps, resumed_from, tuple(passed_over), began_from, notices)

    def _notices(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        other = compare_environments(checkpoint.numbers().get(CONDITIONS), self._conditions())
        return tuple(sentence for sentence in (checkpoint.notice, other) if sentence)

    def _conditions(self) -> dict[str, Any]:
        return current_environment(self.state.model.embedding.device)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Raise ConfigError where a checkpoint is of another run, CheckpointError where its contents are invalid."""
        refuse_changes(self.config, self.hashes, checkpoint)
        self.state.check(checkpoint)

    def _start_clock(self) -> None:
        self._saved_at = time.monotonic()
        self._pace = [(time.monotonic(), self.state.tokens)]

    def _advance(self) -> Iterator[Halved | Rotated | Saved | StepDone]:
        train, state = self.config.train, self.state
        self.doing = "step"
        yield from self._rotate()
        rate = learning_rate(train, state.step)
        if train.update_during_backward:
            loss, norm, skipped = (yield from self._learn(rate)).stats.tolist()
        else:
            while (result := self._try_gradients()) is None:
                if halve(self.plan) is None:
                    yield from self._rescue()
                    raise explain_out_of_memory(self.plan, state.step, train)
                yield self._halve()
                self._pace = [(time.monotonic(), state.tokens)]  # the failed attempt must not count in the speed
            loss, norm, skipped = result.stats.tolist()
            if skipped:
                discard(state.optimizer)
            else:
                self._update(result, rate, min(1.0, train.clip / (norm + 1e-6)) / state.loss_scale)
        # Where weights are updated one by one during backward, some may have been updated all the same.
        is_partial = train.update_during_backward and skipped < state.optimizer.count and math.isfinite(loss)
        has_learnt = not skipped or is_partial
        state.update_loss_scale(not skipped, train.precision == "fp16", has_learnt)
        state.step += 1
        state.tokens += train.batch_tokens
        speed = self._measure_pace()
        left_s = (train.steps - state.step) * train.batch_tokens / speed
        memory = memory_in_use(state.model.embedding.device, self.captured_pass is not None)
        yield StepDone(state.step, state.tokens, loss, norm, rate, speed, memory, left_s, int(skipped))
        self._stop_if_diverged()

    def _rotate(self) -> Iterator[Rotated]:
        """Rotate to the next experts where a new interval begins."""
        rotation = self.state.rotation
        if rotation is None or rotation.interval == rotation.interval_of(self.state.step):
            return
        began = time.monotonic()
        try:
            rotation.rotate_to(rotation.interval_of(self.state.step))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise explain_out_of_memory_in_update(self.state.step, self.config.train) from error
        card, host = rotation.bytes_on()
        yield Rotated(self.state.step, tuple(sorted(rotation.window)), card, host, time.monotonic() - began)

    def _learn(self, rate: float) -> Generator[Saved, None, StepStats]:
        """Make a step that updates weights during backward; it cannot be retried where memory runs out in it."""
        train, state = self.config.train, self.state
        state.optimizer.has_stepped = False
        loss_of = loss_for(state.model, train, self.plan)
        (batch,) = self.micro_batches([0])
        try:
            with compiled(state.model) if self.plan.compile else nullcontext():
                return learn_in_backward(
                    state.model,
                    loss_of,
                    batch,
                    state.optimizer,
                    count_targets(batch),
                    rate,
                    train.clip,
                    state.loss_scale,
                )
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        step, saved = state.step, None
        if state.optimizer.has_stepped:
            saved = self._reload()
        else:
            yield from self._rescue()
        raise explain_out_of_memory_in_backward(self.plan, step, train, state.optimizer.has_stepped, saved)

    def _reload(self) -> int | None:
        """Load the last checkpoint again, because only some weights were updated; return its step."""
        discard(self.state.optimizer)
        free_memory(self.state.model.embedding.device)
        checkpoint, _ = self.store.latest(self._check)
        if checkpoint is None:
            return None
        self.state.restore(checkpoint)
        return checkpoint.step

    def _try_gradients(self) -> StepStats | None:
        """Return None where memory ran out; the error is dropped here, since its frames keep the tensors alive."""
        try:
            return self.accumulate()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _rescue(self) -> Iterator[Saved]:
        """Save the state before an error ends the run; only for errors that left weights and optimizer intact."""
        discard(self.state.optimizer)
        free_memory(self.state.model.embedding.device)
        if self.state.step not in (0, self._saved_step):
            yield self._save()

    def _halve(self) -> Halved:
        """Halve the micro-batch after a failed attempt; the same sequences are then run again, fewer at a time."""
        discard(self.state.optimizer)
        self.captured_pass = self.state.model.kept_casts = None
        if self.plan.compile:
            forget_compiled()
        free_memory(self.state.model.embedding.device)
        smaller = halve(self.plan)
        assert smaller is not None, "a plan that nothing makes smaller has ended the run before"
        self.plan = smaller
        return Halved(self.state.step, smaller.micro_batch, smaller.accumulate)

    def _update(self, stats: StepStats, rate: float, factor: float) -> None:
        try:
            update(self.state.model, self.state.optimizer, stats.loads, rate, factor)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise explain_out_of_memory_in_update(self.state.step, self.config.train) from error

    def accumulate(self, numbers: Sequence[int] | None = None) -> StepStats:
        """Put the gradients of the next step into `.grad`, or only those of the micro-batches with these numbers."""
        loss_of = loss_for(self.state.model, self.config.train, self.plan)
        batches = self.micro_batches(range(self.plan.accumulate) if numbers is None else numbers)
        targets = sum(count_targets(batch) for batch in batches)
        scale, seed = self.state.loss_scale, self.config.train.seed
        if self.captured_pass is not None:
            return gradients(
                self.state.model, loss_of, self._count(batches), targets, scale, seed, self.captured_pass.add
            )
        with compiled(self.state.model) if self.plan.compile else nullcontext():
            return gradients(self.state.model, loss_of, self._count(batches), targets, scale, seed)

    def _count(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for self.micro_batches_begun, batch in enumerate(batches, 1):
            yield batch

    def capture(self) -> None:
        """Capture a micro-batch's passes as a CUDA graph and use it from now on; only `.grad` is changed (dropped)."""
        state, train = self.state, self.config.train
        self.captured_pass = None
        (batch,) = self.micro_batches([0])
        add = functools.partial(add_gradients, state.model, loss_for(state.model, train, self.plan), train.seed)
        with compiled(state.model) if self.plan.compile else nullcontext():
            self.captured_pass = CapturedPass(state.model, add, batch, self.plan.accumulate > 1)

    def micro_batches(self, numbers: Sequence[int]) -> list[Batch]:
        """Return the next step's micro-batches with these numbers."""
        device = self.state.model.embedding.device
        first, count = self.state.step * self.config.train.batch_samples, self.plan.micro_batch
        starts = [first + number * count for number in numbers]
        return [
            Batch(
                self.loader.batch(start, count).to(device),
                torch.arange(start, start + count, device=device),
            )
            for start in starts
        ]

    def _stop_if_diverged(self) -> None:
        state, rate = self.state, self.config.train.optimizer.lr
        if state.skipped_in_row >= MOST_SKIPPED:
            raise explain_divergence(MOST_SKIPPED, state.step, self._healthy_step, rate)

    def _try(self, doing: Doing, make_event: Callable[[], Event]) -> Iterator[Event]:
        """Validate or sample once; where memory runs out, the state is saved before the run ends.

        First the CUDA graph, which holds memory, is dropped and the work tried again; the run is slower after that.
        """
        self.doing = doing
        for may_retry in (True, False):
            try:
                event = make_event()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                yield event
                return
            if not may_retry or self.captured_pass is None:
                break
            self.captured_pass = None
            free_memory(self.state.model.embedding.device)
        yield from self._rescue()
        raise explain_out_of_memory_in_validation(self.state.step)

    def _validate_and_sample(self) -> Iterator[Event]:
        run, step = self.config.run, self.state.step
        is_last = step == self.config.train.steps
        if self.valid is not None and (step % run.validate_every == 0 or is_last):
            yield from self._try("validating", functools.partial(evaluate, *self._valid_part()))
        if step % run.sample_every == 0 or is_last:
            for prompt in run.prompts:
                write = functools.partial(write_sample, self.config, self.state, self.tokenizer, prompt)
                yield from self._try("sampling", write)
        if step % run.validate_every == 0 or step % run.sample_every == 0:
            # The time of validation and sampling is not training time.
            self._pace = [(time.monotonic(), self.state.tokens)]

    def _validate_masters(self) -> Iterator[Event]:
        """Validate with the experts' masters, as they were just saved, where the card holds only copies of them."""
        if self.valid is not None and self.state.rotation is not None:
            validate = functools.partial(evaluate_masters, *self._valid_part(), self.state.rotation)
            yield from self._try("validating", validate)
            self._pace = [(time.monotonic(), self.state.tokens)]

    def _valid_part(self) -> tuple[RunConfig, TrainState, Tokenizer, ShardSet, int]:
        assert self.valid is not None, "callers have checked it"
        return self.config, self.state, self.tokenizer, self.valid, self.plan.micro_batch

    def _save_is_due(self) -> bool:
        run, waited_s = self.config.run, time.monotonic() - self._saved_at
        # While steps are skipped nothing is learnt, and a new checkpoint would only replace a healthy one.
        if waited_s < run.save_interval_s(0) or self.state.skipped_in_row:
            return False  # decided first, because measuring the state is too slow for every step
        if self._size_bytes is None:  # measured once, because it copies experts to host memory
            weights, states = self.state.tensors()
            self._size_bytes = sum(t.numel() * t.element_size() for t in (*weights.values(), *states.values()))
        return waited_s >= run.save_interval_s(self._size_bytes)

    def _refuse_lost_lock(self) -> None:
        if self.lock is not None:
            self.lock.refuse_lost()

    def _save(self) -> Saved:
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

    def _measure_pace(self) -> float:
        self._pace = [*self._pace[-20:], (time.monotonic(), self.state.tokens)]
        (began, tokens_then), (now, tokens) = self._pace[0], self._pace[-1]
        return (tokens - tokens_then) / max(1e-9, now - began)
