"""The training loop, as a generator of events; prints nothing, parses nothing, and does not choose the device."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from lowvram.config.run import RunConfig
from lowvram.data.shards import ShardSet
from lowvram.data.source_set import SourceSet
from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import CheckpointError, DataError, DiskFullError
from lowvram.generate.saved_run import check_readable
from lowvram.objective import Loss, count_targets
from lowvram.storage.checkpoint import Checkpoint, find_checkpoint
from lowvram.train.best_checkpoint import best_of, read_validation
from lowvram.train.compilation import compiled, forget_compiled
from lowvram.train.divergence import MOST_SKIPPED, explain_divergence, may_go_back
from lowvram.train.events import (
    Doing,
    Evaluated,
    Event,
    Halved,
    Recorded,
    Rotated,
    Started,
    StepDone,
    Stopped,
    WentBack,
)
from lowvram.train.guarded import GuardedRun
from lowvram.train.late_read import LateRead, Launched
from lowvram.train.loss_scale import FIRST_LOSS_SCALE
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
from lowvram.train.schedule import learning_rate
from lowvram.train.spikes import add_loss, is_spike, limit_for
from lowvram.train.start import RunGoneError, refuse_changes, refuse_other_model
from lowvram.train.state import TrainState, is_healthy
from lowvram.train.step import StepStats, discard, learn_in_backward, loss_for
from lowvram.train.validation import evaluate, evaluate_masters, write_sample


@dataclass
class Trainer(GuardedRun):
    """`run()` trains until all tokens are seen or `stop()` is called, and yields events.

    The same `config`, `plan`, device and thread count give the same bits, however often the run is interrupted.
    reads_late: a step's numbers are read, and its event comes, when the next step has been launched.
    """

    valid: ShardSet | SourceSet | None = None
    reads_late: bool = field(default=False, init=False)
    _launched: Launched | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        device = self.state.model.embedding.device
        self.reads_late = device.type == "cuda" and not self.config.train.update_during_backward

    def run(self) -> Iterator[Event]:
        """Resume if there is something to resume, then train; where the run directory goes, save elsewhere and end."""
        try:
            yield self._begin()
            self._start_clock()
            yield from self._train()
        except RunGoneError as gone:
            try:
                yield from self._rescue_in(gone.place)
            except (OSError, DiskFullError) as error:
                raise gone.unsaved() from error
            raise
        finally:
            self._background.close()

    def _train(self) -> Iterator[Event]:
        while self.state.step < self.config.train.steps and not self._stopping:
            yield from self._hold()
            if self._stopping:  # it was asked to while it waited
                break
            try:
                yield from self._advance()
                yield from self._validate_and_sample()
            except DataError:  # a shard was changed: the step has not begun
                yield from self._rescue()
                raise
            self._refuse_lost_lock()
            if self._size_bytes is None:  # an optimizer has no states before its first step
                yield from self._keep_room()
            if self._background.has_ended:
                yield from self._end_save()
            if self._save_is_due():
                yield from self._read_step()
                if not self.state.skipped_in_row:
                    yield from self._begin_save()
                    yield from self._validate_masters()
        yield from self._read_step()
        yield from self._end_save()
        is_finished = self.state.step >= self.config.train.steps
        if self._saved_step != self.state.step:
            yield from self._save()
            if is_finished:  # a user who stops a run should wait for the save only
                yield from self._validate_masters()
        else:
            self.store.tidy(self.state.step, self._healthy_step, self._step_of(self._best))
        self.store.reserve.give_back()
        yield Stopped(self.state.step, is_finished)

    def _begin(self) -> Started:
        self.store.clear_leftovers()
        checkpoint, passed_over = self.store.latest(self._check)
        began_from: Path | None = None
        if checkpoint is not None:
            self._take_first_scale()
            self._restore(checkpoint)
            self._saved_step = checkpoint.step
            self._healthy_step = self.store.newest_step(is_healthy, checkpoint.step)
            self._last_valid = read_validation(checkpoint.numbers())
            self._best = best_of(self.store.numbers_by_step(checkpoint.step))
        else:
            began_from, passed_over = self._begin_anew()
        resumed_from = checkpoint.directory if checkpoint else None
        notices = self._notices(checkpoint) if checkpoint is not None else ()
        return Started(self.state.step, self.config.train.steps, resumed_from, tuple(passed_over), began_from, notices)

    def _begin_anew(self) -> tuple[Path | None, list[CheckpointError]]:
        """Make the state that of a new run; return whose weights it begins with, and what was passed over for them."""
        self._take_first_scale()
        if self.config.train.start_from is None:
            return None, []
        origin, passed_over = find_checkpoint(self.config.train.start_from, False, check_readable)
        refuse_other_model(self.config, self.hashes, origin)
        self.state.take_weights(origin)
        return origin.directory, passed_over

    def _take_first_scale(self) -> None:
        if self.config.train.precision == "fp16":
            self.state.loss_scale = FIRST_LOSS_SCALE
        self.write_loss_scale()

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.recorder.forget()  # its graph reads states that are replaced
        self.state.restore(checkpoint)
        self.write_loss_scale()

    def _check(self, checkpoint: Checkpoint) -> None:
        """Raise ConfigError where a checkpoint is of another run, CheckpointError where its contents are invalid."""
        refuse_changes(self.config, self.hashes, checkpoint, self.allow)
        self.state.check(checkpoint)

    def _start_clock(self) -> None:
        self._saved_at = time.monotonic()
        self._pace.begin(self.state.tokens)

    def _advance(self) -> Iterator[Event]:
        train, state = self.config.train, self.state
        self.doing = "step"
        yield from self._rotate()
        rate, limit = learning_rate(train, state.step), limit_for(state.step + 1, state.losses)
        if train.update_during_backward:
            stats = (yield from self._learn(rate)).stats
        else:
            while (sums := self._try_gradients()) is None:
                yield from self._read_step()
                if halve(self.plan) is None:
                    yield from self._rescue()
                    raise explain_out_of_memory(self.plan, state.step, train)
                yield self._halve()
                self._pace.begin(state.tokens)  # the failed attempt must not count in the speed
            stats = self._update(sums, rate, limit)
        launched = Launched(state.step + 1, state.tokens + train.batch_tokens, rate, LateRead(stats), limit)
        went_back = yield from self._read_step()
        state.step, state.tokens = launched.step, launched.tokens
        self._launched = launched._replace(is_void=went_back)
        if not self.reads_late:
            yield from self._read_step()
        if self.recorder.news():
            yield Recorded(state.step, self.recorder.problem or "")

    def _read_step(self) -> Generator[Event, None, bool]:
        """Read the numbers of the step that was launched last, and tell of it; returns whether the run went back."""
        if self._launched is None:
            return False
        train, state = self.config.train, self.state
        (step, tokens, rate, stats, limit, is_void), self._launched = self._launched, None
        loss, norm, skipped = stats.values()
        above = limit if is_spike(loss, limit) else None
        if not is_void:
            # Where weights are updated one by one during backward, some may have been updated all the same.
            is_partial = train.update_during_backward and skipped < state.optimizer.count and math.isfinite(loss)
            has_learnt = not skipped or is_partial
            is_finite = not skipped or (train.skip_spikes and math.isfinite(loss + norm))
            state.update_loss_scale(is_finite, train.precision == "fp16", has_learnt)
            state.losses = add_loss(state.losses, step, loss, limit) if has_learnt else state.losses
        speed = self._pace.measure(tokens)
        left_s = (train.steps - step) * train.batch_tokens / speed
        memory = memory_in_use(state.model.embedding.device, self.captured_pass is not None)
        yield StepDone(step, tokens, loss, norm, rate, speed, memory, left_s, 1 if is_void else int(skipped), above)
        if state.skipped_in_row < MOST_SKIPPED:
            return False
        yield from self._end_save()
        yield self._go_back(step)
        return True

    def _go_back(self, step: int) -> WentBack:
        """Load the newest healthy checkpoint and go on behind `step`, or raise the error of a run that diverged."""
        run, state, healthy_step = self.config.run, self.state, self._healthy_step
        diverged = explain_divergence(
            MOST_SKIPPED, step, healthy_step, self.config.train.optimizer.lr, state.went_back_at, run.on_divergence
        )
        went = state.went_back_at, state.went_back_to
        if healthy_step is None or not may_go_back(run.on_divergence, healthy_step, *went):
            raise diverged
        try:
            checkpoint = self.store.at(healthy_step, self._check)
        except CheckpointError as error:
            raise diverged from error
        done = state.step, state.tokens
        self._restore(checkpoint)
        state.step, state.tokens = done
        state.went_back_at, state.went_back_to = step, checkpoint.step
        return WentBack(step, checkpoint.step)

    def _rotate(self) -> Iterator[Event]:
        """Rotate to the next experts where a new interval begins."""
        rotation = self.state.rotation
        if rotation is None or rotation.interval == rotation.interval_of(self.state.step):
            return
        yield from self._read_step()
        self.recorder.forget()  # the experts' numbers, which decide the rounding of bf16 weights, are constants in it
        began = time.monotonic()
        try:
            rotation.rotate_to(rotation.interval_of(self.state.step))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise explain_out_of_memory_in_update(self.state.step, self.config.train) from error
        card, host = rotation.bytes_on()
        yield Rotated(self.state.step, tuple(sorted(rotation.window)), card, host, time.monotonic() - began)

    def _learn(self, rate: float) -> Generator[Event, None, StepStats]:
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
        self._background.close()
        discard(self.state.optimizer)
        free_memory(self.state.model.embedding.device)
        checkpoint, _ = self.store.latest(self._check)
        if checkpoint is None:
            return None
        self._restore(checkpoint)
        return checkpoint.step

    def _try_gradients(self) -> Loss | None:
        """Return None where memory ran out; the error is dropped here, since its frames keep the tensors alive."""
        try:
            return self.sum_gradients(range(self.plan.accumulate))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _rescue(self) -> Iterator[Event]:
        """Save the state before an error ends the run; only for errors that left weights and optimizer intact."""
        discard(self.state.optimizer)
        yield from self._read_step()
        free_memory(self.state.model.embedding.device)
        yield from self._end_save()
        if self.state.step not in (0, self._saved_step):
            yield from self._save()

    def _rescue_in(self, place: Path) -> Iterator[Event]:
        """Save the state in another directory, which nobody else knows and which needs no lock."""
        has_moved = place.exists()
        self.store, self.lock = dataclasses.replace(self.store, run=place), None
        yield from self._end_save()
        if not has_moved:
            self._saved_step = -1  # the checkpoints went with the directory
        yield from self._rescue()

    def _halve(self) -> Halved:
        """Halve the micro-batch after a failed attempt; the same sequences are then run again, fewer at a time."""
        discard(self.state.optimizer)
        self.drop_graphs()
        self.state.model.kept_casts = None
        if self.plan.compile:
            forget_compiled()
        free_memory(self.state.model.embedding.device)
        smaller = halve(self.plan)
        assert smaller is not None, "a plan that nothing makes smaller has ended the run before"
        self.plan = smaller
        return Halved(self.state.step, smaller.micro_batch, smaller.accumulate)

    def _update(self, sums: Loss, rate: float, limit: float) -> Tensor:
        """Clip and update, and return the step's numbers on the device."""
        try:
            return self.finish(sums, rate, limit)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise explain_out_of_memory_in_update(self.state.step, self.config.train) from error

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
                if isinstance(event, Evaluated) and not event.reads_masters:
                    self._last_valid = event.step, event.bits_per_byte
                yield event
                return
            if not may_retry or self.captured_pass is None:
                break
            self.drop_graphs()
            free_memory(self.state.model.embedding.device)
        yield from self._rescue()
        raise explain_out_of_memory_in_validation(self.state.step)

    def _validate_and_sample(self) -> Iterator[Event]:
        run, step = self.config.run, self.state.step
        is_last = step == self.config.train.steps
        if step % run.validate_every == 0 or step % run.sample_every == 0 or is_last:
            yield from self._read_step()
        if self.valid is not None and (step % run.validate_every == 0 or is_last):
            yield from self._try("validating", functools.partial(evaluate, *self._valid_part()))
        if step % run.sample_every == 0 or is_last:
            for prompt in run.prompts:
                write = functools.partial(write_sample, self.config, self.state, self.tokenizer, prompt)
                yield from self._try("sampling", write)
        if step % run.validate_every == 0 or step % run.sample_every == 0:
            # The time of validation and sampling is not training time.
            self._pace.begin(self.state.tokens)

    def _validate_masters(self) -> Iterator[Event]:
        """Validate with the experts' masters, as they were just saved, where the card holds only copies of them."""
        if self.valid is not None and self.state.rotation is not None:
            validate = functools.partial(evaluate_masters, *self._valid_part(), self.state.rotation)
            yield from self._try("validating", validate)
            self._pace.begin(self.state.tokens)

    def _valid_part(self) -> tuple[RunConfig, TrainState, Tokenizer, ShardSet | SourceSet, int]:
        assert self.valid is not None, "callers have checked it"
        return self.config, self.state, self.tokenizer, self.valid, self.plan.micro_batch
