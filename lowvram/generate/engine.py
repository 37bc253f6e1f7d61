"""Text from a model, one token at a time, as pieces of whole characters; knows neither terminal nor file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from lowvram.data.tokenizer import Tokenizer, TokenStream
from lowvram.errors import PromptError
from lowvram.generate.decoder import Decoder
from lowvram.generate.sampling import Sampler, sample


class Engine:
    """One text that grows: what was read stays in the decoder's slot, so a second turn reads only its new tokens."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, slot: int = 0) -> None:
        self.decoder, self.tokenizer, self.slot = decoder, tokenizer, slot
        self.ids: list[int] = []
        self.ended: Literal["text", "tokens", "context"] = "tokens"

    @property
    def max_context(self) -> int:
        """How many tokens a text may have, the answer included."""
        return self.decoder.max_context

    def generate(self, id_T: Sequence[int], sampler: Sampler, max_tokens: int) -> Iterator[str]:
        """Return pieces of what the model writes behind a whole text, as it writes, whole characters only.

        id_T: all of the text, BOS first; of it only what differs from the text before (`ids`) is read.  Stops at a
        document's or turn's end, after max_tokens, or when the context is full; `ended` then says which.
        Raises PromptError, at once, where the text leaves no room for an answer.
        """
        if len(id_T) >= self.max_context:
            raise PromptError(
                f"The text has {len(id_T)} tokens.",
                f"The context holds {self.max_context}, and the answer needs room in it too.",
                f"Shorten it by at least {len(id_T) - self.max_context + 1} tokens.",
            )
        same = next((i for i, (a, b) in enumerate(zip(self.ids, id_T, strict=False)) if a != b), None)
        same = min(len(self.ids), len(id_T)) if same is None else same
        self.ids = list(id_T)
        # The last token is read again where all were read before: its logits were not kept.
        self.decoder.rewind(self.slot, min(same, len(id_T) - 1))
        return self._write(sampler, max_tokens)

    def _write(self, sampler: Sampler, max_tokens: int) -> Iterator[str]:
        stops = {self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.end_of_turn_id}
        stream = TokenStream(self.tokenizer)
        self.ended = "tokens"
        logit_V = self.decoder.prefill(self.slot, self.ids[self.decoder.length(self.slot) :])
        for _ in range(max_tokens):
            token = sample(logit_V, sampler, torch.tensor(self.ids), len(self.ids))
            if token in stops or len(self.ids) >= self.max_context:
                self.ended = "text" if token in stops else "context"
                break
            self.ids.append(token)
            if piece := stream.push(token):
                yield piece
            logit_V = self.decoder.decode_one_token([self.slot], [token])[0]
        if rest := stream.finish():
            yield rest
