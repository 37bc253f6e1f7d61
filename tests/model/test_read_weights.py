"""Products for reading give what the layer gives, whichever way is fastest for so many rows of such numbers."""

from __future__ import annotations

import pytest
import torch

from lowvram.model.linear import Linear, is_slow_in_half, multiply


@pytest.mark.parametrize("laid", ["rows", "columns"])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_product_for_reading_is_the_layer_s(dtype: torch.dtype, rows: int, laid: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    x_NI, weight_OI = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 24), (40, 24)))
    if laid == "columns":
        weight_OI = weight_OI.T.contiguous().T
    exact = x_NI.double() @ weight_OI.double().T
    found = multiply(x_NI, weight_OI)
    assert found.dtype == dtype
    # Terms of about 1, twenty-four of them, and one rounding of the sum.
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=24 * torch.finfo(dtype).eps)


def test_the_weight_is_cast_to_the_rows() -> None:
    x_NI, weight_OI = torch.randn(3, 8).bfloat16(), torch.randn(5, 8)
    torch.testing.assert_close(multiply(x_NI, weight_OI), multiply(x_NI, weight_OI.bfloat16()))


@pytest.mark.parametrize("capability, is_slow", [("AVX2", True), ("DEFAULT", True), ("AVX512", False)])
def test_only_16_bits_without_instructions_for_them_are_slow(
    capability: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert is_slow_in_half(torch.zeros(1, dtype=torch.bfloat16)) == is_slow
    assert not is_slow_in_half(torch.zeros(1))
    assert not is_slow_in_half(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_a_layer_s_matrix_is_the_weight_itself_where_it_is_kept_so() -> None:
    layer = Linear(6, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    assert layer.matrix(torch.float32).data_ptr() == layer.weight.data_ptr()
    assert torch.equal(layer.matrix(torch.bfloat16), layer.weight.bfloat16())
