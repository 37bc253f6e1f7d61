"""Generates one text token by token, in pieces of whole characters; knows neither terminal nor file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from lowvram.data.tokenizer import Tokenizer, TokenStream
from lowvram.errors import NumbersError, PromptError
from lowvram.generate.decoder import Decoder
from lowvram.generate.sampling import BatchSampler, Sampler, Wish
from lowvram.units import count_of


class Counts(NamedTuple):
    """What one answer cost: tokens reused from the cache, read and written; seconds of reading and of writing."""

    reused: int = 0
    read: int = 0
    written: int = 0
    read_s: float = 0.0
    written_s: float = 0.0

    def add(self, other: Counts) -> Counts:
        """Return what both cost together."""
        return Counts(
            self.reused + other.reused,
            self.read + other.read,
            self.written + other.written,
            self.read_s + other.read_s,
            self.written_s + other.written_s,
        )


class Engine:
    """One growing text: what was read stays in the decoder's slot, so a second turn reads only its new tokens.

    ids: the text so far.  ended: why the last answer ended.  counts: what it cost.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, slot: int = 0) -> None:
        self.decoder, self.tokenizer, self.slot = decoder, tokenizer, slot
        self._sampler = BatchSampler(1)
        self.ids: list[int] = []
        self.ended: Literal["text", "tokens", "context"] = "tokens"
        self.counts = Counts()

    @property
    def max_context(self) -> int:
        """How many tokens a text may have, the answer included."""
        return self.decoder.max_context

    def generate(self, id_T: Sequence[int], sampler: Sampler, max_tokens: int) -> Iterator[str]:
        """Return the answer to a text in pieces of whole characters, while it is written.

        id_T: the whole text, BOS first.  Only the tokens after its common prefix with the text before (`ids`) are read,
        and those that the decoder had to drop.  The answer ends at the end of a document or turn, after max_tokens, or
        when the context is full; `ended` then says which.
        Raises PromptError, at once, where there is no text or it leaves no room for an answer; NumbersError where the
        model's logits are not finite.
        """
        if not id_T:
            raise PromptError("The text is empty.", "A model continues a text of at least one token.", "Write one.")
        if len(id_T) >= self.max_context:
            raise PromptError(
                f"The text has {count_of(len(id_T), 'token')}.",
                f"The context holds {self.max_context}, and the answer needs room in it too.",
                f"Shorten it by at least {count_of(len(id_T) - self.max_context + 1, 'token')}.",
            )
        same = next((i for i, (a, b) in enumerate(zip(self.ids, id_T, strict=False)) if a != b), None)
        same = min(len(self.ids), len(id_T)) if same is None else same
        self.ids = list(id_T)
        # The last token is read again where all were read before: its logits were not kept.
        reused = self.decoder.rewind(self.slot, min(same, len(id_T) - 1))
        self.ended, self.counts = "tokens", Counts(reused)
        return self._decode(sampler, max_tokens)

    def _decode(self, sampler: Sampler, max_tokens: int) -> Iterator[str]:
        stop_ids = set(self.tokenizer.stop_ids)
        stream = TokenStream(self.tokenizer)
        self._sampler.begin(0, sampler, self.ids)
        logit_V = self._prefill()
        for number in range(1, max_tokens + 1):
            began = time.perf_counter()
            if number > 1:
                logit_V = self.decoder.decode_one_token([self.slot], self.ids[-1:])[0]
            (drawn,) = self._sampler.draw([0], [Wish(sampler, len(self.ids))], logit_V[None])
            if isinstance(drawn, NumbersError):
                raise drawn
            if drawn.id in stop_ids:
                self.ended = "text"
                break
            self.ids.append(drawn.id)
            written_s = self.counts.written_s + time.perf_counter() - began
            self.counts = self.counts._replace(written=number, written_s=written_s)
            if piece := stream.push(drawn.id):
                yield piece
            if len(self.ids) == self.max_context:
                self.ended = "context"
                break
        if last_piece := stream.finish():
            yield last_piece

    def _prefill(self) -> Tensor:
        """Read the part of the text that the slot does not hold; returns the logits [V] after it."""
        new, began = self.ids[self.decoder.length(self.slot) :], time.perf_counter()
        logit_V = self.decoder.prefill(self.slot, new)
        self.counts = self.counts._replace(read=len(new), read_s=time.perf_counter() - began)
        return logit_V
