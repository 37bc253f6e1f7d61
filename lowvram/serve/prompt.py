"""From a request to what the batcher is to write: ids, sampler, bounds; knows no HTTP and reads no model."""

from __future__ import annotations

import secrets
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lowvram.data.tokenizer import Tokenizer
from lowvram.generate.sampling import Sampler
from lowvram.serve.batch import Order
from lowvram.serve.limits import Limits
from lowvram.serve.wire import Ask, ChatAsk, CompletionAsk, Message, RequestError

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions alone
Turn = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Served:
    """The model that answers.  encode_chat: ids of a conversation, ready for the answer; None: a base model.

    fingerprint: changes whenever equal requests may get other answers.
    """

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    max_context: int
    encode_chat: Callable[[Sequence[Turn]], list[int]] | None = field(default=None, repr=False)

    @cached_property
    def longest_token_bytes(self) -> int:
        """The most bytes of text that one token can stand for."""
        return max(len(self.tokenizer.token_bytes(id)) for id in range(self.tokenizer.size))


def make_order(ask: Ask, served: Served, limits: Limits) -> Order:
    """Return what to write; raises RequestError where this model or this server cannot."""
    if ask.model is not None and ask.model != served.name:
        raise RequestError(
            f"model is {ask.model[:60]!r}.",
            f"This server has {served.name!r} alone.",
            "Name that one, or leave model out.",
            "model",
            "model_not_found",
        )
    name, asked_for = _tokens_asked(ask)
    if asked_for is not None and asked_for > limits.output_tokens:
        why = f"This server writes at most {limits.output_tokens} tokens."
        raise RequestError(f"{name} is {asked_for}.", why, f"Send {limits.output_tokens} or less.", name)
    if asked_for is None:
        is_chat = isinstance(ask, ChatAsk)
        asked_for = limits.output_tokens if is_chat else min(_DEFAULT_COMPLETION_TOKENS, limits.output_tokens)
    if isinstance(ask, ChatAsk):
        ids = _encode_chat(ask, served, limits, asked_for)
    else:
        assert isinstance(ask, CompletionAsk)
        ids = _encode_prompt(ask, served, limits, asked_for)
    # NFC, as the text that the model learnt from.
    stops = tuple(unicodedata.normalize("NFC", stop) for stop in ask.stops)
    return Order(tuple(ids), _build_sampler(ask), asked_for, stops, ask.top)


def _tokens_asked(ask: Ask) -> tuple[str, int | None]:
    newer = ask.max_completion_tokens if isinstance(ask, ChatAsk) else None
    return ("max_tokens", ask.max_tokens) if newer is None else ("max_completion_tokens", newer)


def _build_sampler(ask: Ask) -> Sampler:
    """Return OpenAI's sampler: nothing is filtered or penalised unless it is asked for."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    asked = {name: value for name in plain if (value := getattr(ask, name)) is not None}
    seed = secrets.randbits(63) if ask.seed is None else ask.seed
    return Sampler(**(plain | asked), seed=seed)


def _room(served: Served, limits: Limits, max_tokens: int, is_truncated: bool) -> int:
    """Return how many tokens a prompt may have; one that is cut anyway leaves room for the answer, half at most."""
    left_for_answer = min(max_tokens, served.max_context // 2) if is_truncated else 1
    return max(1, min(limits.prompt_tokens, served.max_context - left_for_answer))


def _encode_prompt(ask: CompletionAsk, served: Served, limits: Limits, max_tokens: int) -> list[int]:
    """Return the ids of a text behind BOS, or the ids that were sent."""
    prompt, tokenizer = ask.prompt, served.tokenizer
    is_truncated = ask.truncation == "auto"
    room = _room(served, limits, max_tokens, is_truncated)
    if isinstance(prompt, str):
        text = unicodedata.normalize("NFC", prompt)
        if is_truncated:
            text = text[-(room + 1) * served.longest_token_bytes :]  # more cannot be kept, whatever its tokens are
        _refuse_hopeless(len(text), room + 1 if is_truncated else room, served, "prompt")
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        return _fit(ids, room, is_truncated, tokenizer.bos_id)
    if not prompt:
        raise RequestError("prompt has no ids.", "There is nothing to go on from.", 'Send "" or a text.', "prompt")
    if wrong := next((id for id in prompt if not 0 <= id < tokenizer.size), None):
        why = f"The ids are 0 to {tokenizer.size - 1}."
        raise RequestError(f"prompt holds the id {wrong}.", why, "Use this model's tokenizer.", "prompt")
    return _fit(prompt, room, is_truncated, prompt[0])


def _fit(ids: list[int], room: int, is_truncated: bool, first: int) -> list[int]:
    if len(ids) <= room:
        return ids
    if not is_truncated:
        raise _too_long(f"{len(ids)} tokens", f"{len(ids) - room} tokens", room, "prompt")
    return [first, *ids[len(ids) - room + 1 :]] if room > 1 else ids[-1:]


def _encode_chat(ask: ChatAsk, served: Served, limits: Limits, max_tokens: int) -> list[int]:
    """Return the ids of a conversation, without its oldest turns where it is too long and may be cut."""
    if served.encode_chat is None:
        raise RequestError(
            f"{served.name!r} continues texts.",
            "It was not trained on conversations.",
            "Send the text to /v1/completions, or start the server with --as dialogue.",
            code="not_a_dialogue_model",
        )
    is_truncated = ask.truncation == "auto"
    room = _room(served, limits, max_tokens, is_truncated)
    turns = [_turn(message) for message in ask.messages]
    kept = [turn for turn in turns if turn[0] == "system"]
    others = [turn for turn in turns if turn[0] != "system"]
    if not is_truncated:
        _refuse_hopeless(sum(len(content) for _, content in turns), room, served, "messages")
        kept, others = [], turns
    while True:
        if _may_fit(kept + others, room, served):
            ids = served.encode_chat(kept + others)
            if len(ids) <= room:
                return ids
            size, over = f"{len(ids)} tokens", f"{len(ids) - room} tokens"
        else:
            size, over = f"more than {room} tokens", "some"
        if not is_truncated or len(others) <= 1:
            raise _too_long(size, over, room, "messages")
        # A conversation begins with what a user said.
        others = others[1:]
        while len(others) > 1 and others[0][0] == "assistant":
            others = others[1:]


def _turn(message: Message) -> Turn:
    role = "system" if message.role == "developer" else message.role
    return role, unicodedata.normalize("NFC", message.text)


def _may_fit(turns: Sequence[Turn], room: int, served: Served) -> bool:
    return sum(len(content) for _, content in turns) <= room * served.longest_token_bytes


def _refuse_hopeless(characters: int, room: int, served: Served, param: str) -> None:
    """Refuse at once what cannot fit whatever its tokens are: a character has a byte at least."""
    fewest = -(-characters // served.longest_token_bytes)
    if fewest > room:
        raise _too_long(f"at least {fewest} tokens", f"at least {fewest - room} tokens", room, param)


def _too_long(size: str, over: str, room: int, param: str) -> RequestError:
    return RequestError(
        f"{param} has {size}.",
        f"There is room for {room}, the answer's first token not counted.",
        f'Shorten it by {over}, or send truncation: "auto" to leave out the oldest part.',
        param,
        "context_length_exceeded",
    )
