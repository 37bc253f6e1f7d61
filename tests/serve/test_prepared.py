"""What a request asks of the server before the model reads it is little, and done beside everybody else's requests."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from lowvram.data.tokenizer import Tokenizer
from lowvram.serve import app, prompt
from lowvram.serve.body import check_shape, read_body_object
from lowvram.serve.limits import (
    LONGEST_STOP,
    MOST_COMMAS,
    MOST_CONTAINERS,
    MOST_FIELDS,
    MOST_LEVELS,
    MOST_MESSAGES,
    MOST_PARTS,
    MOST_STOPS,
    MOST_TOP,
    PREPARED_AT_ONCE,
    Limits,
)
from lowvram.serve.prompt import MOST_COMPOSED, ServedModel, Turn, make_job
from lowvram.serve.schemas import ChatRequest, CompletionRequest, RequestError, read_request
from lowvram.storage.json_files import JsonError
from tests.serve.place import Place, served, speak
from tests.serve.test_crowd import wait_until

LIMITS = Limits(prompt_tokens=63, output_tokens=63)
CHAT = {"messages": [{"role": "user", "content": "Kış"}], "max_tokens": 2}


def served_by(tokenizer: Tokenizer, encode: Callable[[Sequence[Turn]], list[int]] | None = None) -> ServedModel:
    return ServedModel("small", "fp_test", tokenizer, 64, encode or (lambda turns: speak(tokenizer, turns)))


def ask_chat(messages: list[dict[str, Any]], **added: Any) -> ChatRequest:
    return read_request(ChatRequest, json.dumps({"messages": messages, "max_tokens": 2, **added}).encode())


def turns(count: int, content: str = "") -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[number % 2], "content": content} for number in range(count)]


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that was normalised."""
    texts = list[str]()
    monkeypatch.setattr(prompt, "nfc", lambda text: texts.append(text) or unicodedata.normalize("NFC", text))
    return texts


def longest(tokenizer: Tokenizer) -> int:
    return served_by(tokenizer).longest_token_bytes


@pytest.mark.parametrize("times", [1, 100])
def test_a_text_that_cannot_fit_is_refused_before_anything_is_normalised(
    small_tokenizer: Tokenizer, normalised: list[str], times: int
) -> None:
    served, room = served_by(small_tokenizer), LIMITS.prompt_tokens
    most = MOST_COMPOSED * room * longest(small_tokenizer)
    text = "\u0301" * (most * times + 1)
    for ask in (CompletionRequest(prompt=text), ask_chat([{"role": "user", "content": text}])):
        with pytest.raises(RequestError, match="at least") as got:
            make_job(ask, served, LIMITS)
        assert got.value.code == "context_length_exceeded"
    assert normalised == []


def test_a_text_at_the_limit_is_normalised_and_then_refused_by_its_bytes(
    small_tokenizer: Tokenizer, normalised: list[str]
) -> None:
    text = "a\u0301" * (LIMITS.prompt_tokens * longest(small_tokenizer))
    with pytest.raises(RequestError, match="at least 126 tokens"):
        make_job(CompletionRequest(prompt=text), served_by(small_tokenizer), LIMITS)
    assert normalised == [text]


def test_of_a_text_that_may_be_cut_only_the_end_is_normalised(
    small_tokenizer: Tokenizer, normalised: list[str]
) -> None:
    served, content = served_by(small_tokenizer), "Kış geldi. "
    order = make_job(CompletionRequest(prompt=content * 10**5, truncation="auto", max_tokens=2), served, LIMITS)
    whole = small_tokenizer.encode(unicodedata.normalize("NFC", content * 10**3))
    assert list(order.ids) == [small_tokenizer.bos_id, *whole[-(len(order.ids) - 1) :]]
    assert sum(map(len, normalised)) <= MOST_COMPOSED * 64 * longest(small_tokenizer)
    normalised.clear()
    messages = [*turns(5000, "Kış geldi."), {"role": "user", "content": "Sonra?"}]
    make_job(ask_chat(messages, truncation="auto"), served, LIMITS)
    assert sum(map(len, normalised)) <= MOST_COMPOSED * 64 * longest(small_tokenizer)


def test_normalising_makes_a_text_shorter_by_less_than_the_check_allows() -> None:
    """Any text with a given normal form decomposes into the same points, each perhaps written as a longer one."""
    spelled = defaultdict[str, int](int)
    composed = list[str]()
    for code in [*range(0xD800), *range(0xE000, 0x30000)]:
        character = chr(code)
        decomposed = unicodedata.normalize("NFD", character)
        if len(decomposed) == 1:
            spelled[decomposed] = max(spelled[decomposed], len(character.encode()))
        if unicodedata.normalize("NFC", character) == character:
            composed.append(character)
    worst = max(
        sum(spelled[part] for part in unicodedata.normalize("NFD", character)) / len(character.encode())
        for character in composed
    )
    assert 1 < worst <= MOST_COMPOSED


@pytest.mark.parametrize("count", [2, 100, MOST_MESSAGES])
def test_a_long_conversation_is_rendered_few_times(small_tokenizer: Tokenizer, count: int) -> None:
    rendered = list[int]()

    def encode(turns: Sequence[Turn]) -> list[int]:
        rendered.append(len(turns))
        return [5] * len(turns)

    order = make_job(ask_chat(turns(count), truncation="auto"), served_by(small_tokenizer, encode), LIMITS)
    assert len(rendered) <= 2 + math.log2(count)
    # Turns go by twos, so that a user begins; two tokens are left for the answer.
    assert len(order.ids) == min(count, 62)


def test_work_on_a_conversation_ends_when_nobody_waits_for_it(small_tokenizer: Tokenizer) -> None:
    rendered = list[int]()

    def encode(turns: Sequence[Turn]) -> list[int]:
        rendered.append(len(turns))
        return [5] * 10**4

    def go_on() -> None:
        if len(rendered) == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        make_job(ask_chat(turns(1000), truncation="auto"), served_by(small_tokenizer, encode), LIMITS, go_on)
    assert len(rendered) == 2


@pytest.mark.parametrize("count", [MOST_MESSAGES, MOST_MESSAGES + 1, 100 * MOST_MESSAGES])
def test_messages_are_counted_before_they_are_looked_at(count: int) -> None:
    message = {"role": "user", "content": ""}
    if count <= MOST_MESSAGES:
        assert len(ask_chat([message] * count).messages) == count
        return
    with pytest.raises(RequestError, match=r"at most 10,000|no request needs more"):
        ask_chat([message] * count)


@pytest.mark.parametrize("count", [MOST_PARTS, MOST_PARTS + 1, 100 * MOST_PARTS])
def test_parts_of_messages_are_counted_together(count: int) -> None:
    part = {"type": "text", "text": "a"}
    messages = [{"role": "user", "content": [part] * 1}, {"role": "user", "content": [part] * (count - 1)}]
    if count <= MOST_PARTS:
        assert [len(message.text) for message in ask_chat(messages).messages] == [1, count - 1]
        return
    with pytest.raises(RequestError, match=r"at most 10,000|no request needs more"):
        ask_chat(messages)


@pytest.mark.parametrize("times", [1, 100])
@pytest.mark.parametrize(
    "fields, most, param",
    [
        (lambda count: {"stop": ["a"] * count}, MOST_STOPS, "stop"),
        (lambda count: {"stop": "a" * count}, LONGEST_STOP, "stop"),
        (lambda count: {"logprobs": True, "top_logprobs": count}, MOST_TOP, "top_logprobs"),
        (lambda count: {"max_tokens": count}, LIMITS.output_tokens, "max_tokens"),
    ],
    ids=["stops", "letters of a stop", "chances", "tokens"],
)
def test_a_field_at_its_limit_is_taken_and_beyond_it_named(
    small_tokenizer: Tokenizer, fields: Callable[[int], dict[str, Any]], most: int, param: str, times: int
) -> None:
    def make(count: int) -> None:
        ask = read_request(ChatRequest, json.dumps(CHAT | fields(count)).encode())
        make_job(ask, served_by(small_tokenizer), LIMITS)

    make(most)
    with pytest.raises(RequestError) as got:
        make(most * times + (times == 1))
    assert got.value.param == param
    assert len(str(got.value)) < 400


@pytest.mark.parametrize("levels", [MOST_LEVELS, MOST_LEVELS + 1, 100 * MOST_LEVELS])
def test_a_body_may_be_nested_so_deep_and_no_deeper(levels: int) -> None:
    body = b'{"":' * levels + b"1" + b"}" * levels
    if levels <= MOST_LEVELS:
        assert read_body_object(body)
    else:
        with pytest.raises(JsonError, match=f"deeper than {MOST_LEVELS} levels"):
            read_body_object(body)


@pytest.mark.parametrize(
    "values, word, most",
    [
        ("[],", "lists", MOST_CONTAINERS),
        ("{:1},", "lists", MOST_CONTAINERS),
        (":1,", "fields", MOST_FIELDS),
        (",", "commas", MOST_COMMAS),
    ],
    ids=["lists", "objects", "fields", "numbers"],
)
def test_a_body_of_many_values_is_refused_before_it_is_parsed(values: str, word: str, most: int) -> None:
    for count in (most, most + 1, 100 * most):
        body = values.encode() * count
        if count <= most:
            check_shape(body)
        else:
            with pytest.raises(JsonError, match=f"{count:,} {word}"):
                check_shape(body)


def test_brackets_and_quotes_within_a_text_are_no_values() -> None:
    text = '[{":,,,,\\' * 300_000 + '"'
    check_shape(json.dumps({"prompt": text}).encode())
    assert read_request(CompletionRequest, json.dumps({"prompt": text}).encode()).prompt == text
    with pytest.raises(RequestError, match="strings"):
        read_request(CompletionRequest, b'""' * (2 * MOST_FIELDS + 1))


@pytest.mark.parametrize(
    "fields",
    [
        {f"f{number}": 1 for number in range(100_000)},
        {"stream_options": {f"f{number}": 1 for number in range(100_000)}},
        {"messages": [{"role": "user", "content": "a"} | {f"f{number}": 1 for number in range(100_000)}]},
        {"messages": [{"role": "user", "content": [{f"f{number}": 1 for number in range(100_000)}]}]},
    ],
    ids=["request", "stream_options", "message", "part"],
)
def test_of_many_unknown_fields_one_is_named_and_no_other_is_looked_at(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatRequest, "model_validate", None)
    with pytest.raises(RequestError, match=r"f0 is no field") as got:
        read_request(ChatRequest, json.dumps(CHAT | fields).encode())
    assert got.value.param is not None
    assert got.value.param.endswith("f0")


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {"a": ["x" * 100] * 10_000}},
        {"max_tokens": 10**4000},
        {"model": ["x" * 10**6]},
        {"n": [[1] * 99]},
    ],
    ids=["nested", "digits", "list", "lists"],
)
def test_no_value_makes_an_error_long(small_tokenizer: Tokenizer, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as got:
        make_job(read_request(ChatRequest, json.dumps(CHAT | fields).encode()), served_by(small_tokenizer), LIMITS)
    assert len(str(got.value)) < 400


def test_an_assistants_turn_may_be_null_and_no_other(small_tokenizer: Tokenizer) -> None:
    messages = [CHAT["messages"][0], {"role": "assistant", "content": None}, CHAT["messages"][0]]
    empty = [*messages[:1], {"role": "assistant", "content": ""}, *messages[2:]]
    served = served_by(small_tokenizer)
    assert make_job(ask_chat(messages), served, LIMITS).ids == make_job(ask_chat(empty), served, LIMITS).ids
    for role in ("user", "system", "developer"):
        with pytest.raises(RequestError, match="null") as got:
            ask_chat([messages[0], {"role": role, "content": None}])
        assert got.value.param == "messages.1.content"


class Held:
    """An encoder of conversations that works until it is let go."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.may_go = tokenizer, threading.Event()
        self.started, self.ended = 0, 0

    def __call__(self, turns: Sequence[Turn]) -> list[int]:
        """Return too many ids, when it may."""
        self.started += 1
        self.may_go.wait(30)
        self.ended += 1
        return [5] * 1000


@contextmanager
def holding(tokenizer: Tokenizer, queue: int = 300) -> Iterator[tuple[Place, httpx.Client, Held]]:
    held = Held(tokenizer)
    with served(tokenizer, encode_chat=held, slots=1, queue=queue) as place, place.http() as http:
        try:
            yield place, http, held
        finally:
            held.may_go.set()


def ask_and_leave(place: Place, **added: Any) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{place.url}/v1/chat/completions", json=CHAT | added, timeout=0.3, trust_env=False)


def test_others_are_answered_while_a_conversation_is_worked_on(small_tokenizer: Tokenizer) -> None:
    with holding(small_tokenizer) as (place, http, held):
        for _ in range(PREPARED_AT_ONCE + 1):
            ask_and_leave(place)
        assert http.get("/health").json()["status"] == "ok"
        assert held.started == PREPARED_AT_ONCE, "so many are worked on at once, the third waits"
        assert all(one.daemon for one in threading.enumerate() if one.name == "lowvram-request")
        wait_until(lambda: 'completions",status="499"} 3' in http.get("/metrics").text)
        held.may_go.set()
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 400
        assert held.started == PREPARED_AT_ONCE + 1, "the third had left before it came to it"


def test_work_for_a_client_that_left_ends_at_its_next_step(small_tokenizer: Tokenizer) -> None:
    with holding(small_tokenizer) as (place, http, held):
        ask_and_leave(place, messages=turns(1000), truncation="auto")
        wait_until(lambda: 'completions",status="499"} 1' in http.get("/metrics").text)
        held.may_go.set()
        wait_until(lambda: held.ended == 1)
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 400
        assert held.started == 2, "the one that left tried one conversation, of ten that it would have"


def test_so_many_requests_wait_to_be_worked_on_and_no_more(small_tokenizer: Tokenizer) -> None:
    def ask(timeout_s: float) -> int | None:
        with contextlib.suppress(httpx.ReadTimeout):
            url = f"{place.url}/v1/chat/completions"
            return httpx.post(url, json=CHAT, timeout=timeout_s, trust_env=False).status_code
        return None

    with holding(small_tokenizer, queue=0) as (place, _, held):
        threads = [threading.Thread(target=ask, args=(30.0,)) for _ in range(PREPARED_AT_ONCE + 1)]
        for thread in threads:
            thread.start()
        wait_until(lambda: held.started == PREPARED_AT_ONCE)
        # With one slot and no queue one may wait.
        wait_until(lambda: ask(0.3) == 429)
        held.may_go.set()
        for thread in threads:
            thread.join()
        assert ask(30.0) == 400, "there is room again"


def test_a_server_that_is_asked_to_end_does_not_wait_for_a_conversation(small_tokenizer: Tokenizer) -> None:
    with holding(small_tokenizer) as (place, _, held):
        ask_and_leave(place, messages=turns(1000), truncation="auto")
        wait_until(lambda: held.started == 1)
        place.server.handle_exit(2, None)
        wait_until(lambda: place.batcher.explain_stop() is not None)
        held.may_go.set()
    assert held.ended == held.started == 1


def test_a_mistake_in_the_work_is_a_500_and_the_next_is_answered(
    small_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with served(small_tokenizer) as place, place.http() as http:
        real = app.make_job
        monkeypatch.setattr(app, "make_job", lambda *_: 1 / 0)
        for _ in range(PREPARED_AT_ONCE + 1):
            answer = http.post("/v1/chat/completions", json=CHAT)
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        monkeypatch.setattr(app, "make_job", real)
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
