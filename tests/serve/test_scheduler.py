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
from lowvram.serve import scheduler as batch
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
    batcher = Scheduler(decoder, tokenizer, queue, Metrics())
    batcher.start()
    try:
        yield batcher
    finally:
        if isinstance(decoder, Watched):
            decoder.gate.set()
        batcher.stop()
        batcher.join()


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Transformer:
    return small_model(small_tokenizer)


def order(tokenizer: Tokenizer, text: str, max_tokens: int = 8, sampler: Sampler = GREEDY) -> GenerationJob:
    return GenerationJob((tokenizer.bos_id, *tokenizer.encode(text)), sampler, max_tokens)


def ask(batcher: Scheduler, tokenizer: Tokenizer, text: str, max_tokens: int = 8) -> Inbox:
    inbox = Inbox()
    batcher.submit(order(tokenizer, text, max_tokens), inbox.events.put)
    return inbox


@pytest.mark.parametrize("variant", ["gqa-rope", "gqa-alibi-window", "mla-moe", "mla-yarn-q_lora"])
def test_each_of_many_gets_the_greedy_text_that_it_would_have_got_alone(
    small_tokenizer: Tokenizer, variant: str
) -> None:
    model = small_model(small_tokenizer, variant)
    texts = [text[: 8 + 3 * number] for number, text in enumerate(TURKISH)]
    expected = [
        alone(model, small_tokenizer, order(small_tokenizer, text).ids, 4 + number, CONTEXT)
        for number, text in enumerate(texts)
    ]
    with batching(Decoder(model, CONTEXT, 5), small_tokenizer) as batcher:
        inboxes = [ask(batcher, small_tokenizer, text, 4 + number) for number, text in enumerate(texts)]
        assert [inbox.take()[0] for inbox in inboxes] == expected


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_a_seeded_answer_does_not_depend_on_its_company(
    small_tokenizer: Tokenizer, model: Transformer, temperature: float
) -> None:
    sampler = Sampler(temperature=temperature, seed=11)
    with batching(Decoder(model, CONTEXT, 4), small_tokenizer) as batcher:

        def write(company: int) -> str:
            inbox = Inbox()
            batcher.submit(order(small_tokenizer, TURKISH[0][:30], 20, sampler), inbox.events.put)
            others = [ask(batcher, small_tokenizer, text[:20]) for text in TURKISH[1 : 1 + company]]
            for other in others:
                other.take()
            return inbox.take()[0]

        assert write(0) == write(3) == write(7)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_texts_ids_are_kept_as_a_tensor_only_for_a_penalty_and_grow_in_place(
    small_tokenizer: Tokenizer, model: Transformer, monkeypatch: pytest.MonkeyPatch, penalty: float
) -> None:
    seen = list[Tensor]()
    real = batch.sample
    monkeypatch.setattr(batch, "sample", lambda *words: seen.append(words[2]) or real(*words))
    sampler = Sampler(temperature=0.0, repetition_penalty=penalty)
    asked = order(small_tokenizer, TURKISH[0][:30], 20, sampler)
    with batching(Decoder(model, CONTEXT, 2), small_tokenizer) as batcher:
        inbox = Inbox()
        batcher.submit(asked, inbox.events.put)
        text = inbox.take()[0]
    engine = Engine(Decoder(model, CONTEXT), small_tokenizer)
    assert text == "".join(engine.generate(list(asked.ids), sampler, 20))
    assert len(seen) > 10
    if penalty == 1.0:
        assert {ids.numel() for ids in seen} == {0}
    else:
        assert [ids.numel() for ids in seen] == list(range(len(asked.ids), len(asked.ids) + len(seen)))
        assert seen[-1].tolist() == engine.ids[: seen[-1].numel()]
        assert len({ids.data_ptr() for ids in seen}) == 1, "no token copies the text"


def test_who_comes_later_joins_between_two_tokens(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 4)
    with batching(decoder, small_tokenizer) as batcher:
        first = ask(batcher, small_tokenizer, "Yağmur", 40)
        first.events.get(timeout=30)
        decoder.gate.clear()
        second = ask(batcher, small_tokenizer, "Annem mutfakta", 5)
        decoder.gate.set()
        second.take()
        first.take()
    together = decoder.log.index(("decode", (0, 1), 2))
    assert ("decode", (0,), 1) in decoder.log[:together]
    assert ("decode", (0,), 1) in decoder.log[together:], "the first goes on when the second has ended"


def test_a_long_prompt_is_read_in_pieces_while_others_write(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, 1200, 2)
    decoder.gate.clear()
    with batching(decoder, small_tokenizer) as batcher:
        short = ask(batcher, small_tokenizer, "Yağmur", 6)
        long = Inbox()
        batcher.submit(GenerationJob((0,) * 1000, GREEDY, 2), long.events.put)
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
    with batching(decoder, small_tokenizer) as batcher:
        first = order(small_tokenizer, TURKISH[2][:40])
        inbox = Inbox()
        batcher.submit(first, inbox.events.put)
        inbox.take()
        ask(batcher, small_tokenizer, TURKISH[5][:20]).take()
        decoder.log.clear()
        second = GenerationJob((*first.ids, 300, 301, 302), GREEDY, 4)
        inbox = Inbox()
        batcher.submit(second, inbox.events.put)
        text, ended = inbox.take()
    assert isinstance(ended, Finished)
    assert ended.reused == len(first.ids)
    assert decoder.log[0] == ("prefill", (0,), 3)
    assert text == alone(model, small_tokenizer, second.ids, 4, CONTEXT)


def test_the_same_text_again_reads_its_last_token_only(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as batcher:
        text = ask(batcher, small_tokenizer, TURKISH[1]).take()[0]
        decoder.log.clear()
        assert ask(batcher, small_tokenizer, TURKISH[1]).take()[0] == text
    assert {what for what, _, _ in decoder.log} == {"decode"}


def test_who_leaves_frees_the_slot_and_is_told_no_more(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 1)
    with batching(decoder, small_tokenizer) as batcher:
        inbox = Inbox()
        job = batcher.submit(order(small_tokenizer, "Yağmur", 60), inbox.events.put)
        inbox.events.get(timeout=30)
        decoder.gate.clear()
        waiting = Inbox()
        waiting_job = batcher.submit(order(small_tokenizer, "Annem"), waiting.events.put)
        batcher.leave(waiting_job)
        assert batcher.waiting == 0
        batcher.leave(job)
        decoder.gate.set()
        assert ask(batcher, small_tokenizer, "Doktor").take()[1].reason == "length"  # type: ignore[union-attr]
        assert batcher.running == 0
        assert waiting.events.empty()
        while not inbox.events.empty():
            assert isinstance(inbox.events.get(), Piece)


def test_a_full_queue_says_so_and_nothing_else_happens(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 2)
    decoder.gate.clear()
    with batching(decoder, small_tokenizer, queue=1) as batcher:
        inboxes = [ask(batcher, small_tokenizer, text[:9], 3) for text in TURKISH[:3]]
        with pytest.raises(QueueFullError, match="lets 1 wait"):
            ask(batcher, small_tokenizer, "dördüncü")
        decoder.gate.set()
        assert [type(inbox.take()[1]) for inbox in inboxes] == [Finished] * 3


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError("no memory"), MemoryError()]
)
def test_a_failure_ends_the_answers_that_it_hit_and_the_next_is_right(
    small_tokenizer: Tokenizer, model: Transformer, error: Exception
) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as batcher:
        expected = ask(batcher, small_tokenizer, TURKISH[3][:30]).take()[0]
        decoder.error = error
        _, failed = ask(batcher, small_tokenizer, TURKISH[3][:35]).take()
        assert isinstance(failed, Failed)
        assert "could not go on with this answer" in str(failed.error)
        decoder.error = None
        assert ask(batcher, small_tokenizer, TURKISH[3][:30]).take()[0] == expected


def test_a_model_that_fails_again_and_again_is_given_up_until_it_answers(
    small_tokenizer: Tokenizer, model: Transformer
) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as batcher:
        decoder.error = RuntimeError("CUDA error")
        for _ in range(3):
            assert batcher.explain_absence() is None
            ask(batcher, small_tokenizer, "Yağmur").take()
        assert "failed 3 times" in str(batcher.explain_absence())
        decoder.error = None
        ask(batcher, small_tokenizer, "Yağmur").take()
        assert batcher.explain_absence() is None


def test_numbers_that_are_not_finite_are_no_answer(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 2)
    with batching(decoder, small_tokenizer) as batcher:
        decoder.poison = True
        _, failed = ask(batcher, small_tokenizer, "Yağmur").take()
    assert isinstance(failed, Failed)
    assert "greatest logit is nan" in str(failed.error)


def test_a_mistake_of_ours_leaves_nobody_waiting(
    small_tokenizer: Tokenizer, model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    decoder = Watched(model, CONTEXT, 1)
    decoder.error = TypeError("a mistake")
    decoder.gate.clear()
    with batching(decoder, small_tokenizer) as batcher:
        inboxes = [ask(batcher, small_tokenizer, text[:9]) for text in TURKISH[:4]]
        decoder.gate.set()
        assert [type(inbox.take()[1]) for inbox in inboxes] == [Failed] * 4
        with pytest.raises(NotServingError):
            ask(batcher, small_tokenizer, "Yağmur")


def test_stopping_lets_running_answers_end_and_refuses_the_rest(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 1)
    with batching(decoder, small_tokenizer) as batcher:
        running = ask(batcher, small_tokenizer, "Yağmur", 30)
        running.events.get(timeout=30)
        decoder.gate.clear()
        waiting = ask(batcher, small_tokenizer, "Annem")
        batcher.stop(grace_s=60.0)
        with pytest.raises(NotServingError, match="stopping"):
            ask(batcher, small_tokenizer, "Doktor")
        decoder.gate.set()
        assert isinstance(running.take()[1], Finished)
        assert isinstance(waiting.take()[1], Failed)
        batcher.join()


def test_stopping_at_once_cuts_what_runs(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Watched(model, CONTEXT, 1)
    with batching(decoder, small_tokenizer) as batcher:
        running = ask(batcher, small_tokenizer, "Yağmur", 60)
        running.events.get(timeout=30)
        decoder.gate.clear()
        batcher.stop()
        decoder.gate.set()
        assert isinstance(running.take()[1], Failed)


def test_nothing_of_a_finished_job_is_kept(small_tokenizer: Tokenizer, model: Transformer) -> None:
    with batching(Decoder(model, CONTEXT, 3), small_tokenizer) as batcher:
        left = []
        for text in TURKISH:
            inbox = Inbox()
            left.append(weakref.ref(batcher.submit(order(small_tokenizer, text[:12], 3), inbox.events.put)))
            inbox.take()
        for _ in range(500):  # the batcher's thread holds the last one until its next look
            gc.collect()
            if not any(job() for job in left):
                break
            time.sleep(0.02)
        assert [job() for job in left] == [None] * len(left)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reused_slots_say_what_fresh_ones_would(small_tokenizer: Tokenizer, variant: str) -> None:
    model = small_model(small_tokenizer, variant)
    texts = [TURKISH[number % 3][: 10 + 9 * (number % 4)] for number in (0, 3, 6, 1, 9, 2, 0, 5)]
    with batching(Decoder(model, CONTEXT, 2), small_tokenizer) as batcher:
        for text in texts:
            expected = alone(model, small_tokenizer, order(small_tokenizer, text).ids, 6, CONTEXT)
            assert ask(batcher, small_tokenizer, text, 6).take()[0] == expected
