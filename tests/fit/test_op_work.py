"""The bytes of single ops are those that a kernel has to read and to write, each once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowvram.fit.memory_curve import Work
from lowvram.fit.rehearse import LiveStorage

N, D, PICKED = 1000, 64, 10
BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def work_of(op: Callable[[], object]) -> Work:
    counter = LiveStorage(1)
    with counter:
        op()
    (values,) = counter.work.values()
    return Work(*values)


TABLE, ROWS, INDEX = N * D * 4, PICKED * D * 4, PICKED * 8
x, y, rows, index, half = meta(N, D), meta(N, D), meta(PICKED, D), meta(PICKED, dtype=INT64), meta(N, D, dtype=BF16)


@pytest.mark.parametrize(
    ("op", "moved"),
    [
        (lambda: x * y, 3 * TABLE),
        (lambda: x.mul_(y), 3 * TABLE),
        (lambda: torch.mul(half, half, out=x), 2 * TABLE // 2 + TABLE),
        (lambda: x * meta(1).expand(N, D), 2 * TABLE + 4),
        (lambda: x.to(BF16), TABLE + TABLE // 2),
        (lambda: x.copy_(half), TABLE + TABLE // 2),
        (lambda: x.zero_(), TABLE),
        (lambda: x.new_zeros(PICKED, D), ROWS),
        (lambda: torch.zeros_like(x), TABLE),
        (lambda: x[index], 2 * ROWS + INDEX),
        (lambda: x.index_select(0, index), 2 * ROWS + INDEX),
        (lambda: torch.nn.functional.embedding(index, x), 2 * ROWS + INDEX),
        (lambda: x.index_put_((index,), rows), 2 * ROWS + INDEX),
        (lambda: x.index_put_((index,), rows, accumulate=True), 3 * ROWS + INDEX),
        (lambda: x.index_add_(0, index, rows), 3 * ROWS + INDEX),
        (lambda: x.index_add(0, index, rows), 2 * TABLE + 3 * ROWS + INDEX),
        (lambda: torch._foreach_mul_([x, y], 2.0), 4 * TABLE),
    ],
)
def test_an_op_reads_and_writes_each_number_that_it_needs_once(op: Callable[[], object], moved: int) -> None:
    assert work_of(op)[1:3] == (moved, 1.0)


def test_views_and_unwritten_memory_cost_nothing() -> None:
    counter = LiveStorage(1)
    with counter:
        torch.empty_like(x.mT[:, 3:])
    assert counter.work == {}
