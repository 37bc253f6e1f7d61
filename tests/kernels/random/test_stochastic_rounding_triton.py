"""The sum rounded at random in one launch: the plain form's bits, its mean, and what it moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowvram_kernels.dispatch import Card, HiddenWork, Launch, override_card, simulate_card
from lowvram_kernels.random.counter_rng import chain, chain_numbers
from lowvram_kernels.random.stochastic_rounding import add_rounded_
from torch import Tensor

from tests.kernels.cards import CARDS, DEVICE, running_on, unwritten
from tests.kernels.measures import LiveBytes

TERMS = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
COUNTS = pytest.mark.parametrize("count", [1, 255, 257, 1376, 4096 + 17])


def add(card: Card, total: Tensor, term: Tensor, seed: int = 7, purpose: int = 2, sample: int = 11) -> Tensor:
    with override_card(card):
        add_rounded_(total, term, seed, purpose, torch.tensor(sample, device=DEVICE))
    return total


def on_both(total: Tensor, term: Tensor, **names: int) -> tuple[Tensor, Tensor]:
    """The sums of the kernel and of the plain form on the processor."""
    with running_on("sm75"):
        ours = add(CARDS["sm75"], total.to(DEVICE, copy=True), term.to(DEVICE), **names)
    with override_card(Card("cpu")):
        plain = total.clone()
        sample = torch.tensor(names.get("sample", 11))
        add_rounded_(plain, term, names.get("seed", 7), names.get("purpose", 2), sample)
    return ours.cpu(), plain


def numbers(count: int, dtype: torch.dtype) -> Tensor:
    """Both signs, over six decades."""
    generator = torch.Generator().manual_seed(count)
    size = 10.0 ** (-6.0 * torch.rand(count, generator=generator))
    return (torch.randn(count, generator=generator) * size).to(dtype)


def bits(x: Tensor) -> Tensor:
    """Bit patterns, those of any NaN alike."""
    return torch.where(x.isnan(), 0x7FC0, x.view(torch.int16))


@TERMS
@COUNTS
def test_the_kernel_has_the_plain_forms_bits(count: int, dtype: torch.dtype) -> None:
    total, term = numbers(count, torch.bfloat16), numbers(count, dtype)
    for sample in range(3):
        ours, plain = on_both(total, term, sample=sample)
        assert torch.equal(bits(ours), bits(plain))
        total = plain


@pytest.mark.parametrize(
    "names",
    [
        pytest.param({"seed": 0, "purpose": 0, "sample": 0}, id="zeros"),
        pytest.param({"seed": 1, "purpose": 1, "sample": 1}, id="ones"),
        pytest.param({"seed": -3, "purpose": 16, "sample": -1}, id="negative"),
        pytest.param({"seed": 2**40 + 5, "purpose": 2**33, "sample": 2**62 + 1}, id="wide"),
    ],
)
def test_every_name_names_the_plain_forms_rounding(names: dict[str, int]) -> None:
    total, term = torch.ones(700, dtype=torch.bfloat16), torch.full((700,), 2.0**-8)
    ours, plain = on_both(total, term, **names)
    assert torch.equal(ours, plain)
    # A coin for each element between 1 and the next number: five standard errors.
    assert abs((ours > 1.0).double().mean().item() - 0.5) < 5 * 0.5 / 700**0.5


def test_the_hosts_hash_is_the_tensors() -> None:
    zero = torch.zeros((), dtype=torch.int64)
    for words in ((0, 0), (1, 2), (-7, 2**40 + 3), (2**63 - 1, -(2**63)), (5,), (1, 2, 3)):
        assert chain_numbers(*words) % 2**32 == chain(zero, *words).item()
        assert -(2**31) <= chain_numbers(*words) < 2**31


def test_every_kind_of_number_comes_through() -> None:
    largest = torch.finfo(torch.bfloat16).max
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-133, -(2.0**-126), largest, -largest, 1.0, -1.0, 3e38]
    total = torch.tensor(special).bfloat16().repeat_interleave(len(special))
    term = torch.tensor(special).repeat(len(special))
    for sample in range(4):
        ours, plain = on_both(total, term, sample=sample)
        assert torch.equal(bits(ours), bits(plain))
    assert torch.equal(ours.isnan(), (total.float() + term).isnan())
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000], dtype=torch.int32).view(torch.float32)
    assert on_both(torch.ones(5, dtype=torch.bfloat16), nan)[0].isnan().all()


def test_small_terms_are_in_the_mean() -> None:
    total = torch.full((8_000,), 256.0, dtype=torch.bfloat16, device=DEVICE)
    term = torch.full((8_000,), 0.4, device=DEVICE)
    with running_on("sm86"):
        for sample in range(5):
            add(CARDS["sm86"], total, term, sample=sample)
    # The next number above 256 is 258, one step in five: five standard errors of the five steps' mean.
    error = 2.0 * (5 * 0.2 * 0.8 / 8_000) ** 0.5
    assert abs(total.double().mean().item() - 256.0 - 2.0) < 5 * error


def test_slices_turned_terms_and_odd_addresses_are_taken_and_nothing_beside_is_touched() -> None:
    wide = unwritten(1 + 21 * 37 + 9, dtype=torch.bfloat16)
    total, term = wide[1 : 1 + 21 * 37].view(21, 37), numbers(21 * 37, torch.float32).view(37, 21).mT
    total.copy_(numbers(21 * 37, torch.bfloat16).view(21, 37))
    plain = on_both(total.cpu(), term)[1]
    with running_on("sm90"):
        add(CARDS["sm90"], total, term.to(DEVICE))
    assert torch.equal(total.cpu(), plain)
    assert torch.cat([wide[:1], wide[1 + 21 * 37 :]]).isnan().all()


@TERMS
@pytest.mark.parametrize("card", list(CARDS))
def test_on_paper_it_is_one_launch_that_moves_both_and_the_sum(dtype: torch.dtype, card: str) -> None:
    count = 3_000_000
    launches: list[Launch] = []
    told: list[HiddenWork] = []
    with torch.device("meta"), simulate_card(CARDS[card], told.append, note_launch=launches.append):
        total, term = torch.empty(count, dtype=torch.bfloat16), torch.empty(count, dtype=dtype)
        sample = torch.zeros((), dtype=torch.int64)
        with LiveBytes().ignore(total, term, sample) as live:
            add_rounded_(total, term, 1, 2, sample)
    assert live.peak == 0
    assert [(what.kernel, what.grid) for what in launches] == [("add_rounded_kernel", (-(-count // 1024),))]
    assert told == [HiddenWork(0.0, (4 + dtype.itemsize) * count, 1.0)]


def test_under_compile_the_sum_is_one_op_of_the_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def run(total: Tensor, term: Tensor, sample: Tensor) -> None:
        add_rounded_(total, term, 7, 2, sample)

    results = []
    with running_on("sm86"):
        for way in (run, torch.compile(run, fullgraph=True, backend=keep)):
            total = numbers(300, torch.bfloat16).to(DEVICE)
            way(total, torch.ones(300, device=DEVICE), torch.tensor(3, device=DEVICE))
            results.append(total)
    assert torch.equal(*results)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("lowvram_kernels" in name for name in called) == 1
