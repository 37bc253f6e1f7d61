"""Jobs that are written together get what they would have got alone; who leaves or fails harms nobody else."""

from __future__ import annotations

import gc
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lowvram.data.tokenizer import Tokenizer
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from lowvram.model.transformer import Transformer
from lowvram.serve.detokenizer import Piece
from lowvram.serve.metrics import Metrics
from lowvram.serve.scheduler import (
    PIECE_TOKENS,
    Event,
    Failed,
    Finished,
    GenerationJob,
    NotServingError,
    QueueFullError,
    Scheduler,
)
from tests.conftest import TURKISH
from tests.model.variants import VARIANTS
from tests.serve.place import GREEDY, alone, small_model

CONTEXT = 80


class Watched(Decoder):
    """A decoder that notes what it is asked to read, and can be held, made to fail or to answer nonsense."""

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self.log: list[tuple[str, tuple[int, ...], int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.poison = False
        self.poisoned_slot: int | None = None

    def _visit(self, what: str, slots: Sequence[int], tokens: int) -> None:
        self.gate.wait(30)
        self.log.append((what, tuple(slots), tokens))
        if self.error is not None:
            raise self.error

    def prefill(self, slot: int, token_T: Sequence[int]) -> Tensor:
        self._visit("prefill", [slot], len(token_T))
        return super().prefill(slot, token_T)

    def decode_one_token(self, slot_N: Sequence[int], token_N: Sequence[int]) -> Tensor:
        self._visit("decode", slot_N, len(slot_N))
        logit_NV = super().decode_one_token(slot_N, token_N)
        if self.poisoned_slot in slot_N:
            logit_NV = logit_NV.clone()
            logit_NV[list(slot_N).index(self.poisoned_slot)] = float("nan")
        return logit_NV * float("nan") if self.poison else logit_NV


class Inbox:
    """What one job was told."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()

    def take(self) -> tuple[str, Finished | Failed]:
        """Return all of its text and how it ended."""
        text = ""
        while isinstance(event := self.events.get(timeout=30), Piece):
            text += event.text
        return text, event


@contextmanager
def batching(decoder: Decoder, tokenizer: Tokenizer, queue: int = 100) -> Iterator[Scheduler]:
    scheduler = Scheduler(decoder, tokenizer, queue, Metrics())
    scheduler.start()
    try:
        yield scheduler
    finally:
        if isinstance(decoder, Watched):
            decoder.gate.set()
        scheduler.stop()
        scheduler.join()


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Transformer:
    return small_model(small_tokenizer)


def job_for(tokenizer: Tokenizer, text: str, max_tokens: int = 8, sampler: Sampler = GREEDY) -> GenerationJob:
    return GenerationJob((tokenizer.bos_id, *tokenizer.encode(text)), sampler, max_tokens)


def ask(scheduler: Scheduler, tokenizer: Tokenizer, text: str, max_tokens: int = 8) -> Inbox:
    inbox = Inbox()
    scheduler.submit(job_for(tokenizer, text, max_tokens), inbox.events.put)
    return inbox


@pytest.mark.parametrize("variant", ["gqa-rope", "gqa-alibi-window", "mla-moe", "mla-yarn-q_lora"])
def test_each_of_many_gets_the_greedy_text_that_it_would_have_got_alone(
    small_tokenizer: Tokenizer, variant: str
) -> None:
    model = small_model(small_tokenizer, variant)
    texts = [text[: 8 + 3 * number] for number, text in enumerate(TURKISH)]
    expected = [
        alone(model, small_tokenizer, job_for(small_tokenizer, text).ids, 4 + number, CONTEXT)
        for number, text in enumerate(texts)
    ]
    with batching(Decoder(model, CONTEXT, 5), small_tokenizer) as scheduler:
        inboxes = [ask(scheduler, small_tokenizer, text, 4 + number) for number, text in enumerate(texts)]
        assert [inbox.take()[0] for inbox in inboxes] == expected


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_seeded_answer_does_not_depend_on_its_company(
    small_tokenizer: Tokenizer, model: Transformer, temperature: float
) -> None:
    sampler = Sampler(temperature=temperature, seed=11)
    with batching(Decoder(model, CONTEXT, 4), small_tokenizer) as scheduler:

        def write(company: int) -> str:
            inbox = Inbox()
            scheduler.submit(job_for(small_tokenizer, TURKISH[0][:30], 20, sampler), inbox.events.put)
            others = [ask(scheduler, small_tokenizer, text[:20]) for text in TURKISH[1 : 1 + company]]
            for other in others:
                other.take()
            return inbox.take()[0]

        assert write(0) == write(3) == write(7)


# Samplers that clients of one server may have at the same time.
CROWD = [
    Sampler(seed=1),
    Sampler(temperature=0.0, repetition_penalty=1.3),
    Sampler(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=2),
    Sampler(temperature=1.4, top_k=0, top_p=0.9, seed=3),
    Sampler(temperature=0.9, min_p=0.05, top_k=0, repetition_penalty=0.8, seed=4),
    GREEDY,
    Sampler(seed=1),
]


@pytest.mark.parametrize("slots", [2, 7])
def test_whoever_writes_beside_whom_gets_the_tokens_of_a_conversation_alone(
    small_tokenizer: Tokenizer, model: Transformer, slots: int
) -> None:
    jobs = [
        job_for(small_tokenizer, TURKISH[number % len(TURKISH)][: 9 + 5 * number], 12 + number, sampler)
        for number, sampler in enumerate(CROWD)
    ]
    engine = Engine(Decoder(model, CONTEXT), small_tokenizer)
    expected = ["".join(engine.generate(list(job.ids), job.sampler, job.max_tokens)) for job in jobs]
    with batching(Decoder(model, CONTEXT, slots), small_tokenizer) as scheduler:
        for _ in range(2):  # the second time every slot had another text's history
            inboxes = [Inbox() for _ in jobs]
            for job, inbox in zip(jobs, inboxes, strict=True):
                scheduler.submit(job, inbox.events.put)
            assert [inbox.take()[0] for inbox in inboxes] == expected
            jobs, expected = jobs[::-1], expected[::-1]


def test_a_text_of_broken_numbers_ends_and_the_others_go_on(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 4)
    with batching(decoder, small_tokenizer) as scheduler:
        expected = [ask(scheduler, small_tokenizer, text[:20], 20).take() for text in TURKISH[:3]]
    decoder = Watched(model, CONTEXT, 4)
    decoder.gate.clear()
    decoder.poisoned_slot = 1
    with batching(decoder, small_tokenizer) as scheduler:
        inboxes = [ask(scheduler, small_tokenizer, text[:20], 20) for text in TURKISH[:3]]
        decoder.gate.set()
        found = [inbox.take() for inbox in inboxes]
    assert isinstance(found[1][1], Failed)
    assert "greatest logit is nan" in str(found[1][1].error)
    assert [found[0][0], found[2][0]] == [expected[0][0], expected[2][0]]


def test_who_comes_later_joins_between_two_tokens(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 4)
    with batching(decoder, small_tokenizer) as scheduler:
        first = ask(scheduler, small_tokenizer, "Yağmur", 40)
        first.events.get(timeout=30)
        decoder.gate.clear()
        second = ask(scheduler, small_tokenizer, "Annem mutfakta", 5)
        decoder.gate.set()
        second.take()
        first.take()
    together = decoder.log.index(("decode", (0, 1), 2))
    assert ("decode", (0,), 1) in decoder.log[:together]
    assert ("decode", (0,), 1) in decoder.log[together:], "the first goes on when the second has ended"


def test_a_long_prompt_is_read_in_pieces_while_others_write(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, 1200, 2)
    decoder.gate.clear()
    with batching(decoder, small_tokenizer) as scheduler:
        short = ask(scheduler, small_tokenizer, "Yağmur", 6)
        long = Inbox()
        scheduler.submit(GenerationJob((0,) * 1000, GREEDY, 2), long.events.put)
        decoder.gate.set()
        short.take()
        long.take()
    read = [tokens for what, slots, tokens in decoder.log if what == "prefill" and slots == (1,)]
    assert sum(read) in (999, 1000), "one unread token is read with everybody else's"
    assert max(read) <= PIECE_TOKENS
    first, last = (decoder.log.index(("prefill", (1,), tokens)) for tokens in (read[0], read[-1]))
    assert ("decode", (0,), 1) in decoder.log[first:last]


def test_a_second_turn_reads_only_what_is_new(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 3)
    with batching(decoder, small_tokenizer) as scheduler:
        first = job_for(small_tokenizer, TURKISH[2][:40])
        inbox = Inbox()
        scheduler.submit(first, inbox.events.put)
        inbox.take()
        ask(scheduler, small_tokenizer, TURKISH[5][:20]).take()
        decoder.log.clear()
        second = GenerationJob((*first.ids, 300, 301, 302), GREEDY, 4)
        inbox = Inbox()
        scheduler.submit(second, inbox.events.put)
        text, ended = inbox.take()
    assert isinstance(ended, Finished)
    assert ended.reused == len(first.ids)
    assert decoder.log[0] == ("prefill", (0,), 3)
    assert text == alone(model, small_tokenizer, second.ids, 4, CONTEXT)


def test_the_same_text_again_reads_its_last_token_only(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as scheduler:
        text = ask(scheduler, small_tokenizer, TURKISH[1]).take()[0]
        decoder.log.clear()
        assert ask(scheduler, small_tokenizer, TURKISH[1]).take()[0] == text
    assert {what for what, _, _ in decoder.log} == {"decode"}


def test_who_leaves_frees_the_slot_and_is_told_no_more(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 1)
    with batching(decoder, small_tokenizer) as scheduler:
        inbox = Inbox()
        job = scheduler.submit(job_for(small_tokenizer, "Yağmur", 60), inbox.events.put)
        inbox.events.get(timeout=30)
        decoder.gate.clear()
        waiting = Inbox()
        waiting_job = scheduler.submit(job_for(small_tokenizer, "Annem"), waiting.events.put)
        scheduler.cancel(waiting_job)
        assert scheduler.waiting == 0
        scheduler.cancel(job)
        decoder.gate.set()
        assert ask(scheduler, small_tokenizer, "Doktor").take()[1].reason == "length"  # type: ignore[union-attr]
        assert scheduler.running == 0
        assert waiting.events.empty()
        while not inbox.events.empty():
            assert isinstance(inbox.events.get(), Piece)


def test_a_full_queue_says_so_and_nothing_else_happens(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 2)
    decoder.gate.clear()
    with batching(decoder, small_tokenizer, queue=1) as scheduler:
        inboxes = [ask(scheduler, small_tokenizer, text[:9], 3) for text in TURKISH[:3]]
        with pytest.raises(QueueFullError, match="lets 1 wait"):
            ask(scheduler, small_tokenizer, "dördüncü")
        decoder.gate.set()
        assert [type(inbox.take()[1]) for inbox in inboxes] == [Finished] * 3


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError("no memory"), MemoryError()]
)
def test_a_failure_ends_the_answers_that_it_hit_and_the_next_is_right(
    small_tokenizer: Tokenizer, model: Transformer, error: Exception
) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as scheduler:
        expected = ask(scheduler, small_tokenizer, TURKISH[3][:30]).take()[0]
        decoder.error = error
        _, failed = ask(scheduler, small_tokenizer, TURKISH[3][:35]).take()
        assert isinstance(failed, Failed)
        assert "could not go on with this answer" in str(failed.error)
        decoder.error = None
        assert ask(scheduler, small_tokenizer, TURKISH[3][:30]).take()[0] == expected


def test_a_model_that_fails_again_and_again_is_given_up_until_it_answers(
    small_tokenizer: Tokenizer, model: Transformer
) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as scheduler:
        decoder.error = RuntimeError("CUDA error")
        for _ in range(3):
            assert scheduler.explain_unavailable() is None
            ask(scheduler, small_tokenizer, "Yağmur").take()
        assert "failed 3 times" in str(scheduler.explain_unavailable())
        decoder.error = None
        ask(scheduler, small_tokenizer, "Yağmur").take()
        assert scheduler.explain_unavailable() is None


def test_numbers_that_are_not_finite_are_no_answer(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as scheduler:
        decoder.poison = True
        _, failed = ask(scheduler, small_tokenizer, "Yağmur").take()
    assert isinstance(failed, Failed)
    assert "greatest logit is nan" in str(failed.error)


def test_a_mistake_of_ours_leaves_nobody_waiting(
    small_tokenizer: Tokenizer, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    decoder = Watched(model, CONTEXT, 1)
    decoder.error = TypeError("a mistake")
    decoder.gate.clear()
    with batching(decoder, small_tokenizer) as scheduler:
        inboxes = [ask(scheduler, small_tokenizer, text[:9]) for text in TURKISH[:4]]
        decoder.gate.set()
        assert [type(inbox.take()[1]) for inbox in inboxes] == [Failed] * 4
        with pytest.raises(NotServingError):
            ask(scheduler, small_tokenizer, "Yağmur")


def test_stopping_lets_running_answers_end_and_refuses_the_rest(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 1)
    with batching(decoder, small_tokenizer) as scheduler:
        running = ask(scheduler, small_tokenizer, "Yağmur", 30)
        running.events.get(timeout=30)
        decoder.gate.clear()
        waiting = ask(scheduler, small_tokenizer, "Annem")
        scheduler.stop(grace_s=60.0)
        with pytest.raises(NotServingError, match="stopping"):
            ask(scheduler, small_tokenizer, "Doktor")
        decoder.gate.set()
        assert isinstance(running.take()[1], Finished)
        assert isinstance(waiting.take()[1], Failed)
        scheduler.join()


def test_stopping_at_once_cuts_what_runs(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 1)
    with batching(decoder, small_tokenizer) as scheduler:
        running = ask(scheduler, small_tokenizer, "Yağmur", 60)
        running.events.get(timeout=30)
        decoder.gate.clear()
        scheduler.stop()
        decoder.gate.set()
        assert isinstance(running.take()[1], Failed)


def test_nothing_of_a_finished_job_is_kept(small_tokenizer: Tokenizer, model: Transformer) -> None:
    with batching(Decoder(model, CONTEXT, 3), small_tokenizer) as scheduler:
        left = []
        for text in TURKISH:
            inbox = Inbox()
            left.append(weakref.ref(scheduler.submit(job_for(small_tokenizer, text[:12], 3), inbox.events.put)))
            inbox.take()
        for _ in range(500):  # the scheduler's thread holds the last one until its next look
            gc.collect()
            if not any(job() for job in left):
                break
            time.sleep(0.02)
        assert [job() for job in left] == [None] * len(left)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reused_slots_say_what_fresh_ones_would(small_tokenizer: Tokenizer, variant: str) -> None:
    model = small_model(small_tokenizer, variant)
    texts = [TURKISH[number % 3][: 10 + 9 * (number % 4)] for number in (0, 3, 6, 1, 9, 2, 0, 5)]
    with batching(Decoder(model, CONTEXT, 2), small_tokenizer) as scheduler:
        for text in texts:
            expected = alone(model, small_tokenizer, job_for(small_tokenizer, text).ids, 6, CONTEXT)
            assert ask(scheduler, small_tokenizer, text, 6).take()[0] == expected
