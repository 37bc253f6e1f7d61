"""Which token comes next, given logits: a frozen Sampler and one function; knows no model."""

from __future__ import annotations

import hashlib
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lowvram.words import Words


class Sampler(Words):
    """How to draw; temperature 0 takes the likeliest.  The same seed and logits give the same token.

    top_k: only so many likeliest (0: all).  top_p: only the likeliest that together reach this probability
    (Holtzman et al. 2020).  min_p: only tokens at least this share of the likeliest one's probability.
    repetition_penalty: divides positive logits of tokens already there, multiplies negative ones (Keskar et al. 2019).
    """

    temperature: Annotated[float, Field(ge=0.0)] = 0.8
    top_k: Annotated[int, Field(ge=0)] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0)] = 1.1
    seed: int = 0


def sample(logit_V: Tensor, sampler: Sampler, seen: Tensor, index: int) -> int:
    """Draw one token id.  logit_V: [V].  seen: ids already there.  index: the token's place, part of the random key."""
    logit_V = logit_V.detach().to("cpu", torch.float32).clone()
    if sampler.repetition_penalty != 1.0 and seen.numel():
        known = seen.unique()
        value = logit_V[known]
        penalty = sampler.repetition_penalty
        logit_V[known] = torch.where(value > 0, value / penalty, value * penalty)
    if sampler.temperature == 0.0:
        return int(logit_V.argmax())
    # From the greatest down and in fp64, so that no temperature above zero can overflow.
    scaled_V = (logit_V.double() - logit_V.max()) / sampler.temperature
    probability_V = _filtered(scaled_V.softmax(-1), sampler)
    # The inverse of the cumulated distribution at a keyed uniform number: one draw, no generator to carry.
    cumulated_V = probability_V.cumsum(-1)
    point = keyed_uniform(sampler.seed, index) * cumulated_V[-1]
    return min(int(torch.searchsorted(cumulated_V, point, right=True)), logit_V.numel() - 1)


def _filtered(probability_V: Tensor, sampler: Sampler) -> Tensor:
    sorted_V, order_V = probability_V.sort(descending=True, stable=True)
    keep_V = sorted_V >= sampler.min_p * sorted_V[0]
    keep_V &= sorted_V.cumsum(-1) - sorted_V < sampler.top_p
    if sampler.top_k:
        keep_V[sampler.top_k :] = False
    return torch.zeros_like(probability_V).scatter_(0, order_V[keep_V], sorted_V[keep_V])


def keyed_uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) that depends on seed and index alone."""
    digest = hashlib.blake2b(f"{seed}/sample/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
