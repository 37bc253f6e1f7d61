"""Products with weights of 8 bits, on every kind of card and for any number of rows: the decoded weight's own."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Card, Launch, override_card, simulate_card
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.matmul import weight_only
from lowvram_kernels.matmul.weight_only import decoded, look_up, reference, weight_only_linear
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_rows, quantise_weight
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on
from tests.kernels.measures import LiveBytes, relative_error

FORMS = ["e4m3", "int8"]
# N, I, O: one row, as few as decoding has, more; widths that cut blocks on both sides.
SHAPES = [(1, 128, 256), (1, 60, 300), (16, 300, 130), (17, 200, 5), (40, 129, 385)]
each_form = pytest.mark.parametrize("form", FORMS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["×".join(map(str, shape)) for shape in SHAPES])
# A product rounds x, the weight and the sum to its dtype.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose size changes by block, so that scales differ along both sides."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    sizes = torch.arange(shape[0])[:, None] // 128 % 3 + torch.arange(shape[1]) // 128 % 2 * 2
    return x * torch.exp2(sizes - 5.0)


def operands(shape: tuple[int, int, int], form: str, dtype: torch.dtype) -> tuple[Tensor, QuantTensor]:
    rows, inputs, outputs = shape
    weight = quantise_weight(random(outputs, inputs, seed=1), form)
    return random(rows, inputs).to(DEVICE, dtype), QuantTensor(*(part.to(DEVICE) for part in weight))


def truth_of(x: Tensor, weight: QuantTensor) -> Tensor:
    return x.double() @ dequantise(weight, torch.float32).double().mT


@each_form
@each_shape
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_processor_multiplies_what_the_codes_stand_for(
    form: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, weight = operands(shape, form, dtype)
    with override_card(Card("cpu")):
        y = weight_only_linear(x, weight)
        expected = reference(x, weight)
    assert y.dtype == dtype
    assert relative_error(y, truth_of(x, weight)) < TOLERANCE[dtype]
    assert relative_error(y, expected) < 2 * TOLERANCE[dtype]


@each_form
@pytest.mark.parametrize("card", ["sm75", "sm86", "sm120"])
@pytest.mark.parametrize("rows", [1, 16, 17])
def test_a_card_multiplies_what_the_codes_stand_for(form: str, card: str, rows: int) -> None:
    x, weight = operands((rows, 200, 140), form, torch.float16)
    with running_on(card):
        y = weight_only_linear(x, weight)
    assert relative_error(y, truth_of(x, weight)) < TOLERANCE[torch.float16]


@each_form
def test_bands_of_the_weight_give_the_product_of_the_whole(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = operands((3, 300, 700), form, torch.float32)
    with override_card(Card("cpu")):
        whole = weight_only_linear(x, weight)
        monkeypatch.setattr(weight_only, "CHUNK", 300 * 256)
        banded = weight_only_linear(x, weight)
    assert relative_error(banded, whole) < TOLERANCE[torch.float32]


def test_scales_of_rows_are_taken_too() -> None:
    weight = quantise_rows(random(150, 260, seed=2), "e4m3")
    x = random(2, 260)
    with override_card(Card("cpu")):
        assert relative_error(weight_only_linear(x, weight), truth_of(x, weight)) < TOLERANCE[torch.float32]


def test_scales_that_are_no_powers_of_two_are_taken_too() -> None:
    weight = quantise_weight(random(150, 260, seed=2), "e4m3", fp32_scales=True)
    x = random(2, 260)
    with override_card(Card("cpu")):
        assert relative_error(weight_only_linear(x, weight), truth_of(x, weight)) < TOLERANCE[torch.float32]


def test_rows_of_any_shape_come_back_in_it() -> None:
    x, weight = operands((6, 64, 10), "e4m3", torch.float32)
    y = weight_only_linear(x.view(2, 3, 64), weight)
    assert y.shape == (2, 3, 10)
    assert torch.equal(y.view(6, 10), weight_only_linear(x, weight))


@each_form
@pytest.mark.parametrize("rows", [1, 64])
def test_a_processor_never_holds_the_decoded_weight(form: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "CHUNK", 2**16)
    x, weight = operands((rows, 512, 4096), form, torch.float32)
    with override_card(Card("cpu")), LiveBytes().ignore(x, *weight) as live:
        weight_only_linear(x, weight)
    y_bytes, scales = 2 * rows * 4096 * 4, 3 * 4 * 512
    assert live.peak <= 10 * 2**16 + y_bytes + scales < weight.code.numel() * 4 + y_bytes


@pytest.mark.parametrize("rows, kernels", [(1, ["few_rows_kernel"]), (16, ["sixteen_rows_kernel"]), (17, [])])
def test_a_card_decodes_few_rows_weights_in_registers(rows: int, kernels: list[str]) -> None:
    launches: list[Launch] = []
    x = torch.empty(rows, 256, dtype=torch.bfloat16, device="meta")
    code = torch.empty(16384, 256, dtype=torch.uint8, device="meta")
    weight = QuantTensor(code, torch.empty(128, 2, device="meta"))
    with simulate_card(CARDS["sm89"], note_launch=launches.append):
        y = weight_only_linear(x, weight)
    assert y.shape == (rows, 16384)
    assert [what.kernel for what in launches if what.module == "matmul.gemv_triton"] == kernels


@each_form
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_looking_up_returns_rows_of_the_decoded_table(form: str, dtype: torch.dtype) -> None:
    table = quantise_weight(random(300, 150, seed=3), form)
    ids = torch.tensor([[0, 127, 128], [299, 5, 299]])
    found = look_up(ids, table, dtype)
    assert found.shape == (2, 3, 150)
    assert torch.equal(found, dequantise(table, dtype)[ids])


def test_what_is_plain_and_of_the_dtype_is_not_copied() -> None:
    weight = random(5, 7)
    assert decoded(weight, None, torch.float32).data_ptr() == weight.data_ptr()
    assert torch.equal(decoded(weight, None, torch.bfloat16), weight.to(torch.bfloat16))
    assert torch.equal(
        decoded(*quantise_weight(weight, "int8"), torch.float32),
        dequantise(quantise_weight(weight, "int8"), torch.float32),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 63)}, r"x is \[2, 63\] .*needs floating"),
        ({"x": torch.zeros(2, 64, dtype=torch.int64)}, r"needs floating"),
        ({"scale": torch.zeros(2, 2)}, r"scale is \[2, 2\]"),
    ],
    ids=["width", "dtype", "scale"],
)
def test_what_does_not_fit_together_is_named(change: dict[str, Tensor], message: str) -> None:
    x, (code, scale) = torch.zeros(2, 64), quantise_weight(random(10, 64), "e4m3")
    with pytest.raises(ShapeError, match=message), override_card(Card("cpu")):
        weight_only_linear(change.get("x", x), QuantTensor(code, change.get("scale", scale)))


def test_ids_of_another_dtype_are_named() -> None:
    with pytest.raises(ShapeError, match=r"ids is torch\.int32; needs int64"):
        look_up(torch.zeros(2, dtype=torch.int32), quantise_weight(random(10, 64), "int8"), torch.float32)


@pytest.mark.parametrize("rows", [1, 3, weight_only.PACKED_ROWS])
@pytest.mark.parametrize("inputs, is_packed", [(48, True), (60, False)])
def test_a_processor_multiplies_few_rows_of_bf16_by_int8_codes_as_they_are(
    rows: int, inputs: int, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_only, "INT8_IS_EXACT", False)
    calls, true = [], weight_only.multiply_packed
    monkeypatch.setattr(weight_only, "multiply_packed", lambda x, w: calls.append(x) or true(x, w))
    weight = quantise_weight(random(70, inputs, seed=1), "int8")
    x = random(rows, inputs).bfloat16()
    with override_card(Card("cpu")):
        found = weight_only_linear(x, weight)
        weight_only_linear(x.float(), weight)
        weight_only_linear(random(weight_only.PACKED_ROWS + 1, inputs).bfloat16(), weight)
    assert len(calls) == is_packed
    assert found.dtype == torch.bfloat16
    assert relative_error(found, truth_of(x, weight)) < 2.0**-7  # the scale and the sum are rounded to bf16


@pytest.mark.parametrize("rows", [5, 16, weight_only.SPLIT_ROWS])
@pytest.mark.parametrize("inputs, outputs", [(48, 70), (61, 3), (512, 200)])
def test_a_processor_multiplies_rows_in_two_halves_as_closely_as_fp32_would(
    rows: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where this processor would saturate, its sums are made elsewise: what is tested is the split.
    monkeypatch.setattr(weight_only, "INT8_IS_EXACT", True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).to(torch.int32))
    weight = quantise_weight(random(outputs, inputs, seed=1), "int8")
    x = random(rows, inputs).bfloat16()
    x[1] = 0.0
    x[2] *= 2.0**100
    x[3] *= 2.0**-100
    with override_card(Card("cpu")):
        found = weight_only_linear(x, weight)
    truth, fp32 = truth_of(x, weight), truth_of(x, weight).float()
    assert found.dtype == torch.bfloat16
    # Beside the rounding to bf16: the halves' error, 2⁻¹⁷ of the row's greatest number for every weight.
    halves = (
        x.double().abs().amax(-1, keepdim=True) * 2.0**-16.9 * dequantise(weight, torch.float32).double().abs().sum(-1)
    )
    assert ((found.double() - truth).abs() <= halves + 2.0**-8 * fp32.abs()).all()
    assert not found[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_stays_so_and_changes_no_other(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "INT8_IS_EXACT", True)
    weight, x = quantise_weight(random(40, 64, seed=1), "int8"), random(6, 64).bfloat16()
    with override_card(Card("cpu")):
        whole = weight_only_linear(x, weight)
        x[2, 5] = bad
        found = weight_only_linear(x, weight)
    assert not found[2].isfinite().any()
    others = [row for row in range(6) if row != 2]
    assert torch.equal(found[others], whole[others])


def test_rows_are_split_only_where_sums_of_int8_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, true = [], weight_only._multiply_split
    monkeypatch.setattr(weight_only, "_multiply_split", lambda x, w: calls.append(len(x)) or true(x, w))
    weight = quantise_weight(random(40, 64, seed=1), "int8")
    for is_exact in (False, True):
        monkeypatch.setattr(weight_only, "INT8_IS_EXACT", is_exact)
        with override_card(Card("cpu")):
            for rows in (4, 5, weight_only.SPLIT_ROWS, weight_only.SPLIT_ROWS + 1):
                weight_only_linear(random(rows, 64).bfloat16(), weight)
            weight_only_linear(random(16, 64), weight)
            weight_only_linear(random(16, 64).bfloat16(), quantise_weight(random(40, 64, seed=1), "e4m3"))
    assert calls == [5, weight_only.SPLIT_ROWS]
