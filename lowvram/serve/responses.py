"""Builds OpenAI's response bodies and stream chunks as plain values; knows neither models nor connections.

Source: https://platform.openai.com/docs/api-reference/chat/object, …/chat/streaming, …/completions/object.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from lowvram.data.tokenizer import Tokenizer
from lowvram.serve.detokenizer import TokenLogprob
from lowvram.serve.prompt import ServedModel
from lowvram.serve.scheduler import Finished

Body = dict[str, Any]
DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # OpenAI's value for tokens that are nearly impossible; JSON has no infinity


def to_json(body: Body) -> bytes:
    """Return a body as JSON in ASCII, so that a lone surrogate in a model's or a client's text cannot make it fail."""
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


def to_event(body: Body) -> bytes:
    """Return a body as one server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Body:
    """Return OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def count_usage(prompt_tokens: int, finished: Finished) -> Body:
    """Return OpenAI's usage object: the token counts of one answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": finished.written,
        "total_tokens": prompt_tokens + finished.written,
        "prompt_tokens_details": {"cached_tokens": finished.reused},
    }


class ResponseBuilder:
    """Builds one answer's bodies: either `whole`, or for a stream `opening`, then `chunk`s and `usage`."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, served: ServedModel, prompt_tokens: int, wants_logprobs: bool, wants_usage: bool) -> None:
        self._tokenizer, self._prompt_tokens = served.tokenizer, prompt_tokens
        self._wants_logprobs, self._wants_usage = wants_logprobs, wants_usage
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def opening(self) -> list[Body]:
        """Return the chunks that come before the first piece."""
        return []

    def chunk(self, text: str, token_logprobs: Sequence[TokenLogprob], reason: str | None = None) -> Body:
        """Return the chunk of one piece of the answer; with `reason`, of its end."""
        usage = {"usage": None} if self._wants_usage else {}
        choice = {
            "index": 0,
            **self._delta(text, reason),
            "logprobs": self._logprobs(token_logprobs),
            "finish_reason": reason,
        }
        return {**self._head, "object": self.chunk_object, "choices": [choice], **usage}

    def usage(self, finished: Finished) -> list[Body]:
        """Return the last chunk, with the token counts, if the client asked for it."""
        if not self._wants_usage:
            return []
        usage = count_usage(self._prompt_tokens, finished)
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": usage}]

    def whole(self, text: str, token_logprobs: Sequence[TokenLogprob], finished: Finished) -> Body:
        """Return the body of an answer that is not streamed."""
        choice = {
            "index": 0,
            **self._message(text),
            "logprobs": self._logprobs(token_logprobs),
            "finish_reason": finished.reason,
        }
        usage = count_usage(self._prompt_tokens, finished)
        return {**self._head, "object": self.object, "choices": [choice], "usage": usage}

    def _delta(self, text: str, reason: str | None) -> Body:
        return {"text": text}

    def _message(self, text: str) -> Body:
        return {"text": text}

    def _logprobs(self, token_logprobs: Sequence[TokenLogprob]) -> Body | None:
        if not self._wants_logprobs:
            return None
        named = [[(self._name(id), _finite(value)) for id, value in one.logprobs.top] for one in token_logprobs]
        return {
            "tokens": [self._name(one.id) for one in token_logprobs],
            "token_logprobs": [_finite(one.logprobs.logprob) for one in token_logprobs],
            "top_logprobs": [dict(top) for top in named],
            "text_offset": [one.start for one in token_logprobs],
        }

    def _name(self, id: int) -> str:
        return name_token(self._tokenizer, id)


class ChatResponseBuilder(ResponseBuilder):
    """The same for /v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Body]:
        """Return the chunk that names the role."""
        body = self.chunk("", ())
        body["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return [body]

    def _delta(self, text: str, reason: str | None) -> Body:
        return {"delta": {"content": text} if text or reason is None else {}}

    def _message(self, text: str) -> Body:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, token_logprobs: Sequence[TokenLogprob]) -> Body | None:
        if not self._wants_logprobs:
            return None
        content = [
            {
                **self._entry(one.id, one.logprobs.logprob),
                "top_logprobs": [self._entry(id, value) for id, value in one.logprobs.top],
            }
            for one in token_logprobs
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float) -> Body:
        raw_bytes = list(self._tokenizer.token_bytes(id))
        return {"token": self._name(id), "logprob": _finite(logprob), "bytes": raw_bytes}


def name_token(tokenizer: Tokenizer, id: int) -> str:
    r"""Return a token's text; a token that is not valid UTF-8 is written as OpenAI does, bytes:\xc5."""
    raw_bytes = tokenizer.token_bytes(id)
    try:
        return raw_bytes.decode("utf-8") or f"<|{id}|>"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw_bytes)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
