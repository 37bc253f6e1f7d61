"""The share of Muon's iteration: which matrices, their FLOPs against a rehearsal's, and what the tool prints."""

from __future__ import annotations

import pytest
import torch
from lowvram_kernels.dispatch import Card, simulate_card
from lowvram_kernels.optim.muon import orthogonalise

from lowvram.fit.rehearse import LiveStorage
from lowvram.model.transformer import Transformer
from tests.model.variants import VARIANTS
from tools.bench import optim
from tools.bench.optim import alternate, iteration_flops, matrices_of, micro_batch_flops


def test_every_matrix_of_the_blocks_is_there_and_gate_and_up_are_two() -> None:
    model = Transformer(VARIANTS["gqa-moe-untied"])
    found = matrices_of(model)
    beside = [w for n, w in model.named_parameters() if w.dim() == 1 or n in ("embedding", "head") or "router" in n]
    elements = sum(weight.numel() for weight in model.parameters()) - sum(weight.numel() for weight in beside)
    assert sum(count * rows * columns for count, rows, columns in found) == elements
    # Five routed experts of a hidden size of 20, gate over up.
    assert (10, 20, 36) in found
    assert (5, 36, 20) in found


@pytest.mark.parametrize("shape", [(3, 20, 36), (3, 36, 20), (1, 24, 24)], ids=str)
def test_the_iterations_flops_are_those_that_a_rehearsal_counts(shape: tuple[int, int, int]) -> None:
    counter = LiveStorage(1)
    with torch.device("meta"), simulate_card(Card("cpu")), counter:
        orthogonalise(torch.zeros(shape, dtype=torch.bfloat16), 4)
    (values,) = counter.work.values()
    assert iteration_flops([shape], 4) == values[0] > 0


def test_forward_and_backward_are_counted_with_attention() -> None:
    config = VARIANTS["gqa-rope"]
    least = 6 * (config.num_parameters() - 5 * config.dim) * 2 * 16
    assert least < micro_batch_flops(config, 2, 16) < 1.5 * least
    assert micro_batch_flops(config, 4, 16) == pytest.approx(2 * micro_batch_flops(config, 2, 16), rel=1e-3)


def test_runs_alternate_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    found = alternate([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b"] * 3
    assert len(found) == 2


def test_the_tool_prints_the_share_of_each_number_of_iterations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optim, "load_preset", lambda name: (VARIANTS["gqa-rope"], None))
    optim.measure("small", 1, 16, 64, 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("small: forward and backward of 64 tokens")
    assert "scaled linearly by 4" in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["3", "4", "5"]
    assert all("of the step's CPU seconds" in line for line in lines[2:])
