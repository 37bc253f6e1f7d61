"""Rows looked up, and their gradients summed as fp64 sums them, however often an id comes."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.layers.embedding import embedding, reference

from tests.kernels.measures import LiveBytes, relative_error, saved_bytes

# A row is rounded once: half of the last of bf16's 8 bits, of fp16's 11.
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", list(ROUNDED), ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 13), (2, 3, 5)], ids=str)
def test_rows_and_gradients_are_the_textbooks(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    table = torch.randn(11, 9).to(dtype).requires_grad_()
    truth = table.detach().double().requires_grad_()
    ids = torch.randint(0, 6, shape)  # five rows that nobody asks for
    found, expected = embedding(ids, table), reference(ids, truth)
    assert torch.equal(found.double(), expected)
    upstream = torch.randn(found.shape).to(dtype)
    (gradient,) = torch.autograd.grad(found, table, upstream)
    (exact,) = torch.autograd.grad(expected, truth, upstream.double())
    assert gradient.dtype == dtype
    assert relative_error(gradient, exact) < ROUNDED[dtype]
    assert not gradient[6:].any()


def test_an_id_that_comes_thousands_of_times_loses_nothing() -> None:
    table = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.ones(4_096, dtype=torch.int64)
    upstream = torch.full((4_096, 4), 1e-3, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(embedding(ids, table), table, upstream)
    assert relative_error(gradient[1], upstream.double().sum(0)) < ROUNDED[torch.bfloat16]
    plain = torch.nn.functional.embedding(ids, table)
    (stalled,) = torch.autograd.grad(plain, table, upstream)
    assert relative_error(stalled[1], upstream.double().sum(0)) > 0.5, "what would happen otherwise"


def test_the_dtype_of_the_stream_is_asked_for_and_the_gradient_is_the_tables() -> None:
    table = torch.randn(5, 4).bfloat16().requires_grad_()
    found = embedding(torch.tensor([3, 3, 0]), table, torch.float32)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.sum(), table)
    assert gradient.dtype == torch.bfloat16
    assert gradient[:, 0].tolist() == [1, 0, 0, 2, 0]


def test_only_ids_are_kept_and_backward_holds_12_bytes_an_element_beside_the_gradient() -> None:
    table = torch.zeros(50, 64).bfloat16().requires_grad_()
    ids = torch.randint(0, 50, (400,))
    assert saved_bytes(lambda: embedding(ids, table), [table, ids]) == 0
    found = embedding(ids, table)
    upstream = torch.ones_like(found)
    with LiveBytes().ignore(ids, table, found, upstream) as live:
        torch.autograd.grad(found, table, upstream)
    ranks = 400 * 8 * 8  # sorting and counting, whole numbers of 8 bytes
    assert live.peak <= 12 * found.numel() + table.nbytes + ranks


def test_the_order_of_ids_does_not_change_the_gradients_form_on_paper() -> None:
    table = torch.empty(50, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    found = embedding(torch.empty(4, 10, dtype=torch.int64, device="meta"), table)
    (gradient,) = torch.autograd.grad(found.sum(), table)
    assert (gradient.shape, gradient.dtype) == (table.shape, table.dtype)


@pytest.mark.parametrize(
    "ids, table",
    [
        pytest.param(torch.zeros(3, dtype=torch.int32), torch.zeros(2, 2), id="int32"),
        pytest.param(torch.zeros(3, dtype=torch.int64), torch.zeros(2), id="vector"),
        pytest.param(torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int8), id="int8"),
    ],
)
def test_what_is_no_table_or_no_id_is_refused(ids: torch.Tensor, table: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="embedding: table is"):
        embedding(ids, table)
