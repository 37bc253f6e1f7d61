"""Gradients of weights summed in fp32: a product is added to a sum by the library where one launch can do both.

    total = total + a @ b        or, where nothing has been summed yet, total = a @ b

Inside `adding_to_grads` an op adds a weight's gradient to the `.grad` that exists, and returns none: autograd's own sum
would cast the product to fp32, write it, and read it again.
Source: cuBLAS multiplies in 16 bits and writes fp32 (torch's `out_dtype`, CUDA only).

Shapes: M rows, K numbers that are summed, N columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowvram_kernels.dispatch import card_of, is_interpreted, is_simulated

_is_adding = False


def reference(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the textbook form."""
    return total + a @ b


@contextmanager
def adding_to_grads() -> Iterator[None]:
    """Let backward passes in this context add gradients of weights to fp32 sums in `.grad` that exist already.

    Hooks that wait for such a weight's gradient do not run.
    """
    global _is_adding
    before, _is_adding = _is_adding, True
    try:
        yield
    finally:
        _is_adding = before


def sum_of(weight: Tensor) -> Tensor | None:
    """Return the sum in `.grad` that a weight's gradient is to be added to; None where autograd is to get it."""
    if not _is_adding or torch.compiler.is_compiling() or not weight.is_leaf:
        return None
    total = weight.grad
    return total if total is not None and total.dtype == torch.float32 and total.is_contiguous() else None


def product_for(weight: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    """Return the weight's gradient a @ b in its dtype, or add it to the weight's sum and return None.

    weight: [M, N].  a: [M, K], b: [K, N], of one floating dtype.
    """
    total = sum_of(weight)
    if total is not None:
        add_product_(total, a, b)
        return None
    if weight.dtype == torch.float32 and a.dtype != torch.float32 and _widens(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(weight.dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor, is_first: bool = False) -> None:
    """Add a @ b to total, in place; is_first: write it instead, whatever the memory held.

    total: [M, N] fp32, or the operands' dtype.  a: [M, K], b: [K, N], of one floating dtype.
    """
    if total.dtype == a.dtype and card_of(total.device).platform == "cuda":
        total.addmm_(a, b, beta=0.0 if is_first else 1.0)
    elif not _widens(total):
        product = a @ b
        total.copy_(product) if is_first else total.add_(product)
    elif is_first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _widens(total: Tensor) -> bool:
    """Say whether the library writes fp32 sums of 16-bit products: on CUDA, and in its simulation."""
    return card_of(total.device).platform == "cuda" and (is_simulated() or not is_interpreted())
