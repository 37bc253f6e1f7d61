"""Between rehearsals lie straight lines: invented numbers, so that every sum can be checked by hand."""

from __future__ import annotations

import pytest

from lowvram.config.plan import Ledger, Plan
from lowvram.config.train import divisors
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal, Work

WORK = Work(1.0, 2.0, 3.0, 4.0)


def linear(plan: Plan) -> Rehearsal:
    """100 bytes a sequence above 1,000 that do not grow; gradients only where they accumulate."""
    n = plan.micro_batch
    gradients = 300 if plan.accumulate > 1 else 0
    micro = Work(10.0 * n, 20.0 * n, 7.0, 1.0 * n)
    return Rehearsal(Ledger(700, gradients, 0, 100 * n, 0, 0, f"moment {n}", host_bytes=50 + n), micro, WORK)


class Asked:
    """A rehearsal that writes down for what it was asked."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []

    def __call__(self, plan: Plan) -> Rehearsal:
        self.plans.append(plan)
        return linear(plan)


@pytest.mark.parametrize(
    "count, expected",
    [(1, [1]), (2, [1, 2]), (7, [1, 7]), (12, [1, 2, 3, 4, 6, 12]), (15, [1, 3, 5, 15])],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_divisors_are_all_there_and_in_order(count: int, expected: list[int]) -> None:
    assert divisors(count) == expected


@pytest.mark.parametrize(
    "samples, seq_len, anchors",
    [
        *[(1, 2_048, [1]), (2, 2_048, [1]), (7, 2_048, [1]), (12, 2_048, [1, 4, 6]), (15, 4_096, [1, 3, 5])],
        # All whose loss may be one chunk of 1,024 rows and the next; the first with 8,192, with 16,384; the largest.
        *[(64, 2_048, [1, 4, 8, 32]), (64, 1_024, [1, 2, 8, 16, 32]), (9, 100, [1, 3])],
        (128, 512, [1, 2, 4, 16, 32, 64]),
    ],
    ids=str,
)
def test_anchors_are_where_the_line_may_bend(samples: int, seq_len: int, anchors: list[int]) -> None:
    assert MemoryCurve(divisors(samples), linear, seq_len).anchors() == anchors


def test_a_plan_in_between_is_on_the_line_of_two_rehearsals_and_is_not_rehearsed() -> None:
    asked = Asked()
    sketch = MemoryCurve(divisors(12), asked, 2_000)
    found = sketch.at("none", 3)
    assert [(plan.micro_batch, plan.accumulate) for plan in asked.plans] == [(1, 12), (6, 2)]
    assert found.ledger.peak_bytes == 1_300
    assert found.micro == Work(30.0, 60.0, 7.0, 3.0)
    assert found.update == WORK
    assert found.ledger.moment == "moment 6"
    assert found.ledger.host_bytes == 56, "the more of both"


def test_the_whole_step_is_rehearsed_itself_since_it_accumulates_nothing() -> None:
    asked = Asked()
    found = MemoryCurve(divisors(12), asked, 2_000).at("block", 12)
    assert [(plan.micro_batch, plan.accumulate, plan.recompute) for plan in asked.plans] == [(12, 1, "block")]
    assert found.ledger.gradients == 0


def test_a_rehearsal_is_made_once_and_then_taken_instead_of_the_line() -> None:
    asked = Asked()
    sketch = MemoryCurve(divisors(12), asked, 2_000)
    first = sketch.exactly("attention", 4)
    assert sketch.exactly("attention", 4) is sketch.at("attention", 4) is first
    assert len(asked.plans) == 1
    assert sketch.at("none", 4) is not first, "another technique is another rehearsal"


def test_lines_of_two_moments_add_up_to_the_peak_between_them() -> None:
    ledgers = {1: Ledger(100, 0, 200, 0, 0, 0, "update"), 8: Ledger(100, 0, 0, 800, 101, 7, "backward")}

    def rehearse(plan: Plan) -> Rehearsal:
        return Rehearsal(ledgers[plan.micro_batch], WORK, WORK)

    ledger = MemoryCurve(divisors(16), rehearse, 2_000).at("none", 4).ledger
    between = 300 + (1008 - 300) * 3 / 7
    assert ledger.peak_bytes == pytest.approx(between, abs=3), "six lines are rounded"
    assert min(ledger.weights, ledger.optimizer, ledger.activations, ledger.loss, ledger.temporaries) > 0


def test_a_step_of_one_sequence_has_one_plan() -> None:
    asked = Asked()
    assert MemoryCurve(divisors(1), asked, 2_000).at("none", 1).ledger.peak_bytes == 800
    assert [(plan.micro_batch, plan.accumulate) for plan in asked.plans] == [(1, 1)]


def test_what_graphs_take_lies_on_the_line_too_and_stays_unknown_where_it_is() -> None:
    def graphs(plan: Plan) -> Rehearsal:
        return linear(plan)._replace(recorded_bytes=1_000 + 100 * plan.micro_batch)

    assert MemoryCurve(divisors(12), graphs, 2_000).at("none", 3).recorded_bytes == 1_300
    assert MemoryCurve(divisors(12), linear, 2_000).at("none", 3).recorded_bytes == 0
