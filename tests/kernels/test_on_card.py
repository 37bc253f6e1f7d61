"""What only a card can show of all kernels alike: graphs that replay them, memory that paper foretold, 2³¹ elements."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import card_of, is_interpreted, simulate_card
from lowvram_kernels.matmul.scaled_matmul import scaled_matmul
from lowvram_kernels.optim import adamw8
from lowvram_kernels.quant.quantise import QuantTensor, dequantise, quantise_rows, quantise_weight
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("triton", reason="Triton is not installed")
from tests.kernels.measures import LiveBytes
from tools.gpu.cases import kernels
from tools.gpu.kernel import Kernel, Scene

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda", 0)
# torch's own, whose gradients and workspaces are not ours to foretell.
_TORCHS = ("attention", "linear_cross_entropy")
# The allocator rounds each block up to 512 bytes, and splits none above a MiB so that less than one is left.
_ROUNDING = 2**20


def cases(is_tiny: bool) -> list[Any]:
    """Return the report's cases, without a card none: then these tests are not run."""
    if is_interpreted() or not torch.cuda.is_available():
        return []
    found = [k for k in kernels(Scene(CARD, is_tiny, torch.bfloat16)) if k.op not in _TORCHS]
    return [pytest.param(kernel, id=kernel.name) for kernel in found if is_tiny or kernel.rank == 0]


def copied(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)


def tensors_of(*values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@pytest.mark.parametrize("kernel", cases(is_tiny=True))
def test_a_graph_replays_a_kernel_which_so_reads_nothing_on_the_host(kernel: Kernel) -> None:
    inputs = kernel.inputs()
    expected_inputs = copied(inputs)
    expected = kernel.run(*expected_inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernel.run(*copied(inputs))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.run(*inputs)
    graph.replay()
    torch.cuda.synchronize()
    pairs = zip(tensors_of(found, inputs), tensors_of(expected, expected_inputs), strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


@pytest.mark.parametrize("kernel", cases(is_tiny=False))
def test_what_a_kernel_allocates_is_what_paper_says(kernel: Kernel) -> None:
    inputs = kernel.inputs()
    kernel.run(*inputs)  # libraries' workspaces, tables
    meta = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, inputs)
    with simulate_card(card_of(CARD)), LiveBytes().ignore(*tensors_of(meta)) as live:
        kernel.run(*meta)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = kernel.run(*inputs)
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    del result
    assert abs(taken - live.peak) <= 0.01 * live.peak + _ROUNDING, f"{taken} bytes, {live.peak} on paper"


def need(gibibytes: float) -> None:
    """Skip a test where the card has less memory free."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(CARD)[0] < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB free")


def test_rounding_reaches_elements_beyond_two_to_the_31() -> None:
    need(12)
    rows, width = 65_600, 32_768
    x = torch.empty(rows, width, dtype=torch.bfloat16, device=CARD)
    x[-128:] = torch.randn(128, width, device=CARD)
    assert x.numel() > 2**31
    for form in ("e4m3", "int8"):
        found, last = quantise_rows(x, form), quantise_rows(x[-128:], form)
        assert torch.equal(found.code[-128:], last.code)
        assert torch.equal(found.scale[-128:], last.scale)
        del found


def test_a_product_reaches_elements_beyond_two_to_the_31() -> None:
    need(6)
    a = quantise_rows(torch.randn(65_664, 256, device=CARD), "e4m3")
    b = quantise_weight(torch.randn(32_768, 256, device=CARD), "e4m3")
    y = scaled_matmul(a, b, torch.bfloat16)
    assert y.numel() > 2**31
    last = QuantTensor(a.code[-128:], a.scale[-128:])
    truth = dequantise(last, torch.float32) @ dequantise(b, torch.float32).mT
    assert float((y[-128:].float() - truth).norm() / truth.norm()) < 5e-3


def test_an_update_reaches_elements_beyond_two_to_the_31() -> None:
    need(20)
    count, first = 2**31 + 1_024, 2**31 + 512
    maps, step = adamw8.build_maps(CARD), torch.ones((), device=CARD)
    weight = torch.ones(count, dtype=torch.bfloat16, device=CARD)
    gradient = torch.zeros_like(weight)
    gradient[first:] = torch.randn(512, device=CARD)
    moments = adamw8.new_moments(weight)
    part, part_moments = weight[first:].clone(), adamw8.new_moments(weight[first:])
    adamw8.adamw8_(part, gradient[first:].clone(), part_moments, maps, step, 0.1, first=first)
    adamw8.adamw8_(weight, gradient, moments, maps, step, 0.1)
    assert torch.equal(weight[first:], part)
    assert torch.equal(moments.part(first, count).code_m, part_moments.code_m)
    assert not torch.equal(part, torch.ones_like(part))
