"""A small model behind a real server on a free port of this machine, in a thread of the test's own process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import torch
from openai import OpenAI
from torch import Tensor

from lowvram.data.tokenizer import Tokenizer
from lowvram.generate.chat_template import Message, load_chat_template
from lowvram.generate.decoder import Decoder
from lowvram.generate.engine import Engine
from lowvram.generate.sampling import Sampler
from lowvram.model.transformer import Transformer
from lowvram.serve.app import AccessPolicy, build_app
from lowvram.serve.limits import Limits
from lowvram.serve.metrics import Metrics
from lowvram.serve.prompt import ServedModel, Turn
from lowvram.serve.scheduler import Scheduler
from lowvram.serve.server import Server, open_socket
from tests.model.outside import randomise
from tests.model.variants import VARIANTS

GREEDY = Sampler(temperature=0.0, repetition_penalty=1.0)


def small_model(tokenizer: Tokenizer, variant: str = "gqa-rope") -> Transformer:
    """Untied and with large weights: a small tied model only repeats its last token."""
    config = VARIANTS[variant].model_copy(update={"vocabulary": tokenizer.size, "tied": False})
    return randomise(Transformer(config), std=0.25)


def alone(model: Transformer, tokenizer: Tokenizer, ids: Sequence[int], max_tokens: int, max_context: int) -> str:
    """Return the greedy text that a request gets with the model to itself."""
    return "".join(Engine(Decoder(model, max_context), tokenizer).generate(list(ids), GREEDY, max_tokens))


def speak(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """Return a conversation's ids, through the template that lies with the tokenizer."""
    template = load_chat_template(tokenizer)
    assert template is not None
    return template.encode(tokenizer, [Message(*turn) for turn in turns])


class Scripted(Decoder):
    """A decoder that writes one text to whoever asks, then the end; `hold` keeps it before its next token."""

    def __init__(self, tokenizer: Tokenizer, text: str, max_context: int, slots: int) -> None:
        self.max_context, self.slots = max_context, slots
        self.script = [*tokenizer.encode(text), tokenizer.eos_id]
        self.may_write = threading.Event()
        self.may_write.set()
        self._size = tokenizer.size
        self._lengths, self._said = [0] * slots, [0] * slots

    def length(self, slot: int) -> int:
        """Return how many tokens the slot holds."""
        return self._lengths[slot]

    def rewind(self, slot: int, length: int) -> int:
        """Forget; the text is begun again."""
        self._lengths[slot], self._said[slot] = min(self._lengths[slot], length), 0
        return self._lengths[slot]

    def prefill(self, slot: int, token_T: Sequence[int]) -> Tensor:
        """Return logits of the next scripted token."""
        self.may_write.wait(30)
        self._lengths[slot] += len(token_T)
        logit_V = torch.full((self._size,), -100.0)
        logit_V[self.script[min(self._said[slot], len(self.script) - 1)]] = 100.0
        self._said[slot] += 1
        return logit_V

    def decode_one_token(self, slot_N: Sequence[int], token_N: Sequence[int]) -> Tensor:
        """Return the same of each slot."""
        return torch.stack([self.prefill(slot, [token]) for slot, token in zip(slot_N, token_N, strict=True)])


@dataclass
class Place:
    """A server that answers at `url`, and what is behind it."""

    url: str
    served: ServedModel
    batcher: Scheduler
    server: Server
    api_key: str | None

    def openai(self, **options: object) -> OpenAI:
        """Return the real client, which asks once and says what it got."""
        key = self.api_key or "none"
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, **({"max_retries": 0, "timeout": 60.0} | options))

    def http(self) -> httpx.Client:
        """Return a plain client."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60.0, trust_env=False)

    def is_idle(self) -> bool:
        """Return whether nobody is being answered."""
        return not (self.batcher.running or self.batcher.waiting)


@contextmanager
def served(
    tokenizer: Tokenizer,
    model: Transformer | None = None,
    *,
    speaks: bool = True,
    max_context: int = 96,
    slots: int = 4,
    queue: int = 300,
    api_key: str | None = None,
    own_names_only: bool = True,
    decoder: Decoder | None = None,
    grace_s: float = 0.0,
    encode_chat: Callable[[Sequence[Turn]], list[int]] | None = None,
    **limits: float,
) -> Iterator[Place]:
    """Serve a small model until the block ends.  encode_chat: instead of the tokenizer's own template."""
    torch.set_num_threads(1)
    decoder = decoder or Decoder(model or small_model(tokenizer), max_context, slots)
    encode = (encode_chat or (lambda turns: speak(tokenizer, turns))) if speaks else None
    about = ServedModel("small", "fp_test", tokenizer, max_context, encode)
    longest = {"prompt_tokens": max_context - 1, "output_tokens": max_context - 1}
    bounds = Limits(**({"slots": slots, "queue": queue} | longest | limits))
    batcher = Scheduler(decoder, tokenizer, queue, Metrics())
    server = Server(build_app(about, batcher, bounds, AccessPolicy(api_key, own_names_only)), batcher, bounds, grace_s)
    listening = open_socket("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.serve_on, args=(listening,))
    thread.start()
    try:
        yield Place(url, about, batcher, server, api_key)
    finally:
        server.handle_exit(2, None)
        thread.join(30)
        assert not thread.is_alive(), "the server ends when it is asked to"
