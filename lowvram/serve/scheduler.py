"""Continuous batching: one thread owns the decoder, and jobs join and leave between tokens; knows no HTTP."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowvram.data.tokenizer import Tokenizer
from lowvram.errors import LowvramError, NumbersError
from lowvram.generate.decoder import Decoder
from lowvram.generate.sampling import BatchSampler, Drawn, Sampler, Wish
from lowvram.serve.detokenizer import Detokenizer, Logprobs, Piece
from lowvram.serve.metrics import Metrics
from lowvram.serve.slots import Slots

# Tokens of new prompts that are read in one round, so that a long prompt delays the running answers by no more.
PIECE_TOKENS = 256
# After so many failures with no success between them, the model is considered broken.
_MOST_FAILURES = 3


class QueueFullError(LowvramError):
    """There are more requests than may wait."""


class NotServingError(LowvramError):
    """The server is stopping, or its model cannot go on."""


@dataclass(frozen=True)
class GenerationJob:
    """What is to be written.

    ids: the whole prompt, at least one.  top: how many log-probabilities are reported at each token, besides the
    token's own; None: none, not even its own.
    """

    ids: tuple[int, ...]
    sampler: Sampler
    max_tokens: int
    stops: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True)
class Finished:
    """An answer's end.  reused: prompt tokens that a slot still held.  written: tokens without the one that ends it."""

    reason: Literal["stop", "length"]
    reused: int
    written: int


@dataclass(frozen=True)
class Failed:
    """An answer that could not be finished, and why."""

    error: LowvramError


Event = Piece | Finished | Failed


class ActiveJob:
    """A job in the scheduler: waiting, then in a slot, then ended.  `deliver` is called by the scheduler's thread."""

    def __init__(self, job: GenerationJob, tokenizer: Tokenizer, deliver: Callable[[Event], None]) -> None:
        self.job, self.deliver = job, deliver
        self.ids = list(job.ids)
        self.detokenizer = Detokenizer(tokenizer, job.stops)
        self.is_cancelled = False
        self.reused = 0
        self.asked_at = time.monotonic()

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.job.ids)


class Scheduler:
    """Takes jobs from any thread and writes up to `decoder.slots` of them at a time.

    Every round reads at most PIECE_TOKENS of new prompts and then writes one token of each running answer.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, queue: int, metrics: Metrics) -> None:
        self.decoder, self.tokenizer, self.queue, self.metrics = decoder, tokenizer, queue, metrics
        self._stop_ids = set(tokenizer.stop_ids)
        self._changed = threading.Condition()
        self._waiting: deque[ActiveJob] = deque()
        self._running: dict[int, ActiveJob] = {}
        self._slots, self._sampler = Slots(decoder), BatchSampler(decoder.slots)
        self._failures, self._stop_at = 0, float("inf")
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="lowvram-batcher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, grace_s: float = 0.0) -> None:
        """Take no more jobs; running answers may continue for `grace_s` seconds and are ended then."""
        with self._changed:
            self._is_stopping, self._stop_at = True, time.monotonic() + grace_s
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @property
    def running(self) -> int:
        """Answers being written."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a slot."""
        return len(self._waiting)

    def explain_stop(self) -> NotServingError | None:
        """Return an error if the server is stopping, else None."""
        if self._is_stopping or not self._thread.is_alive():
            return NotServingError("The server is stopping.", "It takes nothing more.", "Ask again when it is back.")
        return None

    def explain_unavailable(self) -> NotServingError | None:
        """Return an error that says why jobs are not taken now; None if they are."""
        if (stop := self.explain_stop()) is not None:
            return stop
        if self._failures >= _MOST_FAILURES:
            why = f"It failed {self._failures} times, one after another."
            return NotServingError("The model cannot go on.", why, "See the server's log, and start it again.")
        return None

    def explain_full_queue(self, count: int) -> QueueFullError | None:
        """Return an error if `count` requests leave no room for one more, else None."""
        if count < self.decoder.slots + self.queue:
            return None
        return QueueFullError(
            f"{count} requests are being answered or wait for it.",
            f"This server writes {self.decoder.slots} answers at once and lets {self.queue} wait.",
            "Ask again in a moment.",
        )

    def submit(self, job: GenerationJob, deliver: Callable[[Event], None]) -> ActiveJob:
        """Put a job in the queue; raises QueueFullError or NotServingError."""
        active = ActiveJob(job, self.tokenizer, deliver)
        with self._changed:
            # A broken model is tried again with a job that arrives when there is no other: it may have recovered.
            unavailable = self.explain_unavailable()
            if unavailable and (self._is_stopping or not self._thread.is_alive() or self._running or self._waiting):
                raise unavailable
            if (full_queue := self.explain_full_queue(len(self._waiting) + len(self._running))) is not None:
                raise full_queue
            self._waiting.append(active)
            self._changed.notify()
        return active

    def cancel(self, active: ActiveJob) -> None:
        """Cancel a job: its slot is freed before the next token, and nothing more is delivered after that."""
        with self._changed:
            active.is_cancelled = True
            if active in self._waiting:
                self._waiting.remove(active)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._advance()
        finally:
            # However the thread ends, every job gets its last event.
            with self._changed:
                self._is_stopping = True
                given_up = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            self._fail(given_up, self.explain_unavailable())

    def _wait_for_work(self) -> bool:
        """Wait until there is work or the scheduler stops; returns whether to go on."""
        with self._changed:
            while not (self._running or self._waiting or self._is_stopping):
                self._changed.wait()
            if not self._is_stopping:
                return True
            given_up = [*self._waiting]
            self._waiting.clear()
        self._fail(given_up, self.explain_unavailable())
        return bool(self._running) and time.monotonic() < self._stop_at

    def _advance(self) -> None:
        """Do one round: drop cancelled jobs, give waiting ones a slot, read parts of prompts, write one token each."""
        self._drop_cancelled()
        self._assign_slots()
        budget, whole = PIECE_TOKENS, dict[int, Tensor]()
        for slot, active in list(self._running.items()):
            unread = self._unread(slot, active)
            # A last unread token is read in the batch with the other jobs' tokens.
            if unread > 1 and budget > 0:
                count = min(unread, budget)
                budget -= count
                logit_V = self._prefill(slot, active, count)
                if logit_V is not None and count == unread:
                    whole[slot] = logit_V
        if whole:
            self._sample_next(list(whole), torch.stack(list(whole.values())))
        ready = sorted(slot for slot, active in self._running.items() if self._unread(slot, active) == 1)
        if ready:
            self._decode(ready)

    def _unread(self, slot: int, active: ActiveJob) -> int:
        return len(active.ids) - self.decoder.length(slot)

    def _drop_cancelled(self) -> None:
        for slot, active in list(self._running.items()):
            if active.is_cancelled:
                self._free(slot)

    def _assign_slots(self) -> None:
        with self._changed:
            while (
                self._waiting and not self._is_stopping and (slot := self._slots.find(self._waiting[0].ids)) is not None
            ):
                active = self._waiting.popleft()
                active.reused = self._slots.take(slot, active.ids)
                self._running[slot] = active
                self._sampler.begin(slot, active.job.sampler, active.ids)
                self.metrics.count("tokens_reused_total", active.reused)

    def _free(self, slot: int) -> None:
        self._slots.release(slot, self._running.pop(slot).ids)

    def _prefill(self, slot: int, active: ActiveJob, count: int) -> Tensor | None:
        """Read `count` tokens of a prompt; returns the logits [V] after them, None where that failed."""
        start = self.decoder.length(slot)
        try:
            logit_V = self.decoder.prefill(slot, active.ids[start : start + count])
        except (RuntimeError, MemoryError, LowvramError) as error:
            self._fail_slots(error, [slot])
            return None
        self.metrics.count("tokens_read_total", count)
        return logit_V

    def _decode(self, slots: Sequence[int]) -> None:
        try:
            logit_NV = self.decoder.decode_one_token(slots, [self._running[slot].ids[-1] for slot in slots])
        except (RuntimeError, MemoryError, LowvramError) as error:
            self._fail_slots(error, slots)
            return
        self.metrics.count("tokens_read_total", sum(not self._running[slot].written for slot in slots))
        self._sample_next(slots, logit_NV)

    def _sample_next(self, slots: Sequence[int], logit_NV: Tensor) -> None:
        """Sample each job's next token, deliver its text, and free the slots of the jobs that are done."""
        jobs = [self._running[slot] for slot in slots]
        wishes = [Wish(active.job.sampler, len(active.ids), active.job.top) for active in jobs]
        try:
            tokens = self._sampler.draw(slots, wishes, logit_NV)
        except (RuntimeError, MemoryError) as error:
            self._fail_slots(error, slots)
            return
        for slot, active, token in zip(slots, jobs, tokens, strict=True):
            if isinstance(token, NumbersError):
                self._fail_slots(token, [slot])
                continue
            self._failures = 0
            if not active.written:
                self.metrics.time("first_token_seconds", time.monotonic() - active.asked_at)
            if reason := self._append(active, token):
                self._deliver(active, active.detokenizer.finish())
                active.deliver(Finished(reason, active.reused, active.written))
                self._free(slot)

    def _append(self, active: ActiveJob, token: Drawn) -> Literal["stop", "length"] | None:
        """Add a token to the job's text; returns the reason if it is the last, else None."""
        if token.id in self._stop_ids:
            return "stop"
        active.ids.append(token.id)
        self.metrics.count("tokens_written_total")
        logprobs = None if token.logprob is None else Logprobs(token.logprob, token.top)
        self._deliver(active, active.detokenizer.push(token.id, logprobs))
        if active.detokenizer.is_stopped:
            return "stop"
        is_full = active.written >= active.job.max_tokens or len(active.ids) >= self.decoder.max_context
        return "length" if is_full else None

    def _deliver(self, active: ActiveJob, piece: Piece) -> None:
        # The first token is always delivered, even without text: from then on the answer's HTTP status is sent.
        if piece.text or piece.token_logprobs or active.written == 1:
            active.deliver(piece)

    def _fail_slots(self, error: Exception, slots: Sequence[int]) -> None:
        """End the jobs in these slots with an error; what the slots hold is unknown now."""
        self._failures += 1
        self.metrics.count("failures_total")
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        why = NotServingError("The model could not go on with this answer.", first_line, "Ask again.")
        active_jobs = [self._running.pop(slot) for slot in slots]
        for slot in slots:
            self._slots.forget(slot)
        self._fail(active_jobs, why)

    def _fail(self, active_jobs: Sequence[ActiveJob], error: LowvramError | None) -> None:
        assert error is not None, "a scheduler that ends jobs is stopping"
        for active in active_jobs:
            active.deliver(Failed(error))
