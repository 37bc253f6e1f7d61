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

from lowvram_kernels.dispatch import bytes_of, card_of, is_interpreted, is_simulated, note_product

# The least torch whose addmm adds a product of 16-bit matrices to an fp32 one.
_HAS_FP32_SUMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
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
    if torch.compiler.is_compiling() or not _is_adding or not weight.is_leaf:
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
    if weight.dtype == torch.float32 and _widens(a):
        result = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
        add_product_(result, a, b, is_first=True)
        return result
    return (a @ b).to(weight.dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor, is_first: bool = False) -> None:
    """Add a @ b to total, in place; is_first: write it instead, whatever the memory held.

    total: [M, N] fp32, or the operands' dtype.  a: [M, K], b: [K, N], of one floating dtype.
    """
    if total.dtype == a.dtype and card_of(total.device).platform == "cuda":
        total.addmm_(a, b, beta=0.0 if is_first else 1.0)
    elif not _widens(a):
        product = a @ b
        total.copy_(product) if is_first else total.add_(product)
    elif is_simulated():  # torch below 2.13 has no right form of these for meta tensors
        moved = bytes_of(a, b, total) + (0 if is_first else bytes_of(total))
        note_product(2.0 * a.numel() * b.shape[1], moved, bytes_of(a, b))
    elif is_first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _widens(a: Tensor) -> bool:
    """Say whether the library writes products of such operands in fp32: of 16 bits, on CUDA and in its simulation.

    bf16 takes compute capability 8.0 (torch's own limit), and an fp32 sum torch 2.11.
    """
    card = card_of(a.device)
    if card.platform != "cuda" or a.dtype == torch.float32 or not _HAS_FP32_SUMS:
        return False
    has_type = a.dtype == torch.float16 or card.features.has_bf16
    return has_type and (is_simulated() or not is_interpreted())


def leaves_of(*weights: Tensor) -> tuple[Tensor, ...] | None:
    """Return weights for a backward pass to keep beside its saved tensors; None where it should take those.

    A saved leaf comes back as another object where its layer is computed again, without its `.grad` and kept cast.
    """
    is_plain = not torch.compiler.is_compiling() and all(weight.is_leaf for weight in weights)
    return weights if is_plain else None
