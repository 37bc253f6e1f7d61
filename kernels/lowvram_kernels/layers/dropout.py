"""Dropout whose mask is a hash of a key and the position, so that it needs no generator.

    y = x · keep / (1 − p),        keep[b, t, d] = hash(keys[b], purpose, t, d) ≥ p·2³²

There is no state that a resume could lose; a sample's mask depends on no other sample, so it is the same in every
micro-batch, on every device and in a recomputed forward pass.
Saved for backward: the keys; the mask is made again.
Source: Srivastava et al. 2014.

Shapes: B samples, T positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowvram_kernels.errors import ShapeError
from lowvram_kernels.random.counter_rng import chain, mix_


def hash_keys(seed: int, samples: Tensor) -> Tensor:
    """Make one key per sample from the run's seed.

    samples: any shape, int64, for example the samples' global index.  Returns int64 in [0, 2⁶³), same shape.
    Raises ShapeError if samples is not int64.
    """
    if samples.dtype != torch.int64:
        raise ShapeError(f"hash_keys: samples is {samples.dtype}; it needs int64.")
    low, high = (chain(torch.full_like(samples, half), seed, samples) for half in (1, 2))
    return (high >> 1) << 32 | low


def _dropped(key: Tensor, purpose: int, positions: int, width: int, p: float) -> Tensor:
    """Return the mask of the dropped elements of one sample: bool [T, D]."""
    place_T, place_D = (torch.arange(size, device=key.device) for size in (positions, width))
    row_T1 = chain(key.expand(positions), key, purpose, place_T)[:, None]
    column_D = chain(torch.zeros_like(place_D), place_D)
    return mix_(row_T1 ^ column_D) < round(p * 2**32)


def _drop(x: Tensor, p: float, keys: Tensor, purpose: int) -> Tensor:
    out_BTD = x * (1.0 / (1.0 - p))
    for sample in range(x.shape[0]):  # one at a time: the hash needs 16 bytes a place while it is made
        out_BTD[sample].masked_fill_(_dropped(keys[sample], purpose, x.shape[1], x.shape[2], p), 0.0)
    return out_BTD


# A compiler would write the loop's hashes out sample by sample, thousands of integer instructions that take minutes to
# compile: to it the whole is one op.
@torch.library.custom_op("lowvram_kernels::drop", mutates_args=())
def _drop_as_op(x: Tensor, p: float, keys: Tensor, purpose: int) -> Tensor:
    return _drop(x, p, keys, purpose)


@_drop_as_op.register_fake
def _(x: Tensor, p: float, keys: Tensor, purpose: int) -> Tensor:
    return torch.empty_like(x)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys: Tensor, purpose: int) -> Tensor:
        ctx.p, ctx.purpose = p, purpose
        ctx.save_for_backward(keys)
        return (_drop_as_op if torch.compiler.is_compiling() else _drop)(x, p, keys, purpose)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (keys,) = ctx.saved_tensors
        drop = _drop_as_op if torch.compiler.is_compiling() else _drop
        return drop(dy, ctx.p, keys, ctx.purpose), None, None, None


def dropout(x: Tensor, p: float, keys: Tensor, purpose: int) -> Tensor:
    """Zero a share p of x's elements and scale the others by 1/(1 − p).

    x: [B, T, D] floating.  keys: [B] int64, one per sample (see hash_keys).  purpose: which site of the model,
    any integer; sites with different purposes draw independent masks.  Returns x's shape and dtype.
    Saved for backward: keys.
    Raises ShapeError if x is not [B, T, D], keys not [B] int64, or p not in [0, 1).
    Source: Srivastava et al. 2014.
    """
    if x.dim() != 3 or keys.shape != x.shape[:1] or keys.dtype != torch.int64:
        shapes = f"x is {list(x.shape)}, keys {list(keys.shape)} {keys.dtype}"
        raise ShapeError(f"dropout: {shapes}; they need [B, T, D] and [B] int64.")
    if not 0.0 <= p < 1.0:
        raise ShapeError(f"dropout: p is {p}; it must be at least 0 and below 1.")
    return x if p == 0.0 else _Dropout.apply(x, p, keys, purpose)  # type: ignore[no-untyped-call]
