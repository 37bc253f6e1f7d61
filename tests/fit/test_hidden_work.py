"""What paper tells of the chunks that it does not run is what they cost."""

from __future__ import annotations

from collections.abc import Callable

import lowvram_kernels.optim.adamw8 as adamw8
import lowvram_kernels.optim.muon as muon
import lowvram_kernels.random.stochastic_rounding as rounding
import pytest
import torch
from lowvram_kernels.dispatch import Card, simulate_card

from lowvram.fit.rehearse import LiveStorage

CHUNK = rounding.CHUNK
# The figures are rounded; launches are few.
NEAR = 0.1


def step_adamw8(count: int, dtype: torch.dtype) -> Callable[[], None]:
    weight, gradient, step = torch.zeros(count, dtype=dtype), torch.ones(count), torch.ones(())
    moments, maps = adamw8.new_moments(weight), adamw8.build_maps("meta")
    return lambda: adamw8.adamw8_(weight, gradient, moments, maps, step, 1e-3, skip=torch.zeros(()))


def step_muon(count: int, dtype: torch.dtype, bits: int) -> Callable[[], None]:
    weight, gradient, step = torch.zeros(count // 512, 512, dtype=dtype), torch.ones(count), torch.ones(())
    momentum, codes = muon.new_momentum(weight, bits), adamw8.build_maps("meta").first
    return lambda: muon.muon_(weight, gradient, momentum, codes, step, 1e-3, skip=torch.zeros(()))


def add_rounded(count: int, dtype: torch.dtype) -> Callable[[], None]:
    total, term = torch.zeros(count, dtype=torch.bfloat16), torch.zeros(count, dtype=dtype)
    return lambda: rounding.add_rounded_(total, term, 0, 0, torch.zeros((), dtype=torch.int64))


OPS: dict[str, Callable[[int], Callable[[], None]]] = {
    "adamw8-fp32": lambda count: step_adamw8(count, torch.float32),
    "adamw8-bf16": lambda count: step_adamw8(count, torch.bfloat16),
    "muon-16-fp32": lambda count: step_muon(count, torch.float32, 16),
    "muon-8-fp32": lambda count: step_muon(count, torch.float32, 8),
    "muon-16-bf16": lambda count: step_muon(count, torch.bfloat16, 16),
    "muon-8-bf16": lambda count: step_muon(count, torch.bfloat16, 8),
    "add_rounded-bf16": lambda count: add_rounded(count, torch.bfloat16),
    "add_rounded-fp32": lambda count: add_rounded(count, torch.float32),
}


def work_of(name: str, chunks: int) -> tuple[float, float]:
    """Bytes moved and launches of an op over so many chunks."""
    counter = LiveStorage(1)
    with torch.device("meta"), simulate_card(Card("cpu"), counter.add_hidden, counter.mark_host):
        run = OPS[name](chunks * CHUNK)
        with counter:
            run()
    (values,) = counter.work.values()
    return values[1], values[2]


@pytest.mark.parametrize("name", list(OPS))
def test_chunks_that_do_not_run_are_told_as_what_they_cost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The iteration runs whole on paper.
    monkeypatch.setattr(muon, "orthogonalise", lambda u_BMN, *others: u_BMN)
    told = [many - one for one, many in zip(work_of(name, 1), work_of(name, 5), strict=True)]
    monkeypatch.setattr(rounding, "is_simulated", lambda: False)
    cost = [many - one for one, many in zip(work_of(name, 1), work_of(name, 5), strict=True)]
    assert told == pytest.approx(cost, rel=NEAR)
