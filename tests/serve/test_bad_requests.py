"""What cannot be meant is refused in OpenAI's form of an error, naming the field; none is the server's fault."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowvram.data.tokenizer import Tokenizer
from tests.serve.place import Place, served

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Kış", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Kış"}], "max_tokens": 2},
}
COMPLETIONS, CHAT = GOOD
# path, what is added to a good body, the field that is named, and a word of the message
WRONG: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a number as text": (COMPLETIONS, {"temperature": "0.5"}, "temperature", "takes a number"),
    "a truth as a number": (COMPLETIONS, {"max_tokens": True}, "max_tokens", "takes a whole number"),
    "half a token": (CHAT, {"max_tokens": 1.5}, "max_tokens", "takes a whole number"),
    "no tokens": (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "takes 1 or more"),
    "more tokens than the server writes": (CHAT, {"max_tokens": 5000}, "max_tokens", "at most 95"),
    "cold below zero": (CHAT, {"temperature": -1}, "temperature", "takes 0 or more"),
    "top_p above one": (COMPLETIONS, {"top_p": 1.5}, "top_p", "takes 1 or less"),
    "an unknown field": (COMPLETIONS, {"temprature": 1}, "temprature", "Did you mean temperature"),
    "an unknown field of a message": (
        CHAT,
        {"messages": [{"role": "user", "content": "a", "colour": 1}]},
        "messages.0.colour",
        "no field",
    ),
    "an unknown role": (CHAT, {"messages": [{"role": "kral", "content": "a"}]}, "messages.0.role", "'assistant'"),
    "a message without content": (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
    "a picture": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
        "messages.0.content.0.type",
        "'text'",
    ),
    "a tool's answer": (
        CHAT,
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]},
        "messages.0.tool_calls",
        "None",
    ),
    "no messages": (CHAT, {"messages": []}, "messages", "at least 1"),
    "messages that are text": (CHAT, {"messages": "Merhaba"}, "messages", "takes a list"),
    "two answers": (CHAT, {"n": 2}, "n", "does not support that"),
    "true answers": (CHAT, {"n": True}, "n", "does not support that"),
    "a penalty": (COMPLETIONS, {"frequency_penalty": 0.5}, "frequency_penalty", "does not support that"),
    "an echo": (COMPLETIONS, {"echo": True}, "echo", "does not support that"),
    "tools": (CHAT, {"tools": [{"type": "function"}]}, "tools", "does not support that"),
    "JSON mode": (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "does not support that"),
    "a bias": (COMPLETIONS, {"logit_bias": {"5": 100}}, "logit_bias", "does not support that"),
    "two prompts": (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt", "one prompt at a time"),
    "a prompt of truths": (COMPLETIONS, {"prompt": [True]}, "prompt", "token ids"),
    "a prompt of everything": (COMPLETIONS, {"prompt": [["a"], 1]}, "prompt", "one prompt"),
    "a prompt that is an object": (COMPLETIONS, {"prompt": {}}, "prompt", "token ids"),
    "no ids": (COMPLETIONS, {"prompt": []}, "prompt", "no ids"),
    "an id beyond the vocabulary": (COMPLETIONS, {"prompt": [1, 10**6]}, "prompt", "holds the id 1000000"),
    "an id below it": (COMPLETIONS, {"prompt": [-1]}, "prompt", "holds the id -1"),
    "half a character": (COMPLETIONS, {"prompt": "\ud800"}, "prompt", "half a character"),
    "half a character of a message": (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a\udc00"}]},
        "messages.1.content",
        "half a character",
    ),
    "half a character of a part": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]},
        "messages.0.content.0.text",
        "half a character",
    ),
    "two halves in two parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": half} for half in "\ud83d\ude00"]}]},
        "messages.0.content.0.text",
        "half a character",
    ),
    "half a character of a name": (
        CHAT,
        {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]},
        "messages.0.name",
        "half a character",
    ),
    "half a character of a stop": (COMPLETIONS, {"stop": "\ud800"}, "stop", "half a character"),
    "half a character of a second stop": (CHAT, {"stop": ["a", "\ud800"]}, "stop.1", "half a character"),
    "half a character of a role": (CHAT, {"messages": [{"role": "\ud800"}]}, "messages.0.role", "valid Unicode"),
    "half a character of a field's name": (
        COMPLETIONS,
        {"temperature\ud800": 1},
        "temperature\ud800",
        "Did you mean temperature",
    ),
    "half a character of a message's field": (
        CHAT,
        {"messages": [{"role": "user", "content": "a", "\ud800": 1}]},
        "messages.0.\ud800",
        "no field",
    ),
    "half a character of another's field": (COMPLETIONS, {"suffix": "\ud800"}, "suffix", "does not support that"),
    "an empty stop": (COMPLETIONS, {"stop": ["a", ""]}, "stop.1", "at least 1"),
    "too many stops": (COMPLETIONS, {"stop": ["a"] * 17}, "stop", "at most 16"),
    "chances beside nothing": (CHAT, {"top_logprobs": 2}, "top_logprobs", "logprobs is not true"),
    "too many chances": (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "takes 20 or less"),
    "chances by truth": (COMPLETIONS, {"logprobs": True}, "logprobs", "takes a whole number"),
    "options of no stream": (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
    "a seed beyond 64 bits": (CHAT, {"seed": 2**63}, "seed", "a number below 9,223"),
    "another model": (CHAT, {"model": "gpt-5"}, "model", "'small' alone"),
    "half a character of a model": (CHAT, {"model": "\ud800"}, "model", "'small' alone"),
}
BODIES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not JSON"),
    "half an object": (b'{"prompt": "a"', "not JSON"),
    "a list": (b"[1]", "holds a list, not an object"),
    "a word": (b'"prompt"', "holds a string, not an object"),
    "Latin-1": ('{"prompt": "Iğdır"}'.encode("cp1254"), "not UTF-8 at byte 13"),
    "nested": (b'{"prompt": ' + b"[" * 39_000, "nested deeper than 16"),
    "nested fields": (b'{"a":' * 39_000 + b"1" + b"}" * 39_000, "nested deeper than 16"),
    "nested without end": (b'{"prompt": ' + b"[" * 4_000_000, "4,000,001 lists and objects"),
    "an endless number": (b'{"seed": ' + b"9" * 10_000 + b"}", "not JSON"),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number"),
    "infinity": (b'{"prompt": "a", "temperature": 1e999}', "finite number"),
}


@pytest.fixture(scope="module")
def place(small_tokenizer: Tokenizer) -> Iterator[Place]:
    with served(small_tokenizer) as place:
        yield place


@pytest.fixture(scope="module")
def http(place: Place) -> Iterator[httpx.Client]:
    with place.http() as client:
        yield client


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """Return the error of an answer that is one, in the form that OpenAI's clients read."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 600
    return error


@pytest.mark.parametrize("path, added, param, word", WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_named(http: httpx.Client, path: str, added: dict[str, Any], param: str, word: str) -> None:
    content = json.dumps(GOOD[path] | added)
    error = refused(http.post(path, content=content), 404 if param == "model" else 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert word in error["message"]


@pytest.mark.parametrize("body, word", BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_request_is_refused(http: httpx.Client, body: bytes, word: str) -> None:
    assert word in refused(http.post(COMPLETIONS, content=body))["message"]


def test_a_missing_field_is_named(http: httpx.Client) -> None:
    assert refused(http.post(CHAT, content=b"{}"))["param"] == "messages"
    assert refused(http.post(COMPLETIONS, content=b"{}"))["param"] == "prompt"


@pytest.mark.parametrize(
    "added",
    [
        {"user": "a", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"},
        {"n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
        {"temperature": None, "stop": None, "stream": None, "seed": None, "stream_options": None, "n": None},
        {"temperature": 2, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.2, "seed": -5},
    ],
    ids=["harmless", "asking for nothing", "null", "samplers"],
)
@pytest.mark.parametrize("path", GOOD)
def test_fields_that_change_nothing_here_are_taken(http: httpx.Client, path: str, added: dict[str, Any]) -> None:
    answer = http.post(path, json=GOOD[path] | added)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 2


@pytest.mark.parametrize("prompt", ["a " * 1_000_000, "a" * 2_000_000, [5] * 1_000_000], ids=["words", "text", "ids"])
def test_a_million_tokens_are_refused(http: httpx.Client, prompt: Any) -> None:
    error = refused(http.post(COMPLETIONS, content=json.dumps({"prompt": prompt}, separators=(",", ":"))))
    assert error["code"] == "context_length_exceeded"
    assert "tokens" in error["message"]


def test_a_conversation_of_a_million_tokens_is_refused(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "a " * 100}] * 10_000}
    assert refused(http.post(CHAT, json=body))["code"] == "context_length_exceeded"
    body = {"messages": [{"role": "user", "content": "a " * 1_000_000}], "truncation": "auto"}
    assert refused(http.post(CHAT, json=body))["code"] == "context_length_exceeded"


def test_of_a_long_prompt_that_may_be_cut_the_end_is_read(http: httpx.Client) -> None:
    body = {"prompt": "a " * 1_000_000, "truncation": "auto", "max_tokens": 2}
    assert http.post(COMPLETIONS, json=body).json()["usage"]["prompt_tokens"] == 94


def test_a_body_above_the_limit_is_refused_whether_or_not_it_tells_its_length(small_tokenizer: Tokenizer) -> None:
    with served(small_tokenizer, body_bytes=1000) as place, place.http() as http:
        for size, status in ((1000, 200), (1001, 413), (16_000, 413)):
            body = json.dumps(GOOD[COMPLETIONS]).encode().ljust(size)
            assert http.post(COMPLETIONS, content=body).status_code == status
        # So much is not read to its end, and a reset may come before the answer.
        with contextlib.suppress(httpx.NetworkError):
            assert http.post(COMPLETIONS, content=bytes(100_000)).status_code == 413
        body = json.dumps({"prompt": "a" * 2000}).encode()
        assert "1000 bytes" in refused(http.post(COMPLETIONS, content=body), 413)["message"]
        chunks = iter([body[:500], body[500:]])
        assert "1000 bytes" in refused(http.post(COMPLETIONS, content=chunks), 413)["message"]
        assert http.post(COMPLETIONS, json=GOOD[COMPLETIONS]).status_code == 200


def test_a_hundred_thousand_wrong_fields_are_one_error(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "a", **{f"f{number}": 1 for number in range(100_000)}}]}
    assert "no field" in refused(http.post(CHAT, json=body))["message"]
    assert refused(http.post(CHAT, json=GOOD[CHAT] | {"x" * 100_000: 1}))["param"] == "x" * 60
    assert refused(http.post(COMPLETIONS, json={"prompt": [0.5] * 100_000}))["param"] == "prompt"


def test_other_paths_and_methods_are_errors_of_the_same_form(http: httpx.Client) -> None:
    assert "/v1/embeddings" in refused(http.post("/v1/embeddings", json={}), 404)["message"]
    assert "GET" in refused(http.get(COMPLETIONS), 405)["message"]
    assert refused(http.get("/../../etc/passwd"), 404)["type"] == "invalid_request_error"


_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["text", "user"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "seed",
        "truncation",
        "logprobs",
        "top_logprobs",
        "n",
        "user",
        "tools",
        "response_format",
        "role",
        "content",
    ]
)
_MESSAGE = st.dictionaries(st.sampled_from(["role", "content", "name", "type"]), _VALUE, max_size=3)


@pytest.mark.default_cases("/v1/completions")
@pytest.mark.parametrize("path", GOOD)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(added=st.dictionaries(_FIELDS, _VALUE | st.lists(_MESSAGE, max_size=2), max_size=4))
def test_no_body_is_the_servers_fault(http: httpx.Client, path: str, added: dict[str, Any]) -> None:
    answer = http.post(path, content=json.dumps(GOOD[path] | added))
    assert answer.status_code in (200, 400, 404), (added, answer.text)
    if answer.status_code != 200:
        assert refused(answer, answer.status_code)["message"]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "replace")))
def test_no_bytes_are_the_servers_fault(http: httpx.Client, body: bytes) -> None:
    refused(http.post(CHAT, content=body))


def test_after_all_that_nobody_is_being_answered(place: Place, http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok", "model": "small", "running": 0, "waiting": 0, "slots": 4}
    assert place.is_idle()
