"""Many clients at once, and clients that go away: everyone is answered, nothing is mixed, everything comes back."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
import weakref
from typing import Any

import httpx
import pytest
import torch

from lowvram.data.tokenizer import SMALLEST, Tokenizer
from lowvram.generate.decoder import Decoder
from lowvram.model.transformer import Transformer
from lowvram.serve import scheduler as scheduler_module
from tests.conftest import TURKISH
from tests.serve.place import Place, alone, served, small_model

CLIENTS = 200
_LETTER = SMALLEST - 256 + ord("a") - ord("!")  # byte-level vocabularies begin with the printable ASCII characters


@pytest.fixture(scope="module")
def model(small_tokenizer: Tokenizer) -> Transformer:
    return small_model(small_tokenizer)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[scheduler_module.ActiveJob]]:
    """Weak references to every job that is made."""
    found: list[weakref.ref[scheduler_module.ActiveJob]] = []
    make = scheduler_module.ActiveJob.__init__

    def note(self: scheduler_module.ActiveJob, *words: Any) -> None:
        make(self, *words)
        found.append(weakref.ref(self))

    monkeypatch.setattr(scheduler_module.ActiveJob, "__init__", note)
    return found


def wait_until(is_so: Any) -> None:
    """Wait for another thread, with a bound that no working one comes near."""
    end = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def body_of(number: int, streams: bool) -> dict[str, Any]:
    return {"prompt": f"{number} {TURKISH[number % 16][:12]}", "max_tokens": 4, "temperature": 0, "stream": streams}


async def ask_all(place: Place) -> list[tuple[int, str]]:
    """Let all clients ask at the same moment, every other one for a stream; returns status and text of each."""
    limits = httpx.Limits(max_connections=None)

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[int, str]:
        streams = number % 2 == 1
        answer = await client.post("/v1/completions", json=body_of(number, streams))
        if answer.status_code != 200:
            return answer.status_code, answer.headers.get("Retry-After", "")
        if not streams:
            return 200, answer.json()["choices"][0]["text"]
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        return 200, "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])

    async with httpx.AsyncClient(base_url=place.url, limits=limits, timeout=120.0, trust_env=False) as client:
        return await asyncio.gather(*(ask(client, number) for number in range(CLIENTS)))


@pytest.mark.nightly
@pytest.mark.parametrize("queue", [300, 20], ids=["all fit", "most do not"])
def test_two_hundred_clients_at_once_are_all_answered_and_nothing_is_mixed(
    small_tokenizer: Tokenizer, model: Transformer, jobs: list[weakref.ref[scheduler_module.ActiveJob]], queue: int
) -> None:
    with served(small_tokenizer, decoder=Decoder(model, 64, 16), max_context=64, queue=queue) as place:
        answers = asyncio.run(ask_all(place))
        wait_until(place.is_idle)
        gc.collect()
        assert [job() for job in jobs if job() is not None] == []
    told = [(number, text) for number, (status, text) in enumerate(answers) if status == 200]
    refused = [(status, text) for status, text in answers if status != 200]
    assert set(refused) <= {(429, "2")}
    assert len(told) >= min(CLIENTS, 16 + queue)
    for number, text in told[:: max(1, len(told) // 40)]:
        ids = [small_tokenizer.bos_id, *small_tokenizer.encode(body_of(number, False)["prompt"])]
        assert text == alone(model, small_tokenizer, ids, 4, 64)


class Slow(Decoder):
    """A decoder whose model writes one letter without end, and that can be held between two tokens."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.steps = threading.Semaphore(0)
        self.is_free = False

    def prefill(self, slot: int, token_T: Any) -> Any:
        return self._letter(super().prefill(slot, token_T))

    def decode_one_token(self, slot_N: Any, token_N: Any) -> Any:
        if not self.is_free:
            self.steps.acquire(timeout=30)
        return self._letter(super().decode_one_token(slot_N, token_N))

    def _letter(self, logits: Any) -> Any:
        return torch.eye(self.model.config.vocabulary)[_LETTER] * logits.abs().amax(-1, keepdim=True) * 99

    def let_go(self) -> None:
        """Hold nothing any more."""
        self.is_free = True
        self.steps.release()


@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_a_client_that_goes_away_frees_its_slot(
    small_tokenizer: Tokenizer, model: Transformer, jobs: list[weakref.ref[scheduler_module.ActiveJob]], streams: bool
) -> None:
    decoder = Slow(model, 5000, 1)
    with served(small_tokenizer, decoder=decoder, max_context=5000) as place, place.http() as http:
        body = {"prompt": "Kış", "max_tokens": 4900, "stream": streams}
        with httpx.Client(base_url=place.url, trust_env=False) as client:
            if streams:
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/completions", json=body, timeout=0.5)
        decoder.let_go()
        wait_until(place.is_idle)
        gc.collect()
        assert [job() for job in jobs if job() is not None] == []
        wait_until(lambda: 'status="499"} 1' in http.get("/metrics").text)
        assert http.post("/v1/completions", json=body | {"max_tokens": 2, "stream": False}).status_code == 200


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(
    small_tokenizer: Tokenizer, model: Transformer
) -> None:
    decoder = Slow(model, 5000, 1)
    with served(small_tokenizer, decoder=decoder, max_context=5000) as place, place.http() as http:
        with http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 4900, "stream": True}) as first:
            next(first.iter_lines())
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{place.url}/v1/completions", json={"prompt": "b"}, timeout=0.5, trust_env=False)
            wait_until(lambda: place.scheduler.waiting == 0)
            assert place.scheduler.running == 1
        decoder.let_go()
        wait_until(place.is_idle)


def test_a_model_that_fails_is_503_before_the_answer_and_an_event_within(
    small_tokenizer: Tokenizer, model: Transformer
) -> None:
    decoder = Slow(model, 200, 1)
    with served(small_tokenizer, decoder=decoder, max_context=200) as place, place.http() as http:
        body = {"prompt": "Kış", "max_tokens": 50, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            decoder.decode_one_token = None  # type: ignore[method-assign,assignment]
            decoder.decode_one_token = fail  # type: ignore[method-assign]
            decoder.let_go()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "not_serving"
        answer = http.post("/v1/completions", json=body | {"prompt": [5]})
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
        assert answer.headers["Retry-After"] == "2"


def fail(*_: Any) -> Any:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_stopping_ends_running_answers_and_the_server(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Slow(model, 5000, 1)
    with served(small_tokenizer, decoder=decoder, max_context=5000, grace_s=60.0) as place, place.http() as http:
        body = {"prompt": "Kış", "max_tokens": 40, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            place.server.handle_exit(2, None)
            decoder.let_go()
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_stopping_twice_cuts_them_and_says_so(small_tokenizer: Tokenizer, model: Transformer) -> None:
    decoder = Slow(model, 5000, 1)
    with served(small_tokenizer, decoder=decoder, max_context=5000, grace_s=60.0) as place, place.http() as http:
        body = {"prompt": "Kış", "max_tokens": 4900, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            for _ in range(2):
                place.server.handle_exit(2, None)
            decoder.let_go()
            rest = [line for line in lines if line]
    assert "stopping" in json.loads(rest[-1].removeprefix("data: "))["error"]["message"]
