"""Scores texts with a model and its tokenizer: from strings to likelihoods; knows no task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lowvram.data.nfc import nfc
from lowvram.data.tokenizer import Tokenizer, count_bytes
from lowvram.evaluate.likelihood import Request, Scoring, score_requests
from lowvram.generate.weights import weight_bytes
from lowvram.model.transformer import Transformer


class Scorer(NamedTuple):
    """A model, the dtype that it computes in, its tokenizer, and the longest text that it reads, in tokens.

    batch_tokens: tokens that are read at once, None: what suits the device.
    """

    model: Transformer
    dtype: torch.dtype
    tokenizer: Tokenizer
    max_context: int
    batch_tokens: int | None = None

    def encode(self, context: str, continuation: str) -> Request:
        """Return BOS and both texts in NFC as ids; a token that holds the border belongs to the continuation."""
        before = nfc(context)
        id_T = self.tokenizer.encode(before + nfc(continuation))
        end_T = np.cumsum(self.tokenizer.byte_count_V[id_T]) if id_T else np.zeros(0, np.int64)
        border = int(np.searchsorted(end_T, count_bytes(before), side="right"))
        return Request((self.tokenizer.bos_id, *id_T[:border]), tuple(id_T[border:]))

    def score(self, requests: Sequence[Request]) -> Scoring:
        """Return the likelihood of each request; see `score_requests`."""
        return score_requests(self.model, requests, self.dtype, self.max_context, self.batch_tokens)

    def untrained(self) -> Scorer:
        """Return a scorer with a model of the same form as it was before its first step, weights drawn from seed 0."""
        device = self.model.embedding.device
        return self._replace(model=Transformer(self.model.config, 0, device, self.dtype))

    def untrained_bytes(self) -> int:
        """Return the memory of the model of `untrained`, which is kept in the compute dtype however this one is."""
        return weight_bytes(Transformer(self.model.config, None, "meta", self.dtype))
