"""Products of 16-bit matrices that are added to a sum in fp32, by the library where it can do both in one launch.

    total = total + a @ b        or, where nothing has been summed yet, total = a @ b

Source: cuBLAS multiplies in 16 bits and writes fp32 (torch's `out_dtype`, CUDA only).

Shapes: M rows, K numbers that are summed, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram_kernels.dispatch import card_of, is_interpreted, is_simulated


def reference(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the textbook form."""
    return total + a @ b


def add_product_(total: Tensor, a: Tensor, b: Tensor, is_first: bool = False) -> None:
    """Add a @ b to total, in place; is_first: write it instead, whatever the memory held.

    total: [M, N] fp32, or the operands' dtype.  a: [M, K], b: [K, N], of one floating dtype.
    """
    if total.dtype == a.dtype:
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
