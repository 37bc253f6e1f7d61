"""Text from a model, one token at a time, through a cache; knows neither terminal nor file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from lowvram.data.tokenizer import Tokenizer, TokenStream
from lowvram.errors import PromptError
from lowvram.generate.sampling import Sampler, sample
from lowvram.model.cache import Cache
from lowvram.model.transformer import Transformer


def prefill(model: Transformer, token_T: Sequence[int], cache: Cache, dtype: torch.dtype) -> Tensor:
    """Read tokens into the cache; returns the logits [V] after the last of them."""
    return _next_logits(model, token_T, cache, dtype)


def decode_one_token(model: Transformer, token: int, cache: Cache, dtype: torch.dtype) -> Tensor:
    """Read one token into the cache; returns the logits [V] after it."""
    return _next_logits(model, [token], cache, dtype)


@torch.no_grad()
def _next_logits(model: Transformer, tokens: Sequence[int], cache: Cache, dtype: torch.dtype) -> Tensor:
    token_BT = torch.tensor([list(tokens)], device=model.embedding.device)
    stream_BTD, _ = model(token_BT, dtype, cache=cache)
    return (stream_BTD[0, -1:] @ model.head_VD.to(dtype).T)[0]


class Engine:
    """A text that grows: what was read stays in the cache, so a second turn reads only its new tokens."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, max_context: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.tokenizer, self.max_context, self.dtype = model, tokenizer, max_context, dtype
        self.ids: list[int] = []
        self.ended: Literal["text", "tokens", "context"] = "tokens"
        self.cache = Cache(model.config, 1, max_context, dtype, model.embedding.device)

    def generate(self, text: str, sampler: Sampler, max_tokens: int) -> Iterator[str]:
        """Append `text`; return pieces of what the model writes behind it, as it writes, whole characters only.

        Stops at a document's end, after max_tokens, or when the context is full; `ended` then says which.  A text that
        has outgrown the context keeps its newest half.  Raises PromptError, at once, where `text` alone does not fit.
        """
        new = self.tokenizer.encode(text)
        if not self.ids:
            new = [self.tokenizer.bos_id, *new]
        if len(new) >= self.max_context:
            raise PromptError(
                f"The prompt has {len(new)} tokens.",
                f"The context holds {self.max_context}, and the answer needs room in it too.",
                f"Shorten it by at least {len(new) - self.max_context + 1} tokens.",
            )
        if len(self.ids) + len(new) >= self.max_context:
            kept = min(self.max_context // 2, self.max_context - 1 - len(new))
            self.ids = self.ids[len(self.ids) - kept :]
            self.cache.rewind(0)
        self.ids += new
        # The last token is read again where all were read before, as after an empty text: its logits were not kept.
        self.cache.rewind(len(self.ids) - 1)
        return self._write(sampler, max_tokens)

    def _write(self, sampler: Sampler, max_tokens: int) -> Iterator[str]:
        stops = {self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.end_of_turn_id}
        stream = TokenStream(self.tokenizer)
        self.ended = "tokens"
        logit_V = prefill(self.model, self.ids[self.cache.length :], self.cache, self.dtype)
        for _ in range(max_tokens):
            token = sample(logit_V, sampler, torch.tensor(self.ids), len(self.ids))
            if token in stops or len(self.ids) >= self.max_context:
                self.ended = "text" if token in stops else "context"
                break
            self.ids.append(token)
            if piece := stream.push(token):
                yield piece
            logit_V = decode_one_token(self.model, token, self.cache, self.dtype)
        if rest := stream.finish():
            yield rest
