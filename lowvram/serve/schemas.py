"""The request bodies that a client may send: OpenAI's, without fields that mean nothing here; knows no tokens.

Source of the names and defaults: https://platform.openai.com/docs/api-reference/chat/create and …/completions/create.
top_k, min_p, repetition_penalty and truncation are this server's own; a client sends them as `extra_body`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from lowvram.config.allowed import describe_allowed
from lowvram.errors import LowvramError, name_nearest
from lowvram.serve.body import read_body_object
from lowvram.serve.limits import LONGEST_STOP, MOST_MESSAGES, MOST_PARTS, MOST_STOPS, MOST_TOP
from lowvram.storage.json_files import JsonError, name_kind

_SHOWN_CHARACTERS = 60  # how much of a client's value an error repeats
# OpenAI's fields that change no answer here; they are ignored.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
}
# OpenAI's fields that this server does not support, and the values of each that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


# The types that a client's value may have to be compared with a neutral value of each type.
_SAME_KIND: dict[type, tuple[type, ...]] = {int: (int, float), bool: (bool,), str: (str,), list: (list,), dict: (dict,)}


class RequestError(LowvramError):
    """A request that is invalid or not supported.  param: the wrong field.  code: OpenAI's name of the error."""

    def __init__(self, what: str, why: str = "", fix: str = "", param: str | None = None, code: str | None = None):
        self.param, self.code = param, code
        super().__init__(what, why, fix)


class _Closed(BaseModel):
    # strict: a number written as a string is a mistake.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _check_text(value: str) -> str:
    """Return a text that can be encoded in UTF-8; pydantic accepts others where a string has no other limit."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PydanticCustomError("surrogate", "It holds half a character, a lone surrogate.") from error
    return value


Text = Annotated[str, AfterValidator(_check_text)]


class TextPart(_Closed):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Closed):
    """One turn of a conversation.

    The fields that are always None are accepted since clients send an earlier answer back with them.
    content: null is an empty text, for an assistant's turn alone; clients send an empty answer back as null.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None
    name: Text | None = None
    refusal: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class StreamOptions(_Closed):
    """Options of a stream.  include_usage: one more chunk at the end, with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[Text, Field(min_length=1, max_length=LONGEST_STOP)]


class GenerationRequest(_Closed):
    """The fields that both kinds of request have; every default is OpenAI's."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    # "auto": where the text is too long, its oldest turns or tokens are left out.
    truncation: Literal["auto", "disabled"] = "disabled"

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported at each token; None: no log-probabilities at all."""
        raise NotImplementedError


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported at each token."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _check_prompt(value: Any) -> str | list[int]:
    """Return the one prompt in any of OpenAI's four forms; pydantic's union would report every element as wrong."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise PydanticCustomError("many", "This server answers one prompt at a time; send a request for each.")
        value = value[0]
    is_ids = isinstance(value, list) and all(type(id) is int for id in value)
    if not isinstance(value, str) and not is_ids:
        raise PydanticCustomError("prompt", "It should be a string, or a list of token ids.")
    return _check_text(value) if isinstance(value, str) else value


Prompt = Annotated[Any, AfterValidator(_check_prompt)]


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions.  prompt: one text, or the ids of one."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are reported at each token."""
        return self.logprobs


AnyRequest = TypeVar("AnyRequest", bound=GenerationRequest)


def read_request(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """Return the request that a body holds; raises RequestError naming the field that is wrong."""
    try:
        data = read_body_object(body)
    except JsonError as error:
        raise RequestError("The body cannot be read.", f"A request is a JSON object in UTF-8; {error}.") from error
    for name in _HARMLESS & data.keys():
        del data[name]
    for name, values in _NEUTRAL.items():
        value = data.pop(name, None)
        if value is not None and not any(type(value) in _SAME_KIND[type(known)] and value == known for known in values):
            fix = f"Leave {name} out" + (f", or send {json.dumps(values[0])}." if values else ".")
            raise RequestError(f"{name} is {show_value(value)}.", "This server does not support that.", fix, name)
    _check_counts(kind, data)
    try:
        request = kind.model_validate(data)
    except ValidationError as error:
        raise _explain(kind, data, error) from error
    if isinstance(request, ChatRequest):
        _check_contents(request)
    if isinstance(request, ChatRequest) and request.top_logprobs is not None and not request.logprobs:
        what = f"top_logprobs is {request.top_logprobs} and logprobs is not true."
        raise RequestError(what, "The first only adds to the second.", "Send logprobs: true with it.", "top_logprobs")
    if request.stream_options is not None and not request.stream:
        what = "stream_options is given and stream is not true."
        raise RequestError(what, "There is no stream to have options.", "Send stream: true with it.", "stream_options")
    return request


def _check_counts(kind: type[BaseModel], data: Mapping[str, Any]) -> None:
    """Refuse too many messages, and unknown fields, for each of which pydantic would make an error."""
    _refuse_unknown(kind, data)
    _refuse_unknown(StreamOptions, data.get("stream_options"), "stream_options")
    messages = data.get("messages")
    if not isinstance(messages, list):
        return
    if len(messages) > MOST_MESSAGES:
        why = f"This server reads at most {MOST_MESSAGES:,}, whatever they hold."
        raise RequestError(f"There are {len(messages):,} messages.", why, "Leave out the oldest.", "messages")
    parts = 0
    for number, message in enumerate(messages):
        _refuse_unknown(ChatMessage, message, "messages", number)
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            continue
        if (parts := parts + len(content)) > MOST_PARTS:
            what = f"The messages up to messages.{number} have {parts:,} parts."
            why = f"This server reads at most {MOST_PARTS:,}, whatever they hold."
            raise RequestError(what, why, "Join the parts of a text.", f"messages.{number}.content")
        for index, part in enumerate(content):
            _refuse_unknown(TextPart, part, "messages", number, "content", index)


def _refuse_unknown(kind: type[BaseModel], fields: Any, *path: str | int) -> None:
    """Refuse an object that has more fields than its schema; pydantic checks the others."""
    if isinstance(fields, dict) and len(fields) > len(kind.model_fields):
        name = next(name for name in fields if name not in kind.model_fields)
        raise _unknown_field(kind, [*path, name])


def _unknown_field(kind: type[BaseModel], path: Sequence[int | str]) -> RequestError:
    param = ".".join(map(str, path))[:_SHOWN_CHARACTERS]
    fix = name_nearest(param, kind.model_fields) if len(path) == 1 else "Leave it out."
    return RequestError(f"{param} is no field that is known here.", "It would be ignored in silence.", fix, param)


def _check_contents(request: ChatRequest) -> None:
    for number, message in enumerate(request.messages):
        if message.content is None and message.role != "assistant":
            param = f"messages.{number}.content"
            why = "Only an assistant's turn may be without text."
            raise RequestError(f"{param} is null.", why, "Send the text, or leave the message out.", param)


def _explain(kind: type[BaseModel], data: Mapping[str, Any], error: ValidationError) -> RequestError:
    """Turn pydantic's errors into one sentence about one field that is wrong."""
    # Of the errors of a union's members, the one that lies deepest in the value says most.
    problem = max(
        error.errors(),
        key=lambda one: (len(_find_path(data, one["loc"], one["type"])), not one["type"].endswith("_type")),
    )
    path = _find_path(data, problem["loc"], problem["type"])
    param = ".".join(map(str, path))[:_SHOWN_CHARACTERS]
    if problem["type"] == "missing":
        return RequestError(f"{param} is missing.", "Every request needs it.", f"Add {path[-1]}.", param)
    if problem["type"] == "extra_forbidden":
        return _unknown_field(kind, path)
    # For a field's name with a lone surrogate, pydantic gives the path of the object that holds it.
    if problem["type"] == "string_unicode" and isinstance(_value_at(data, path), Mapping):
        return _unknown_field(kind, [*path, problem["input"]])
    why = describe_allowed(problem)
    return RequestError(
        f"{param} is {show_value(problem['input'])}.", f"{why[0].upper()}{why[1:]}.", "Correct that field.", param
    )


def _find_path(data: Any, loc: Sequence[int | str], kind: str) -> list[int | str]:
    """Return a value's path in the client's data: pydantic's location without the names of a union's members."""
    path: list[int | str] = []
    for number, step in enumerate(loc):
        is_last = number == len(loc) - 1
        if isinstance(data, Mapping) and (step in data or (is_last and kind == "missing")):
            path.append(step)
            data = data.get(str(step))
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            path.append(step)
            data = data[step]
    return path


def _value_at(data: Any, path: Sequence[int | str]) -> Any:
    for step in path:
        data = data[step]
    return data


def show_value(value: Any) -> str:
    """Return a client's value for an error's text: whole where it is short, else its type and size."""
    if isinstance(value, str | list | dict) and (len(value) > _SHOWN_CHARACTERS or not _is_flat(value)):
        kind = {str: "characters", list: "elements", dict: "fields"}[type(value)]
        return f"{name_kind(value)} of {len(value)} {kind}"
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _is_flat(value: str | list[Any] | dict[str, Any]) -> bool:
    """Return whether a value holds only short texts and numbers, so that it can be written whole at no cost."""
    inner = [] if isinstance(value, str) else [*value, *(value.values() if isinstance(value, dict) else ())]
    return not any(
        isinstance(one, list | dict) or (isinstance(one, str) and len(one) > _SHOWN_CHARACTERS) for one in inner
    )
