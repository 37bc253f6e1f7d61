"""Every op runs on fake tensors, forward and backward, and its peak on paper is its peak in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from lowvram_kernels.layers.dropout import dropout, hash_keys
from lowvram_kernels.layers.rms_norm import rms_norm
from lowvram_kernels.layers.swiglu import swiglu
from lowvram_kernels.loss.linear_cross_entropy import linear_cross_entropy
from lowvram_kernels.matmul.linear import linear
from lowvram_kernels.moe.experts import experts
from lowvram_kernels.moe.idle import COPY_FORMATS, new_idle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.measures import LiveBytes


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def whole(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def with_idle(dtype: torch.dtype, form: str) -> Tensor:
    idle = new_idle(3, 32, 24, form), new_idle(3, 24, 16, form)
    x, weights = leaf(40, 24, dtype=dtype), leaf(40, 2)
    return experts(x, leaf(2, 32, 24), leaf(2, 24, 16), weights, whole(40, 2), idle)


OPS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "rms_norm": lambda dtype: rms_norm(leaf(40, 24, dtype=dtype), leaf(24)),
    "linear": lambda dtype: linear(leaf(40, 24, dtype=dtype), leaf(30, 24)),
    "swiglu": lambda dtype: swiglu(leaf(40, 48, dtype=dtype), leaf(30, 24)),
    "linear_cross_entropy": lambda dtype: linear_cross_entropy(leaf(40, 24, dtype=dtype), leaf(300, 24), whole(40), 16),
    "experts": lambda dtype: experts(
        leaf(40, 24, dtype=dtype), leaf(4, 32, 24), leaf(4, 24, 16), leaf(40, 2), whole(40, 2)
    ),
    **{f"experts-{form}": lambda dtype, form=form: with_idle(dtype, form) for form in COPY_FORMATS},
    "dropout": lambda dtype: dropout(leaf(4, 10, 24, dtype=dtype), 0.1, hash_keys(1, whole(4)), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(OPS))
def test_the_peak_on_paper_is_the_peak_in_memory(name: str, dtype: torch.dtype) -> None:
    peaks = []
    for mode in (FakeTensorMode(), contextlib.nullcontext()):
        with mode, LiveBytes() as live:
            y = OPS[name](dtype)
            y.backward(torch.ones_like(y))
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] > 0
