"""Which plan is chosen, and the sentence that says why: on invented cards of a few thousand bytes."""

from __future__ import annotations

import math

import pytest

from lowvram.config.plan import Ledger, Plan, Recompute
from lowvram.config.train import divisors
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal, Work
from lowvram.fit.search import ANY, PlanConstraints, SearchResult, search, spend_the_rest

# Bytes of a sequence: what is computed again need not be kept.
KEPT = {"none": 400, "attention": 200, "block": 100}
# Computing again takes longer; a micro-batch has a fixed cost, so that larger ones are faster.
SLOWER = {"none": 1.0, "attention": 1.1, "block": 1.3}
FIXED = 1_000
NOTHING = Work(0.0, 0.0, 0.0)


class Model:
    """An invented model whose step has 16 sequences; remembers what was rehearsed."""

    def __init__(self, samples: int = 16, overhead: float = 1.0, accumulating: int = 0) -> None:
        self.sketch = MemoryCurve(divisors(samples), self._rehearse, 2_000)
        self.rehearsed: list[tuple[Recompute, int]] = []
        self._overhead, self._accumulating = overhead, accumulating

    def _rehearse(self, plan: Plan) -> Rehearsal:
        self.rehearsed.append((plan.recompute, plan.micro_batch))
        gradients = self._accumulating if plan.accumulate > 1 else 0
        ledger = Ledger(FIXED, gradients, 0, KEPT[plan.recompute] * plan.micro_batch, 0, 0, "backward")
        return Rehearsal(ledger, NOTHING, NOTHING)

    def seconds(self, _: Rehearsal, plan: Plan) -> float:
        return plan.accumulate * (self._overhead + plan.micro_batch * SLOWER[plan.recompute])

    def search(self, limit_bytes: int, exact: bool = False, constraints: PlanConstraints = ANY) -> SearchResult:
        return search(self.sketch, limit_bytes, self.seconds, exact, constraints)


def test_with_much_room_the_whole_step_is_taken_at_once_and_nothing_else_is_tried() -> None:
    model = Model()
    found = model.search(FIXED + 16 * 400)
    assert found.fits
    assert found.plan == Plan(micro_batch=16, accumulate=1)
    assert found.reason == "the whole step fits at once, and nothing is computed twice"
    assert {technique for technique, _ in model.rehearsed} == {"none"}


def test_one_byte_less_takes_the_next_smaller_plan() -> None:
    found = Model(overhead=0.2).search(FIXED + 4 * 400 - 1)
    assert found.plan == Plan(micro_batch=2, accumulate=8)
    assert found.reason == "2 sequences at a time are the most that fit, and nothing is computed twice"


def test_a_card_that_gains_nothing_from_more_sequences_is_not_given_more_to_compute() -> None:
    model = Model(overhead=0.03)
    found = model.search(FIXED + 4 * 400)
    assert found.plan.recompute == "none"
    assert {technique for technique, _ in model.rehearsed} == {"none"}


def test_recomputation_is_chosen_where_larger_micro_batches_pay_for_it() -> None:
    found = Model(overhead=10.0).search(FIXED + 2 * 400)
    # 16 sequences: none 8 · (10 + 2), attention 4 · (10 + 4.4), block 2 · (10 + 10.4).
    assert found.plan == Plan(micro_batch=8, accumulate=2, recompute="block")
    ratio = f"{96 / 40.8:.2f}"
    assert found.reason == (
        "8 sequences at a time are the most that fit; without recomputation at most 2 would, "
        f"and a step would take {ratio} times as long"
    )


def test_the_reason_is_the_same_where_the_chosen_plan_is_rehearsed_again() -> None:
    model = Model(overhead=10.0)
    found = model.search(FIXED + 400, exact=True)
    assert found.reason == Model(overhead=10.0).search(FIXED + 400).reason
    assert model.rehearsed[-1] == ("block", 4), "no anchor, so the line was not enough"
    assert "times as long" in found.reason


def test_recomputation_is_not_chosen_where_it_only_costs_time() -> None:
    found = Model(overhead=0.1).search(FIXED + 2 * 400)
    assert found.plan == Plan(micro_batch=2, accumulate=8)


def test_of_equally_fast_plans_the_smaller_one_leaves_room() -> None:
    found = Model(overhead=0.03).search(FIXED + 16 * 400)
    # 16 sequences a step: 16.48 s one by one, 16.24 in twos, 16.03 at once: from 2 on within 2 %.
    assert found.plan.micro_batch == 2
    assert found.reason == "more than 2 sequences at a time would be no faster, and nothing is computed twice"


def test_where_one_sequence_fits_only_with_recomputation_that_is_said() -> None:
    found = Model().search(FIXED + 100)
    assert found.plan == Plan(micro_batch=1, accumulate=16, recompute="block")
    assert found.reason == "1 sequence at a time is the most that fits; without recomputation not even one would"


def test_where_nothing_fits_the_smallest_plan_is_returned() -> None:
    found = Model().search(FIXED + 99)
    assert not found.fits
    assert found.plan == Plan(micro_batch=1, accumulate=16, recompute="block")
    assert found.peak_bytes == FIXED + 100
    assert found.reason == "this is the smallest plan: one sequence at a time, every block computed again in backward"


def test_the_whole_step_is_tried_where_its_half_does_not_fit_since_it_accumulates_nothing() -> None:
    # Half the step takes 1,000 + 4,000 + 8 · 400, the whole one 1,000 + 16 · 400.
    found = Model(accumulating=4_000).search(FIXED + 16 * 400)
    assert found.plan == Plan(micro_batch=16, accumulate=1)
    assert found.fits


@pytest.mark.parametrize("samples, expected", [(1, 1), (7, 1), (12, 3), (15, 3)], ids=str)
def test_every_plan_keeps_the_tokens_of_a_step(samples: int, expected: int) -> None:
    found = Model(samples, overhead=1.0).search(FIXED + 3 * 400, constraints=PlanConstraints(recompute="none"))
    assert found.plan.micro_batch == expected
    assert found.plan.micro_batch * found.plan.accumulate == samples


@pytest.mark.parametrize("limit_bytes", range(1_000, 8_000, 450))
def test_what_is_said_to_fit_fits(limit_bytes: int) -> None:
    found = Model(accumulating=250).search(limit_bytes)
    assert found.fits == (found.peak_bytes <= limit_bytes)


def test_what_a_person_insists_on_is_all_that_is_searched() -> None:
    model = Model(overhead=10.0)
    asked = model.search(FIXED + 16 * 400, constraints=PlanConstraints(micro_batch=4, recompute="block"))
    assert asked.plan == Plan(micro_batch=4, accumulate=4, recompute="block")
    assert asked.reason == "you asked for it"
    assert {technique for technique, _ in model.rehearsed} == {"block"}
    least_work = Model(overhead=1e6).search(FIXED + 16 * 400, constraints=PlanConstraints(micro_batch=4))
    assert least_work.plan.recompute == "none", "all are equally fast, and there is room"
    kept = model.search(FIXED + 2 * 400, constraints=PlanConstraints(micro_batch=4))
    assert kept.plan == Plan(micro_batch=4, accumulate=4, recompute="attention")
    least = model.search(FIXED + 3 * 100, constraints=PlanConstraints(micro_batch=4))
    assert not least.fits
    assert least.plan == Plan(micro_batch=4, accumulate=4, recompute="block")
    assert "asked for" in least.reason


@pytest.mark.parametrize("samples", [2, 3, 7, 9, 16], ids=str)
def test_the_whole_step_is_found_whatever_divides_it(samples: int) -> None:
    model = Model(samples, accumulating=9_000)
    found = model.search(FIXED + samples * 100)
    assert found.fits
    assert found.plan == Plan(micro_batch=samples, accumulate=1, recompute="block")


def test_a_plan_whose_own_rehearsal_is_above_the_limit_is_passed_over() -> None:
    class Bent(Model):
        """Between its anchors it takes more than the line says."""

        def _rehearse(self, plan: Plan) -> Rehearsal:
            found = super()._rehearse(plan)
            more = 300 if plan.micro_batch == 4 else 0
            return found._replace(ledger=found.ledger._replace(loss=more))

    limit = FIXED + 4 * 400 + 100
    lined = Bent(overhead=0.2).search(limit)
    assert lined.plan.micro_batch == 4
    assert not lined.is_rehearsed
    exact = Bent(overhead=0.2).search(limit, exact=True)
    assert exact.plan.micro_batch == 2
    assert exact.is_rehearsed
    assert exact.peak_bytes <= limit


def test_a_plan_is_never_called_asked_for_where_nothing_was_asked() -> None:
    nothing = Model().search(FIXED + 99, constraints=ANY)
    moved = search(Model().sketch, FIXED + 99, Model().seconds, may_offload=lambda _: True)
    assert not nothing.fits
    assert not moved.fits
    assert "asked for" not in nothing.reason + moved.reason
    asked = search(
        Model().sketch,
        FIXED + 99,
        Model().seconds,
        constraints=PlanConstraints(micro_batch=2),
        may_offload=lambda _: True,
    )
    assert "asked for" in asked.reason


class Heavy(Model):
    """States of 1,000 bytes, which may lie in the computer's memory instead; moving them takes a while each step."""

    STATES, MOVING_S = 1_000, 1.0

    def _rehearse(self, plan: Plan) -> Rehearsal:
        found = super()._rehearse(plan)
        states = self.STATES if plan.offload == "none" else 0
        kept = self.STATES - states
        ledger = found.ledger._replace(optimizer=states, kept_on_host=kept, host_bytes=kept)
        return found._replace(ledger=ledger)

    def seconds(self, rehearsal: Rehearsal, plan: Plan) -> float:
        return super().seconds(rehearsal, plan) + (self.MOVING_S if plan.offload == "optimizer" else 0.0)

    def move(self, limit_bytes: int, has_room: bool = True) -> SearchResult:
        return search(self.sketch, limit_bytes, self.seconds, may_offload=lambda _: has_room)


def test_states_are_moved_where_the_room_that_they_leave_is_worth_it() -> None:
    # One sequence beside the states takes 16 · (10 + 1.3) s, eight without them 2 · (10 + 8 · 1.3) + 1.
    limit = FIXED + Heavy.STATES + 100
    moved = Heavy(overhead=10.0).move(limit)
    assert (moved.plan.offload, moved.plan.micro_batch) == ("optimizer", 8)
    assert moved.reason == (
        "the optimizer's states lie in the computer's memory, which makes room for 8 sequences at a time; "
        f"with them on the card a step would take {180.8 / 41.8:.2f} times as long"
    )
    assert Heavy(overhead=10.0).move(limit, has_room=False).plan.offload == "none"
    assert Heavy(overhead=0.0).move(limit).plan.offload == "none", "moving would cost and gain nothing"


@pytest.mark.parametrize("overhead", [0.01, 0.2, 1.0, 10.0])
def test_more_memory_never_makes_a_step_slower(overhead: float) -> None:
    model, before = Heavy(overhead=overhead), math.inf
    for limit in range(FIXED, FIXED + 9_000, 50):
        found = model.move(limit)
        if found.fits:
            seconds = model.seconds(found.rehearsal, found.plan)
            assert seconds <= before, limit
            before = seconds
        assert found.fits == (limit >= FIXED + 100)


@pytest.mark.parametrize(
    ("room", "faster", "chunk", "keeps"),
    [
        pytest.param(10_000, 0.1, 4000, True, id="room-for-all"),
        pytest.param(2_000, 0.1, 1024, True, id="room-for-a-shorter-chunk-and-the-casts"),
        pytest.param(1_100, 0.1, 1024, False, id="room-for-a-shorter-chunk"),
        pytest.param(0, 0.1, None, False, id="no-room"),
        pytest.param(10_000, 0.0004, None, False, id="no-gain"),
    ],
)
def test_memory_that_is_left_goes_to_longer_chunks_of_the_loss_and_then_to_kept_casts(
    room: int, faster: float, chunk: int | None, keeps: bool
) -> None:
    def rehearse(plan: Plan) -> Rehearsal:
        spent = (plan.loss_chunk or 0) + 900 * plan.keep_casts
        return Rehearsal(Ledger(FIXED, 0, 0, spent, 0, 0, "loss"), NOTHING, NOTHING)

    def seconds(_: Rehearsal, plan: Plan) -> float:
        return 1.0 - faster * ((plan.loss_chunk or 0) / 512 + plan.keep_casts) / 4

    curve = MemoryCurve(divisors(4), rehearse, 4_000)
    found = search(curve, FIXED + room, seconds, exact=True)
    spent = spend_the_rest(found, curve, FIXED + room, seconds)
    assert (spent.plan.loss_chunk, spent.plan.keep_casts) == (chunk, keeps)
    assert spent.peak_bytes <= FIXED + room
    assert spent.plan.micro_batch == found.plan.micro_batch


def test_no_longer_chunk_is_tried_after_a_doubling_that_gained_too_little() -> None:
    tried: list[int | None] = []

    def rehearse(plan: Plan) -> Rehearsal:
        tried.append(plan.loss_chunk)
        return Rehearsal(Ledger(FIXED, 0, 0, 0, 0, 0, "loss"), NOTHING, NOTHING)

    curve = MemoryCurve([16], rehearse, 1_000)
    found = search(curve, FIXED, lambda _, plan: 1.0, exact=True)
    spent = spend_the_rest(found, curve, FIXED, lambda _, plan: 1.0 + 8 / (plan.loss_chunk or 400))
    assert spent.plan.loss_chunk == 2048, "4096 rows would be faster by 0.2 %"
    assert 8192 not in tried


def test_no_chunk_is_longer_than_a_micro_batch() -> None:
    curve = MemoryCurve(divisors(2), Model(samples=2)._rehearse, 600)
    found = search(curve, FIXED + 10_000, lambda _, plan: 1.0, exact=True, constraints=PlanConstraints(micro_batch=1))
    spent = spend_the_rest(found, curve, FIXED + 10_000, lambda _, plan: 1.0 / (plan.loss_chunk or 1))
    assert spent.plan.loss_chunk == 600, "one chunk is all"
