"""Low-precision copies against the formulas in fp64: bounds of a round trip, edges of blocks, bytes, paper form."""

from __future__ import annotations

from collections.abc import Iterator

import lowvram_kernels.moe.idle as module
import pytest
import torch
from lowvram_kernels.dispatch import bytes_of
from lowvram_kernels.errors import ShapeError
from lowvram_kernels.moe.idle import COPY_FORMATS, Stack, check_stack, new_idle, read_copy, reference, write_copy_
from lowvram_kernels.quant.quantise import QuantTensor, join_parts, parts_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.measures import LiveBytes, hidden_bytes

SHAPES = [
    pytest.param((1, 1), id="one-number"),
    pytest.param((128, 128), id="one-block"),
    pytest.param((256, 384), id="whole-blocks"),
    pytest.param((130, 37), id="narrow"),
    pytest.param((67, 300), id="low"),
    pytest.param((257, 129), id="one-over"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One rounding of fp32, a few times over: scales are divided by and multiplied with in fp32.
ROUNDING = 1e-6
each_form = pytest.mark.parametrize("form", COPY_FORMATS)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill what torch.empty returns with NaN: a number that nobody wrote then shows."""
    torch.use_deterministic_algorithms(True)  # fill_uninitialized_memory is on by default and needs this
    yield
    torch.use_deterministic_algorithms(False)


def master_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose rows and columns differ by four decades, some of them zero."""
    torch.manual_seed(1)
    size = 10.0 ** (-2.0 * torch.rand(shape[0], 1) - 2.0 * torch.rand(1, shape[1]))
    return (torch.randn(shape) * size * (torch.rand(shape) > 0.1)).to(dtype)


def encoded(master: Tensor, form: str) -> Stack:
    stack = new_idle(1, *master.shape, form)
    write_copy_(stack, 0, master)
    return stack


def blocks_of(matrix: Tensor) -> Tensor:
    """The largest magnitude of each number's 128×128 block, by plain slices."""
    found = torch.empty_like(matrix)
    for row in range(0, matrix.shape[0], 128):
        for column in range(0, matrix.shape[1], 128):
            block = matrix[row : row + 128, column : column + 128]
            found[row : row + 128, column : column + 128] = block.abs().max()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@pytest.mark.parametrize("shape", SHAPES)
@each_form
def test_a_round_trip_is_the_formulas(form: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    master = master_of(shape, dtype)
    found, truth = read_copy(encoded(master, form), 0, torch.float32).double(), reference(master, form)
    if form == "int8":  # the scale is an fp32 number, and at a tie its rounding decides
        row = master.double().abs().amax(1, keepdim=True)
        assert ((found - truth).abs() <= row / 127 * (1 + 128 * ROUNDING)).all()
        assert ((found - truth).abs() > row * ROUNDING).double().mean() < 0.01
    else:
        assert torch.equal(found, truth)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_errs_by_half_a_step_of_its_row(shape: tuple[int, int]) -> None:
    master = master_of(shape)
    error = (read_copy(encoded(master, "int8"), 0, torch.float32) - master).abs()
    assert (error <= master.abs().amax(1, keepdim=True) / 254 * (1 + 128 * ROUNDING)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_e4m3_errs_by_a_sixteenth_and_by_less_than_its_least_step_below_its_normal_numbers(
    shape: tuple[int, int],
) -> None:
    master = master_of(shape)
    error = (read_copy(encoded(master, "e4m3"), 0, torch.float32) - master).abs()
    scale = torch.exp2((blocks_of(master.double()) / 448).log2().ceil()).float()
    normal = master.abs() >= 2.0**-6 * scale
    assert (error[normal] <= master.abs()[normal] * 2.0**-4).all()
    assert (error[~normal] <= 2.0**-10 * scale[~normal]).all()


def test_bf16_keeps_a_bf16_master_exactly_and_rounds_others_to_the_nearest() -> None:
    master = master_of((67, 30), torch.bfloat16)
    assert torch.equal(read_copy(encoded(master, "bf16"), 0, torch.bfloat16), master)
    fine = master_of((67, 30))
    assert torch.equal(read_copy(encoded(fine, "bf16"), 0, torch.float32), fine.bfloat16().float())


@pytest.mark.parametrize("absmax", [448.0, 448.0001, 449.0, 1.75, 1.7500001, 1.0, 0.03, 3e-37, 1e-42, 3e38])
def test_e4m3_scales_are_the_least_powers_of_two_that_hold_the_block(absmax: float) -> None:
    stack = encoded(torch.tensor([[absmax, -absmax / 3]]), "e4m3")
    assert isinstance(stack, QuantTensor)
    scale, largest = float(stack.scale), float(torch.tensor(absmax))
    assert torch.frexp(stack.scale).mantissa == 0.5
    assert largest / scale <= 448
    assert largest / scale > 224 or scale == torch.finfo(torch.float32).tiny
    assert float(read_copy(stack, 0, torch.float32)[0, 0]) == pytest.approx(absmax, rel=2.0**-4, abs=2.0**-10 * scale)


@each_form
def test_zeros_stay_zeros_in_a_row_a_block_and_a_matrix(form: str) -> None:
    master = master_of((300, 260))
    master[3] = 0
    master[128:256, :128] = 0
    found = read_copy(encoded(master, form), 0, torch.float32)
    assert found.isfinite().all()
    assert found[master == 0].abs().sum() == 0
    for stack in (encoded(torch.zeros(130, 5), form), new_idle(1, 130, 5, form)):
        assert torch.equal(read_copy(stack, 0, torch.bfloat16), torch.zeros(130, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_form
def test_numbers_that_are_not_finite_harm_no_other_row_or_block(form: str, bad: float) -> None:
    master = master_of((140, 140))
    expected = read_copy(encoded(master, form), 0, torch.float32)
    master[0, 0] = bad
    found = read_copy(encoded(master, form), 0, torch.float32)
    assert torch.equal(found[128:], expected[128:])


@pytest.mark.parametrize("chunk", [1, 128 * 130, 2**20], ids=["single-blocks", "two-chunks", "whole"])
@each_form
def test_encoding_touches_its_own_copy_alone_and_chunks_change_no_bit(
    form: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = master_of((257, 130)), master_of((257, 130)) * 3
    expected = [encoded(master, form) for master in (first, second)]
    monkeypatch.setattr(module, "CHUNK", chunk)
    stack = new_idle(3, 257, 130, form)
    write_copy_(stack, 0, first)
    write_copy_(stack, 2, torch.nn.Parameter(second))
    for part, (one, two) in zip(parts_of(stack), zip(*map(parts_of, expected), strict=True), strict=True):
        if part is not None:
            assert torch.equal(part, torch.cat([one, torch.zeros_like(one), two]))
            assert not part.requires_grad
    assert torch.equal(read_copy(stack, 2, torch.bfloat16), read_copy(expected[1], 0, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_form
def test_a_decoded_number_is_rounded_once(form: str, dtype: torch.dtype) -> None:
    stack = encoded(master_of((140, 135)), form)
    out = torch.empty(140, 135, dtype=dtype)
    assert read_copy(stack, 0, dtype, out) is out
    assert torch.equal(out, read_copy(stack, 0, torch.float32).to(dtype))
    assert torch.equal(read_copy(stack, 0, dtype), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_table_for_devices_without_float8_has_the_same_numbers(dtype: torch.dtype) -> None:
    code = torch.arange(256, dtype=torch.uint8).view(16, 16)
    expected = code.view(torch.float8_e4m3fn).to(dtype)
    torch.testing.assert_close(module._look_up(code.mT, dtype), expected.mT, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("form", "expected"), [("bf16", 2 * 300), ("int8", 300 + 4 * 5), ("e4m3", 300 + 4)])
def test_a_copy_takes_the_bytes_of_its_format(form: str, expected: int) -> None:
    with LiveBytes() as live:
        stack = new_idle(7, 5, 60, form)
    assert bytes_of(*parts_of(stack)) == live.now == 7 * expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_form
def test_decoding_makes_no_temporary_as_large_as_two_copies(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2**14)
    stack, out = new_idle(2, 1024, 512, form), torch.empty(1024, 512, dtype=dtype)
    with LiveBytes().ignore(*[part for part in parts_of(stack) if part is not None], out) as live:
        read_copy(stack, 1, dtype, out)
    at_work = 6 * 128 * 512 if form == "e4m3" else 0  # 2 bytes of fp16 and 4 of fp32, of one block of rows
    assert live.peak <= at_work + 3 * 2**12  # E4M3's scales, one for each row and block of columns
    # What torch's own kernels take besides, by the allocator's events: 12 bytes of a chunk, which is one block of rows.
    assert hidden_bytes(lambda: read_copy(stack, 1, dtype, out)) <= 12 * 128 * 512 < bytes_of(*parts_of(stack))


def test_a_bf16_copy_asked_for_in_bf16_is_no_copy() -> None:
    stack = encoded(master_of((20, 30)), "bf16")
    assert isinstance(stack, Tensor)
    assert read_copy(stack, 0, torch.bfloat16).data_ptr() == stack.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32-master", "bf16-master"])
@each_form
def test_encoding_takes_13_bytes_of_an_element_at_work(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2**16)
    stack, master = new_idle(2, 1024, 512, form), master_of((1024, 512), dtype)
    with LiveBytes().ignore(*[part for part in parts_of(stack) if part is not None], master) as live:
        write_copy_(stack, 1, master)
    assert live.peak <= 13 * 2**16 + 2**10  # and the scales of one chunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_form
def test_on_paper_it_allocates_the_same(form: str, dtype: torch.dtype) -> None:
    def run(device: str) -> int:
        with LiveBytes() as live:
            stack = new_idle(3, 200, 150, form, device)
            write_copy_(stack, 1, torch.ones(200, 150, dtype=dtype, device=device))
            decoded = read_copy(stack, 1, dtype)
        assert (decoded.shape, decoded.dtype, decoded.device.type) == ((200, 150), dtype, device)
        return live.peak

    torch.use_deterministic_algorithms(False)
    real = run("cpu")
    with FakeTensorMode():
        assert run("cpu") == real
    assert run("meta") == real > 0


def test_arguments_that_cannot_be_right_are_named() -> None:
    with pytest.raises(ShapeError, match="new_idle: format is 'fp4'"):
        new_idle(1, 2, 3, "fp4")
    stack = new_idle(2, 5, 60, "int8")
    assert isinstance(stack, QuantTensor)
    for master in (torch.ones(1, 60), torch.ones(5, 60, dtype=torch.int64)):
        with pytest.raises(ShapeError, match="write_copy_: "):
            write_copy_(stack, 0, master)
    for out in (torch.ones(60, 5), torch.ones(5, 60, dtype=torch.bfloat16)):
        with pytest.raises(ShapeError, match="read_copy: "):
            read_copy(stack, 0, torch.float32, out)
    scale = torch.ones(2, 5, 1)
    for code, wrong in (
        (stack.code[0], scale),
        (stack.code.float(), scale),
        (stack.code, None),
        (stack.code, scale.double()),
        (stack.code.bfloat16(), scale),
        (stack.code.view(torch.uint8), scale),
    ):
        with pytest.raises(ShapeError, match=r"mine: (code|scale) is "):
            check_stack(join_parts(code, wrong), "mine")
    for form in COPY_FORMATS:
        check_stack(new_idle(2, 5, 60, form), "mine")
