"""From a request to what the batcher is to write: ids, sampler, bounds; knows no HTTP and reads no model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from lowvram.data.nfc import nfc
from lowvram.data.tokenizer import Tokenizer
from lowvram.generate.sampling import Sampler
from lowvram.generate.truncation import drop_oldest, find_starts
from lowvram.serve.limits import Limits
from lowvram.serve.scheduler import GenerationJob
from lowvram.serve.schemas import ChatRequest, CompletionRequest, GenerationRequest, RequestError, show_value
from lowvram.serve.workers import GoOn

_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions alone
# NFC shortens a text to a quarter of its bytes at most, Hangul's letters and Greek's marks to a third: a test counts.
MOST_COMPOSED = 4
Turn = tuple[str, str]  # role, content


@dataclass(frozen=True)
class ServedModel:
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


def make_job(ask: GenerationRequest, served: ServedModel, limits: Limits, go_on: GoOn = lambda: None) -> GenerationJob:
    """Return what to write; raises RequestError where this model or this server cannot.

    go_on: called between the steps of what may take long; what it raises ends them.
    """
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
        raise RequestError(f"{name} is {show_value(asked_for)}.", why, f"Send {limits.output_tokens} or less.", name)
    if asked_for is None:
        is_chat = isinstance(ask, ChatRequest)
        asked_for = limits.output_tokens if is_chat else min(_DEFAULT_COMPLETION_TOKENS, limits.output_tokens)
    if isinstance(ask, ChatRequest):
        ids = _encode_chat(ask, served, limits, asked_for, go_on)
    else:
        assert isinstance(ask, CompletionRequest)
        ids = _encode_prompt(ask, served, limits, asked_for)
    # NFC, as the text that the model learnt from.
    stops = tuple(map(nfc, ask.stops))
    return GenerationJob(tuple(ids), _build_sampler(ask), asked_for, stops, ask.top)


def _tokens_asked(ask: GenerationRequest) -> tuple[str, int | None]:
    newer = ask.max_completion_tokens if isinstance(ask, ChatRequest) else None
    return ("max_tokens", ask.max_tokens) if newer is None else ("max_completion_tokens", newer)


def _build_sampler(ask: GenerationRequest) -> Sampler:
    """Return OpenAI's sampler: nothing is filtered or penalised unless it is asked for."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    asked = {name: value for name in plain if (value := getattr(ask, name)) is not None}
    seed = secrets.randbits(63) if ask.seed is None else ask.seed
    return Sampler(**(plain | asked), seed=seed)


def _room(served: ServedModel, limits: Limits, max_tokens: int, is_truncated: bool) -> int:
    """Return how many tokens a prompt may have; one that is cut anyway leaves room for the answer, half at most."""
    left_for_answer = min(max_tokens, served.max_context // 2) if is_truncated else 1
    return max(1, min(limits.prompt_tokens, served.max_context - left_for_answer))


def _encode_prompt(ask: CompletionRequest, served: ServedModel, limits: Limits, max_tokens: int) -> list[int]:
    """Return the ids of a text behind BOS, or the ids that were sent."""
    prompt, tokenizer = ask.prompt, served.tokenizer
    is_truncated = ask.truncation == "auto"
    room = _room(served, limits, max_tokens, is_truncated)
    if isinstance(prompt, str):
        # No more than this can be kept, whatever its tokens are: longer texts are cut or refused before any work.
        most = (room + 1) * served.longest_token_bytes
        if is_truncated:
            text = nfc(prompt[-most * MOST_COMPOSED :])[-most:]
        else:
            _refuse_hopeless(-(-len(prompt) // MOST_COMPOSED), room, served, "prompt")
            text = nfc(prompt)
            _refuse_hopeless(len(text.encode("utf-8")), room, served, "prompt")
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        return _fit(ids, room, is_truncated, tokenizer.bos_id)
    if not prompt:
        raise RequestError("prompt has no ids.", "There is nothing to go on from.", 'Send "" or a text.', "prompt")
    if wrong := next((id for id in prompt if not 0 <= id < tokenizer.size), None):
        why = f"The ids are 0 to {tokenizer.size - 1}."
        raise RequestError(f"prompt holds the id {show_value(wrong)}.", why, "Use this model's tokenizer.", "prompt")
    return _fit(prompt, room, is_truncated, prompt[0])


def _fit(ids: list[int], room: int, is_truncated: bool, first: int) -> list[int]:
    if len(ids) <= room:
        return ids
    if not is_truncated:
        raise _too_long(f"{len(ids)} tokens", f"{len(ids) - room} tokens", room, "prompt")
    return [first, *ids[len(ids) - room + 1 :]] if room > 1 else ids[-1:]


def _encode_chat(ask: ChatRequest, served: ServedModel, limits: Limits, max_tokens: int, go_on: GoOn) -> list[int]:
    """Return the ids of a conversation, without its oldest turns where it is too long and may be cut."""
    encode = served.encode_chat
    if encode is None:
        raise RequestError(
            f"{served.name!r} continues texts.",
            "It was not trained on conversations.",
            "Send the text to /v1/completions, or start the server with --as dialogue.",
            code="not_a_dialogue_model",
        )
    is_truncated = ask.truncation == "auto"
    room = _room(served, limits, max_tokens, is_truncated)
    turns: list[Turn] = [
        ("system" if message.role == "developer" else message.role, message.text) for message in ask.messages
    ]
    kept = [turn for turn in turns if is_truncated and turn[0] == "system"]
    others = [turn for turn in turns if not is_truncated or turn[0] != "system"]
    starts = find_starts([role for role, _ in others]) if is_truncated and others else [0]
    # Lengths first: what is sure to be too long is neither normalised nor rendered.
    starts = _leave_hopeless(starts, kept, others, room, served, MOST_COMPOSED)
    kept, others = _normalise(kept, go_on), [*others[: starts[0]], *_normalise(others[starts[0] :], go_on)]
    starts = _leave_hopeless(starts, kept, others, room, served)

    def encode_from(start: int) -> list[int]:
        go_on()
        return encode([*kept, *others[start:]])

    _, ids = drop_oldest(starts, encode_from, room)
    if len(ids) > room:
        raise _too_long(f"{len(ids)} tokens", f"{len(ids) - room} tokens", room, "messages")
    return ids


def _normalise(turns: Sequence[Turn], go_on: GoOn) -> list[Turn]:
    normal = list[Turn]()
    for role, content in turns:
        go_on()
        normal.append((role, nfc(content)))
    return normal


def _leave_hopeless(
    starts: Sequence[int],
    kept: Sequence[Turn],
    others: Sequence[Turn],
    room: int,
    served: ServedModel,
    composed: int = 1,
) -> list[int]:
    """Return the starts from which a conversation may fit by its bytes; raises RequestError where none is left.

    composed: bytes that normalisation may make one of.
    """
    total = sum(_count_bytes(turn) for turn in kept)
    bytes_from = [*accumulate((_count_bytes(turn) for turn in reversed(others)), initial=total)][::-1]
    most_bytes = room * served.longest_token_bytes * composed
    hopeful = [start for start in starts if bytes_from[start] <= most_bytes]
    if not hopeful:
        _refuse_hopeless(-(-bytes_from[starts[-1]] // composed), room, served, "messages")
    return hopeful


def _count_bytes(turn: Turn) -> int:
    return len(turn[1].encode("utf-8"))


def _refuse_hopeless(count_bytes: int, room: int, served: ServedModel, param: str) -> None:
    """Refuse at once what cannot fit, whatever its tokens are."""
    fewest = -(-count_bytes // served.longest_token_bytes)
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
