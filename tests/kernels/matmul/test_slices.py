"""Products of slices of any length, in shapes that come back: right, close to one product, and in few shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowvram_kernels.matmul import slices
from lowvram_kernels.matmul.slices import LEAST_ROWS, PART, multiply_slice_, outer_slice_, takes_parts
from lowvram_kernels.moe.experts import experts, reference
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.measures import LiveBytes, relative_error

BF16 = torch.bfloat16
TOLERANCE = 6e-3
ROWS = [0, 1, PART - 1, PART, PART + 1, 1000, 1024, 1025, 2500]


class ProductShapes(TorchDispatchMode):
    """Collects the shapes of matrix products in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.seen.add(tuple(tuple(part.shape) for part in args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", ROWS)
def test_a_slice_is_multiplied_whole_and_nothing_beside_it_is_touched(rows: int) -> None:
    torch.manual_seed(rows)
    x, matrix = torch.randn(rows + 7, 24).to(BF16), torch.randn(24, 40).to(BF16)
    x[rows:], out = torch.nan, torch.full((rows + 7, 40), 7.0, dtype=BF16)
    multiply_slice_(out[:rows], x[:rows], matrix, in_parts=True)
    assert relative_error(out[:rows], x[:rows].double() @ matrix.double()) < TOLERANCE
    assert (out[rows:] == 7.0).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_an_outer_product_sums_every_row_once(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    left, right = torch.randn(rows + 7, 24).to(BF16), torch.randn(rows + 7, 40).to(BF16)
    left[rows:], right[rows:], out = torch.nan, torch.nan, torch.full((24, 40), torch.nan, dtype=dtype)
    outer_slice_(out, left[:rows], right[:rows], in_parts=True)
    assert relative_error(out, left[:rows].double().mT @ right[:rows].double()) < TOLERANCE


def test_many_lengths_need_few_shapes() -> None:
    lengths = {-(-(end - start) // PART) for rows in range(4097) for start, end in slices._parts(rows, in_parts=True)}
    # 8 up to 1,024 rows, 4 in each octave above.
    assert len(lengths) == 16
    x, out, total = (torch.ones(rows, 8, dtype=BF16) for rows in (1000, 1000, 8))
    with ProductShapes() as shapes:
        multiply_slice_(out, x, x[:8], in_parts=True)
        outer_slice_(total, x, x, in_parts=True)
    assert {side for operands in shapes.seen for shape in operands for side in shape} == {8, PART, 1000 // PART * PART}


def test_what_is_alive_is_a_part_of_each_operand() -> None:
    x, matrix, out = torch.ones(3000, 64, dtype=BF16), torch.ones(64, 32, dtype=BF16), torch.ones(3000, 32, dtype=BF16)
    with LiveBytes().ignore(x, matrix, out) as live:
        multiply_slice_(out, x, matrix, in_parts=True)
        outer_slice_(torch.empty(64, 32, dtype=BF16), x, out, in_parts=True)
    assert 0 < live.peak <= 2 * PART * (64 + 32) * 2 + 64 * 32 * 2


@pytest.mark.parametrize("master", [BF16, torch.float32], ids=["bf16-master", "fp32-master"])
def test_experts_with_many_rows_are_the_textbooks_with_gradients(master: torch.dtype) -> None:
    torch.manual_seed(3)
    tokens, count, width, inner = LEAST_ROWS // 2 + 51, 3, 16, 24
    x, weights = torch.randn(tokens, width).to(BF16), torch.rand(tokens, 2)
    gate_up = (torch.randn(count, 2 * inner, width) / width**0.5).to(BF16).to(master)
    down = (torch.randn(count, width, inner) / inner**0.5).to(BF16).to(master)
    ids = torch.rand(tokens, count).argsort(-1)[:, :2].contiguous()
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    truths = [t.detach().double().requires_grad_() for t in leaves]
    upstream = torch.randn(tokens, width).to(BF16)
    assert takes_parts(torch.empty(2 * tokens, width, dtype=BF16))
    y = experts(*leaves, ids)
    found = torch.autograd.grad(y, leaves, upstream)
    truth = reference(*truths, ids)
    assert relative_error(y, truth) < 1e-2
    for gradient, expected in zip(found, torch.autograd.grad(truth, truths, upstream.double()), strict=True):
        assert relative_error(gradient, expected) < 1e-2
