"""Many answers written together: one thread owns the decoder, jobs join and leave between tokens; knows no HTTP."""

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
from lowvram.generate.sampling import Sampler, sample
from lowvram.serve.detokenizer import Detokenizer, Logprobs, Piece
from lowvram.serve.metrics import Metrics
from lowvram.serve.slots import Slots

# Tokens read at a time, so that a long prompt delays the running answers by no more than this.
PIECE_TOKENS = 256
# So many failures with no success between them, and the model is taken to be broken.
_MOST_FAILURES = 3


class QueueFullError(LowvramError):
    """More requests than may wait."""


class NotServingError(LowvramError):
    """A server that is stopping, or whose model cannot go on."""


@dataclass(frozen=True)
class GenerationJob:
    """What is to be written.  ids: the whole text, at least one.  top: how many chances a token; None: not its own."""

    ids: tuple[int, ...]
    sampler: Sampler
    max_tokens: int
    stops: tuple[str, ...] = ()
    top: int | None = None


@dataclass(frozen=True)
class Finished:
    """An answer's end.  reused: prompt tokens that a slot still held.  written: tokens, without the one that ends."""

    reason: Literal["stop", "length"]
    reused: int
    written: int


@dataclass(frozen=True)
class Failed:
    """An answer that could not be finished, and why."""

    error: LowvramError


Event = Piece | Finished | Failed


class ActiveJob:
    """One order on its way: waiting, then in a slot, then ended.  `deliver` is called by the batcher's thread."""

    def __init__(self, order: GenerationJob, tokenizer: Tokenizer, deliver: Callable[[Event], None]) -> None:
        self.order, self.deliver = order, deliver
        self.ids = list(order.ids)
        # For a penalty on tokens that are there already: read with each new token, so it grows in place.
        self._seen = None
        if order.sampler.repetition_penalty != 1.0:
            self._seen = torch.empty(len(self.ids) + order.max_tokens, dtype=torch.int64)
            self._seen[: len(self.ids)] = torch.tensor(self.ids)
        self.answer = Detokenizer(tokenizer, order.stops)
        self.has_left = False
        self.reused = 0
        self.asked_at = time.monotonic()

    @property
    def written(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.order.ids)

    @property
    def seen(self) -> Tensor:
        """The ids so far [T], a view, where the sampler asks for them; else none."""
        return torch.empty(0, dtype=torch.int64) if self._seen is None else self._seen[: len(self.ids)]

    def append(self, id: int) -> None:
        """Add a token to the text."""
        if self._seen is not None:
            self._seen[len(self.ids)] = id
        self.ids.append(id)


class Scheduler:
    """Takes jobs from any thread and writes up to `decoder.slots` of them at a time.

    Every round reads at most PIECE_TOKENS of new prompts and then writes one token of each running answer.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, queue: int, metrics: Metrics) -> None:
        self.decoder, self.tokenizer, self.queue, self.metrics = decoder, tokenizer, queue, metrics
        self._ends = set(tokenizer.stop_ids)
        self._changed = threading.Condition()
        self._waiting: deque[ActiveJob] = deque()
        self._running: dict[int, ActiveJob] = {}
        self._slots = Slots(decoder)
        self._failures, self._stop_at = 0, float("inf")
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="lowvram-batcher", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, grace_s: float = 0.0) -> None:
        """Take nothing more; answers that run may end by themselves in so many seconds, and are ended then."""
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
        """Jobs without a slot."""
        return len(self._waiting)

    def explain_stop(self) -> NotServingError | None:
        """Return that the server is stopping, where it is."""
        if self._is_stopping or not self._thread.is_alive():
            return NotServingError("The server is stopping.", "It takes nothing more.", "Ask again when it is back.")
        return None

    def explain_absence(self) -> NotServingError | None:
        """Return why no job is taken now; None where they are."""
        if (stop := self.explain_stop()) is not None:
            return stop
        if self._failures >= _MOST_FAILURES:
            why = f"It failed {self._failures} times, one after another."
            return NotServingError("The model cannot go on.", why, "See the server's log, and start it again.")
        return None

    def explain_crowd(self, count: int) -> QueueFullError | None:
        """Return that so many requests are as many as are taken at once, where they are."""
        if count < self.decoder.slots + self.queue:
            return None
        return QueueFullError(
            f"{count} requests are being answered or wait for it.",
            f"This server writes {self.decoder.slots} answers at once and lets {self.queue} wait.",
            "Ask again in a moment.",
        )

    def submit(self, order: GenerationJob, deliver: Callable[[Event], None]) -> ActiveJob:
        """Put a job in the queue; raises QueueFullError or NotServingError."""
        job = ActiveJob(order, self.tokenizer, deliver)
        with self._changed:
            # A broken model is tried again by whoever comes when nobody else is there: it may have recovered.
            absence = self.explain_absence()
            if absence and (self._is_stopping or not self._thread.is_alive() or self._running or self._waiting):
                raise absence
            if (crowd := self.explain_crowd(len(self._waiting) + len(self._running))) is not None:
                raise crowd
            self._waiting.append(job)
            self._changed.notify()
        return job

    def leave(self, job: ActiveJob) -> None:
        """Give a job up: nothing more is delivered, and its slot is free before the next token."""
        with self._changed:
            job.has_left = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._advance()
        finally:
            # However the thread ends, nobody is left waiting for it.
            with self._changed:
                self._is_stopping = True
                given_up = [*self._running.values(), *self._waiting]
                self._running.clear()
                self._waiting.clear()
            self._fail(given_up, self.explain_absence())

    def _wait_for_work(self) -> bool:
        """Return whether there is more to do, after waiting for something."""
        with self._changed:
            while not (self._running or self._waiting or self._is_stopping):
                self._changed.wait()
            if not self._is_stopping:
                return True
            given_up = [*self._waiting]
            self._waiting.clear()
        self._fail(given_up, self.explain_absence())
        return bool(self._running) and time.monotonic() < self._stop_at

    def _advance(self) -> None:
        """One round: who left goes, who waits is seated, a piece is read, a token is written."""
        self._let_go()
        self._seat()
        budget = PIECE_TOKENS
        for slot, job in list(self._running.items()):
            unread = self._unread(slot, job)
            # One unread token is read together with everybody else's.
            if unread > 1 and budget > 0:
                budget -= self._read(slot, job, min(unread, budget))
        ready = [slot for slot, job in self._running.items() if self._unread(slot, job) == 1]
        if ready:
            self._write(ready)

    def _unread(self, slot: int, job: ActiveJob) -> int:
        return len(job.ids) - self.decoder.length(slot)

    def _let_go(self) -> None:
        for slot, job in list(self._running.items()):
            if job.has_left:
                self._free(slot)

    def _seat(self) -> None:
        with self._changed:
            while (
                self._waiting and not self._is_stopping and (slot := self._slots.find(self._waiting[0].ids)) is not None
            ):
                job = self._waiting.popleft()
                job.reused = self._slots.take(slot, job.ids)
                self._running[slot] = job
                self.metrics.count("tokens_reused_total", job.reused)

    def _free(self, slot: int) -> None:
        self._slots.give_back(slot, self._running.pop(slot).ids)

    def _read(self, slot: int, job: ActiveJob, count: int) -> int:
        """Read some of a prompt; where that was all of it, choose the first token.  Returns `count`."""
        start = self.decoder.length(slot)
        try:
            logit_V = self.decoder.prefill(slot, job.ids[start : start + count])
        except (RuntimeError, MemoryError, LowvramError) as error:
            self._fail_by(error, [slot])
            return count
        self.metrics.count("tokens_read_total", count)
        if start + count == len(job.ids):
            self._choose([slot], logit_V[None])
        return count

    def _write(self, slots: Sequence[int]) -> None:
        try:
            logit_NV = self.decoder.decode_one_token(slots, [self._running[slot].ids[-1] for slot in slots])
        except (RuntimeError, MemoryError, LowvramError) as error:
            self._fail_by(error, slots)
            return
        self.metrics.count("tokens_read_total", sum(not self._running[slot].written for slot in slots))
        self._choose(slots, logit_NV)

    def _choose(self, slots: Sequence[int], logit_NV: Tensor) -> None:
        """Choose each job's next token, deliver what it says, and let go those that are done."""
        logit_NV = logit_NV.detach().to("cpu", torch.float32)
        for slot, logit_V in zip(slots, logit_NV, strict=True):
            job = self._running[slot]
            try:
                id = sample(logit_V, job.order.sampler, job.seen, len(job.ids))
            except NumbersError as error:
                self._fail_by(error, [slot])
                continue
            self._failures = 0
            if not job.written:
                self.metrics.time("first_token_seconds", time.monotonic() - job.asked_at)
            if reason := self._append(job, id, logit_V):
                self._deliver(job, job.answer.finish())
                job.deliver(Finished(reason, job.reused, job.written))
                self._free(slot)

    def _append(self, job: ActiveJob, id: int, logit_V: Tensor) -> Literal["stop", "length"] | None:
        """Add a token to the job's text; returns why it is the last, or None."""
        if id in self._ends:
            return "stop"
        job.append(id)
        self.metrics.count("tokens_written_total")
        logprobs = None if job.order.top is None else logprobs_of(logit_V, id, job.order.top)
        self._deliver(job, job.answer.push(id, logprobs))
        if job.answer.is_stopped:
            return "stop"
        is_full = job.written >= job.order.max_tokens or len(job.ids) >= self.decoder.max_context
        return "length" if is_full else None

    def _deliver(self, job: ActiveJob, piece: Piece) -> None:
        # The first token is always told, if it is but half a character: from then on the answer is on its way.
        if piece.text or piece.said or job.written == 1:
            job.deliver(piece)

    def _fail_by(self, error: Exception, slots: Sequence[int]) -> None:
        """End the jobs in these slots, of which nobody knows what they hold now."""
        self._failures += 1
        self.metrics.count("failures_total")
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        why = NotServingError("The model could not go on with this answer.", first_line, "Ask again.")
        jobs = [self._running.pop(slot) for slot in slots]
        for slot in slots:
            self._slots.forget(slot)
        self._fail(jobs, why)

    def _fail(self, jobs: Sequence[ActiveJob], error: LowvramError | None) -> None:
        assert error is not None, "a stopping batcher says so"
        for job in jobs:
            job.deliver(Failed(error))


def logprobs_of(logit_V: Tensor, id: int, top: int) -> Logprobs:
    """Return a token's log-probability and the `top` likeliest ones, greatest first.  logit_V: [V] fp32."""
    logprob_V = logit_V.log_softmax(-1)
    value, index = logprob_V.topk(min(top, len(logprob_V)))
    return Logprobs(float(logprob_V[id]), tuple(zip(index.tolist(), value.tolist(), strict=True)))
