"""What a client gets back: OpenAI's bodies and chunks, as plain values; knows neither models nor connections.

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
_LEAST_LOGPROB = -9999.0  # OpenAI's number for what is all but impossible; JSON has no infinity


def to_json(body: Body) -> bytes:
    """Return a body in ASCII: whatever a model or a client wrote, no half character can make it fail."""
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")


def to_event(body: Body) -> bytes:
    """Return a body as one server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Body:
    """Return OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def count_usage(prompt_tokens: int, ended: Finished) -> Body:
    """Return the counts of one answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": ended.written,
        "total_tokens": prompt_tokens + ended.written,
        "prompt_tokens_details": {"cached_tokens": ended.reused},
    }


class ResponseBuilder:
    """One answer's bodies: either `whole`, or `opening`, then chunks, `closing` and `usage`."""

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
        """Return what comes before the first piece."""
        return []

    def chunk(self, text: str, said: Sequence[TokenLogprob], reason: str | None = None) -> Body:
        """Return one piece of the answer, or its end."""
        usage = {"usage": None} if self._wants_usage else {}
        choice = {"index": 0, **self._delta(text, reason), "logprobs": self._logprobs(said), "finish_reason": reason}
        return {**self._head, "object": self.chunk_object, "choices": [choice], **usage}

    def usage(self, ended: Finished) -> list[Body]:
        """Return the last chunk, with the counts, where it was asked for."""
        if not self._wants_usage:
            return []
        usage = count_usage(self._prompt_tokens, ended)
        return [{**self._head, "object": self.chunk_object, "choices": [], "usage": usage}]

    def whole(self, text: str, said: Sequence[TokenLogprob], ended: Finished) -> Body:
        """Return the whole answer at once."""
        choice = {
            "index": 0,
            **self._message(text),
            "logprobs": self._logprobs(said),
            "finish_reason": ended.reason,
        }
        usage = count_usage(self._prompt_tokens, ended)
        return {**self._head, "object": self.object, "choices": [choice], "usage": usage}

    def _delta(self, text: str, reason: str | None) -> Body:
        return {"text": text}

    def _message(self, text: str) -> Body:
        return {"text": text}

    def _logprobs(self, said: Sequence[TokenLogprob]) -> Body | None:
        if not self._wants_logprobs:
            return None
        named = [[(self._name(id), _finite(value)) for id, value in one.logprobs.top] for one in said]
        return {
            "tokens": [self._name(one.id) for one in said],
            "token_logprobs": [_finite(one.logprobs.logprob) for one in said],
            "top_logprobs": [dict(top) for top in named],
            "text_offset": [one.start for one in said],
        }

    def _name(self, id: int) -> str:
        return name_token(self._tokenizer, id)


class ChatResponseBuilder(ResponseBuilder):
    """The same of a conversation's answer."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Body]:
        """Return the chunk that says who speaks."""
        body = self.chunk("", ())
        body["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return [body]

    def _delta(self, text: str, reason: str | None) -> Body:
        return {"delta": {"content": text} if text or reason is None else {}}

    def _message(self, text: str) -> Body:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, said: Sequence[TokenLogprob]) -> Body | None:
        if not self._wants_logprobs:
            return None
        content = [
            {
                **self._entry(one.id, one.logprobs.logprob),
                "top_logprobs": [self._entry(id, value) for id, value in one.logprobs.top],
            }
            for one in said
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float) -> Body:
        spelled = list(self._tokenizer.token_bytes(id))
        return {"token": self._name(id), "logprob": _finite(logprob), "bytes": spelled}


def name_token(tokenizer: Tokenizer, id: int) -> str:
    r"""Return a token's text; one that is no whole text is written as OpenAI does, bytes:\xc5."""
    spelled = tokenizer.token_bytes(id)
    try:
        return spelled.decode("utf-8") or f"<|{id}|>"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
