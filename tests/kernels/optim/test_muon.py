"""Muon's iteration against Remez's exchange and the singular value decomposition, and its cost in bytes."""

from __future__ import annotations

import lowvram_kernels.optim.muon as op
import pytest
import torch
from lowvram_kernels.dispatch import Card, simulate_card
from lowvram_kernels.optim.adamw8 import build_maps
from lowvram_kernels.optim.muon import QUINTICS, muon_, new_momentum, orthogonalise, reference
from lowvram_kernels.random.stochastic_rounding import CARD_CHUNK, CHUNK
from torch import Tensor

from tests.kernels.measures import LiveBytes, relative_error

STEPS = list(QUINTICS)
SHAPES = [
    pytest.param((1, 48, 48), id="square"),
    pytest.param((2, 37, 90), id="wide"),
    pytest.param((3, 91, 30), id="tall"),
    pytest.param((1, 1, 50), id="one-row"),
    pytest.param((2, 50, 1), id="one-column"),
]
# The table has four digits.
DIGITS = 0.51e-4
# The error is told in three digits.
TOLD = 1e-3
# What products in fp32 and in bf16 turn singular vectors by, and add to a singular value, in bf16 to one of a narrow
# matrix (some thirty rows) more.
FP32_TURN, BF16_TURN = 1e-5, 0.06
FP32_VALUE, BF16_VALUE, BF16_NARROW = 1e-4, 0.03, 0.15
# Another order of the sums in a product, carried through all steps.
ORDER = 1e-5


def exchange(least: float, greatest: float) -> tuple[Tensor, float]:
    """Remez: the odd quintic nearest to 1 on an interval, and its distance, fp64."""
    x = torch.linspace(least, greatest, 4, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for _ in range(50):
        table = torch.stack([x, x**3, x**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(table, torch.ones(4, dtype=torch.float64)).tolist()
        # Inside, the derivative a + 3 b x² + 5 c x⁴ is zero where the error is greatest.
        middle, spread = -3 * b / (10 * c), ((3 * b) ** 2 - 20 * a * c) ** 0.5 / (10 * abs(c))
        x = torch.tensor([least, (middle - spread) ** 0.5, (middle + spread) ** 0.5, greatest], dtype=torch.float64)
    return torch.tensor([a, b, c]), abs(error)


def compose(steps: int, x: Tensor, room: float) -> Tensor:
    for a, b, c in QUINTICS[steps][2]:
        x = x / room
        x = a * x + b * x**3 + c * x**5
    return x


def matrix_of(values: Tensor, rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of these singular values, fp64, and its singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, len(values), dtype=torch.float64, generator=generator) for n in (rows, columns)]
    u, v = (torch.linalg.qr(side)[0] for side in sides)
    return (u * values) @ v.mT, u, v


@pytest.mark.parametrize("steps", STEPS)
def test_each_quintic_is_the_nearest_to_one_where_the_steps_before_have_brought_the_values(steps: int) -> None:
    least, _, coefficients = QUINTICS[steps]
    assert len(coefficients) == steps
    greatest = 1.0
    for told in coefficients:
        exact, error = exchange(least, greatest)
        assert (exact - torch.tensor(told)).abs().max() < DIGITS
        least, greatest = 1.0 - error, 1.0 + error


@pytest.mark.parametrize("steps", STEPS)
def test_all_steps_together_have_the_error_that_is_told_with_the_room_that_is_left(steps: int) -> None:
    least, error, _ = QUINTICS[steps]
    x = torch.logspace(torch.tensor(least).log10().item(), 0.0, 200_001, dtype=torch.float64)
    found = (compose(steps, x, op._ROOM) - 1.0).abs().max().item()
    assert error - TOLD < found <= error


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(60, 60), (33, 130), (130, 33)])
def test_singular_vectors_stay_and_values_from_the_least_on_end_within_the_error(
    rows: int, columns: int, dtype: torch.dtype, steps: int
) -> None:
    least, error, _ = QUINTICS[steps]
    count = min(rows, columns)
    values = torch.logspace(0.0, torch.tensor(least * 1.2).log10().item(), count, dtype=torch.float64)
    values[0] = (1.0 - (values[1:] ** 2).sum()).clamp_min(0.01).sqrt()  # a Frobenius norm of about 1
    matrix, u, v = matrix_of(values, rows, columns)
    seen = u.mT @ orthogonalise(matrix.to(dtype)[None], steps)[0].double() @ v
    got = seen.diagonal()
    known = values / values.norm() >= least
    turn, added = (FP32_TURN, FP32_VALUE) if dtype == torch.float32 else (BF16_TURN, BF16_NARROW)
    assert known.sum() > count / 2
    assert (got[known] - 1.0).abs().max() <= error + added
    assert relative_error(seen, torch.diag(got)) < turn
    if dtype == torch.float32:
        expected = compose(steps, values / values.norm(), op._ROOM)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("steps", STEPS)
def test_a_well_conditioned_matrix_comes_near_to_the_reference(steps: int) -> None:
    matrix, u, v = matrix_of(torch.linspace(0.5, 1.0, 40, dtype=torch.float64), 40, 70)
    torch.testing.assert_close(reference(matrix), u @ v.mT, rtol=0, atol=1e-12)
    assert relative_error(orthogonalise(matrix.float()[None], steps)[0], reference(matrix)) < QUINTICS[steps][1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_are_near_one_for_every_shape_and_a_matrix_turned_gives_its_result_turned(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(4)
    u = torch.randn(shape).to(dtype)
    before = u.clone()
    o = orthogonalise(u)
    assert torch.equal(u, before)
    assert (o.dtype, o.shape) == (dtype, u.shape)
    turned = orthogonalise(u.mT.contiguous()).mT
    if shape[1] == shape[2]:
        # A square matrix is not turned inside, so only the singular vectors' sides change.
        assert relative_error(turned, o) < (ORDER if dtype == torch.float32 else BF16_TURN)
        return
    error, added = QUINTICS[5][1], FP32_VALUE if dtype == torch.float32 else BF16_NARROW
    assert relative_error(turned, o) < (ORDER if dtype == torch.float32 else BF16_VALUE)
    assert (torch.linalg.svdvals(o.double()) - 1.0).abs().max() <= error + added


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shape", [(2, 200, 520), (2, 512, 128)], ids=str)
def test_bf16_adds_little_to_the_error_of_a_matrix_of_a_models_size(shape: tuple[int, ...], steps: int) -> None:
    torch.manual_seed(7)
    u = torch.randn(shape).bfloat16()
    got = torch.linalg.svdvals(orthogonalise(u, steps).double())
    assert (got - 1.0).abs().max() <= QUINTICS[steps][1] + BF16_VALUE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_stack_gives_what_each_matrix_gives_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    u = torch.randn(4, 56, 72).to(dtype) * torch.tensor([1e-6, 1.0, 1e3, 0.0])[:, None, None].to(dtype)
    o = orthogonalise(u)
    for index in range(4):
        assert torch.equal(o[index], orthogonalise(u[index : index + 1])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_stay_zeros_and_nothing_is_too_small_or_too_large(dtype: torch.dtype) -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 5, 9, dtype=dtype)), torch.zeros(2, 5, 9, dtype=dtype))
    sizes = [1e-8, 1e-4, 1e3] if dtype == torch.float16 else [1e-44, 1e-38, 1e-30, 1e-23, 1e-19, 1e-10, 1e15]
    torch.manual_seed(6)
    matrix = torch.randn(1, 40, 60)
    for size in sizes:
        o = orthogonalise((matrix * size).to(dtype))
        # An expert without tokens gets there: squares of 1e-23 vanish in fp32, and the norm with them.
        assert torch.linalg.matrix_norm(o.double(), 2).item() <= 1.0 + QUINTICS[5][1] + BF16_NARROW


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2048, 1024), id="several-chunks"),
        pytest.param((1024, 1024), id="square"),
        pytest.param((5, 512, 256), id="stack"),
        pytest.param((3, 67, 91), id="odd-stack"),
    ],
)
def test_inside_a_step_live_three_numbers_an_element_or_one_chunk_and_paper_agrees(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(op, "AT_ONCE", 2**18)
    matrix, size = shape[-1] * shape[-2], torch.Size(shape).numel()
    at_work = size if bits == 8 and matrix % 256 else min(size, max(matrix, 2**18))

    def peak_of(device: str) -> int:
        with torch.device(device):
            weight, gradient, skip = torch.zeros(shape, dtype=dtype), torch.ones(shape), torch.zeros(())
            momentum, codes, step = new_momentum(weight, bits), build_maps(device).first, torch.ones(())
            known = [weight, gradient, *momentum, *codes, skip, step]
            # On meta tensors, asking for a value raises: so the host reads nothing.
            with LiveBytes().ignore(*known) as live:
                muon_(weight, gradient, momentum, codes, step, torch.ones(()), skip=skip)
        return live.peak

    few = 256 + 4 * 256  # scalars, and the lanes of a bf16 weight's noise
    for platform, chunk, each in (("mps", CARD_CHUNK, 2), ("cpu", CHUNK, 4)):  # each: bytes of a number in the products
        with simulate_card(Card(platform)):
            peak = peak_of("meta")
        in_a_chunk = 1.01 * {torch.float32: 14, torch.bfloat16: 16}[dtype] * min(chunk, at_work)
        limit = max(3 * each * at_work, each * at_work + in_a_chunk) + few
        assert 0.5 * limit < peak <= limit
    assert peak == peak_of("cpu")


@pytest.mark.parametrize(("bits", "kept"), [(16, 2 * 102_400), (8, 102_400 + 400 * 4)])
def test_it_keeps_two_bytes_for_each_parameter_or_one_and_a_64th(bits: int, kept: int) -> None:
    assert sum(tensor.nbytes for tensor in new_momentum(torch.empty(4, 256, 100), bits)) == kept
