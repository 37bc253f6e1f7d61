"""Draws the next token from logits: a frozen Sampler and one function; knows no model."""

from __future__ import annotations

import hashlib
import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lowvram.config.base import FrozenConfig
from lowvram.errors import NumbersError


class Sampler(FrozenConfig):
    """How to draw a token; temperature 0 takes the likeliest.  The same seed and logits give the same token.

    top_k: keeps only so many likeliest tokens (0: all).  top_p: keeps only the likeliest tokens that together reach
    this probability (Holtzman et al. 2020).  min_p: keeps only tokens with at least this share of the likeliest one's
    probability.  repetition_penalty: divides positive logits of tokens that the text already has, and multiplies
    negative ones (Keskar et al. 2019).
    """

    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.8
    top_k: Annotated[int, Field(ge=0)] = 50
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.1
    seed: int = 0


# Without top_k, only so many of the likeliest tokens are sorted at first, and all of them only if these do not suffice:
# top_p and min_p seldom keep more, and sorting a vocabulary of 32,768 takes longer than all the rest.
_FIRST_LOOK = 1024


def sample(logit_V: Tensor, sampler: Sampler, seen: Tensor, index: int) -> int:
    """Draw one token id.

    logit_V: [V].  seen: ids that the text already has.  index: the token's position, part of the random key.
    Raises NumbersError where the greatest logit is NaN or infinite: there is no distribution then.
    """
    logit_V = logit_V.detach()
    if sampler.repetition_penalty != 1.0 and seen.numel():
        logit_V = _penalise(logit_V, sampler.repetition_penalty, seen.to(logit_V.device))
    greatest, likeliest = logit_V.max(-1)
    if not math.isfinite(value := float(greatest)):
        raise NumbersError(
            f"The model's greatest logit is {value}.",
            "A next token cannot be drawn from numbers that are not finite: the weights are broken, or too large for "
            "the precision.",
            'Try `precision="bf16"` or fp32; if that gives the same, go back to an earlier checkpoint.',
        )
    if sampler.temperature == 0.0:
        return int(likeliest)
    # Relative to the greatest logit and in fp64, so that no temperature above zero can overflow.
    scaled_V = (logit_V.to("cpu", torch.float64) - value) / sampler.temperature
    id_C, weight_C = _filter(scaled_V, sampler)
    # The inverse of the cumulative distribution at a keyed uniform number: one draw, without a generator's state.
    cumulated_C = weight_C.cumsum(-1)
    point = keyed_uniform(sampler.seed, index) * cumulated_C[-1]
    choice = min(int(torch.searchsorted(cumulated_C, point, right=True)), weight_C.numel() - 1)
    return choice if id_C is None else int(id_C[choice])


def _penalise(logit_V: Tensor, penalty: float, seen: Tensor) -> Tensor:
    logit_V = logit_V.float().clone()
    value = logit_V[seen]
    # An id that occurs twice is written twice, with the same value.
    logit_V[seen] = torch.where(value > 0, value / penalty, value * penalty)
    return logit_V


def _filter(scaled_V: Tensor, sampler: Sampler) -> tuple[Tensor | None, Tensor]:
    """Return the ids that pass the filters, ascending (None: all), and their weights relative to the likeliest one."""
    vocabulary = scaled_V.numel()
    if not sampler.top_k and sampler.top_p == 1.0 and sampler.min_p == 0.0:
        return None, scaled_V.exp_()
    count = sampler.top_k or _FIRST_LOOK
    total = float(scaled_V.exp().sum()) if sampler.top_p < 1.0 else 1.0
    while True:
        id_C = _likeliest(scaled_V, count)
        weight_C = scaled_V[id_C].exp_()
        keep_C = weight_C >= sampler.min_p
        if sampler.top_p < 1.0:
            keep_C &= weight_C.cumsum(-1) - weight_C < sampler.top_p * total
        if sampler.top_k or count >= vocabulary or not keep_C[-1]:
            break
        count = vocabulary
    id_C = id_C[keep_C].sort().values
    return id_C, scaled_V[id_C].exp_()


def _likeliest(scaled_V: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` greatest numbers, the greatest first; of equal numbers the first id comes first."""
    if count >= scaled_V.numel():
        return scaled_V.sort(descending=True, stable=True).indices
    least = scaled_V.topk(count, sorted=False).values.min()
    id_C = (scaled_V >= least).nonzero()[:, 0]
    return id_C[scaled_V[id_C].sort(descending=True, stable=True).indices[:count]]


def keyed_uniform(seed: int, index: int) -> float:
    """Return a number in [0, 1) that depends on seed and index alone."""
    digest = hashlib.blake2b(f"{seed}/sample/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
