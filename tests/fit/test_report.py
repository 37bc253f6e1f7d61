"""What is said about a model on a card, in numbers that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.config.plan import Ledger, Plan
from lowvram.config.run import RunOptions
from lowvram.config.run_file import load_preset
from lowvram.config.train import divisors
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal, Work
from lowvram.fit.report import SYSTEM_BYTES, FitReport, MemoryBudget, evaluate_fit
from lowvram.fit.throughput import step_seconds
from lowvram.hardware.profile import generic_profile, load_profile

MODEL, TRAIN = load_preset("tr-25m")
CARD = load_profile("rtx5070")
GIB = 2**30
WEIGHTS, OPTIMIZER, EACH, HOST = 100_000_000, 200_000_000, 10_000_000, 123_456_789


def rehearse(plan: Plan) -> Rehearsal:
    moved = plan.offload == "optimizer"
    lines = (WEIGHTS, 0, 0 if moved else OPTIMIZER, EACH * plan.micro_batch, 0, 0)
    kept = OPTIMIZER if moved else 0
    ledger = Ledger(*lines, "backward", HOST + kept, kept, WEIGHTS + OPTIMIZER)
    n = plan.micro_batch
    return Rehearsal(ledger, Work(1e12 * n, 1e9 * n, 1000.0), Work(0.0, 5e8, 100.0))


def answer_on(place: MemoryBudget, name: str = "tr-25m", **changes: object) -> FitReport:
    train = TRAIN.model_copy(update=changes)
    return evaluate_fit(name, MODEL, train, MemoryCurve(train.micro_batches, rehearse, 2_000), place)


ROOMY = MemoryBudget(CARD, 8 * GIB, 9 * GIB)


def test_days_and_electricity_follow_from_the_speed_of_the_plan() -> None:
    answer = answer_on(ROOMY)
    seconds = step_seconds(answer.found.rehearsal, answer.found.plan, TRAIN, CARD)
    assert answer.fits
    assert answer.speed.tokens_per_second == pytest.approx(TRAIN.batch_tokens / seconds)
    assert answer.days == pytest.approx(TRAIN.tokens / TRAIN.batch_tokens * seconds / 86_400)
    assert answer.kwh == pytest.approx((CARD.watts + 60) * answer.days * 24 / 1000)


def test_a_checkpoint_is_weights_and_optimizer_and_one_more_than_are_kept_must_have_room() -> None:
    answer = answer_on(ROOMY)
    state = WEIGHTS + OPTIMIZER
    assert answer.state_bytes == state
    assert answer.disk_bytes == 3 * state + 2 * TRAIN.tokens
    assert answer.written_bytes_per_day == state * 144, "every ten minutes"


def test_a_large_state_is_saved_so_seldom_that_a_disk_lasts() -> None:
    def large(plan: Plan) -> Rehearsal:
        found = rehearse(plan)
        return found._replace(ledger=found.ledger._replace(checkpoint_bytes=4 * GIB))

    answer = evaluate_fit("large", MODEL, TRAIN, MemoryCurve(divisors(64), large, 2_000), ROOMY)
    assert answer.written_bytes_per_day == 50_000_000_000


def test_a_run_that_says_how_often_it_saves_and_how_many_it_keeps_is_believed() -> None:
    options = RunOptions(dir=Path("run"), keep=5, save_every_minutes=60)
    answer = evaluate_fit("mine", MODEL, TRAIN, MemoryCurve(divisors(64), rehearse, 2_000), ROOMY, options=options)
    assert answer.written_bytes_per_day == answer.state_bytes * 24
    assert answer.disk_bytes == 6 * answer.state_bytes + 2 * TRAIN.tokens


def test_what_fits_only_without_a_desktop_says_so_and_is_planned_for_that() -> None:
    least = WEIGHTS + EACH
    answer = answer_on(MemoryBudget(CARD, least - 1, least + EACH))
    assert (answer.fits, answer.found.fits, answer.fits_headless) == (False, False, True)
    assert least <= answer.found.peak_bytes <= least + EACH
    assert answer.speed is not None
    assert answer.days is not None


def test_what_fits_nowhere_has_no_speed_and_shows_the_smallest_plan() -> None:
    answer = answer_on(MemoryBudget(CARD, 10, WEIGHTS + EACH - 1))
    assert (answer.fits, answer.fits_headless) == (False, False)
    assert (answer.found.plan.micro_batch, answer.found.plan.recompute) == (1, "block")
    assert (answer.speed, answer.days, answer.kwh) == (None, None, None)


def test_states_move_to_the_computers_memory_only_where_nothing_fits_with_them_on_the_card() -> None:
    least = WEIGHTS + OPTIMIZER + EACH
    on_card, moved = (answer_on(MemoryBudget(CARD, limit, limit)) for limit in (least, least - 1))
    assert (on_card.fits, on_card.found.plan.offload) == (True, "none")
    assert (moved.fits, moved.found.plan.offload, moved.found.plan.recompute) == (True, "optimizer", "block")
    assert moved.host_bytes == on_card.host_bytes + OPTIMIZER
    assert moved.state_bytes == on_card.state_bytes
    assert moved.found.reason.startswith("the optimizer's states lie in the computer's memory")
    crowded = answer_on(MemoryBudget(CARD, least - 1, least - 1, ram_bytes=GIB + HOST + OPTIMIZER + SYSTEM_BYTES - 7))
    assert (crowded.fits, crowded.lacks_host_bytes) == (False, 7)


@pytest.mark.parametrize("card", ["m4", "cpu"])
def test_one_memory_has_no_other_side_to_move_states_to(card: str) -> None:
    least = WEIGHTS + OPTIMIZER + EACH
    answer = answer_on(MemoryBudget(load_profile(card), least - 1, least - 1))
    assert (answer.fits, answer.found.plan.offload) == (False, "none")


def test_a_step_that_updates_during_backward_is_planned_at_once_or_not_at_all() -> None:
    whole = WEIGHTS + OPTIMIZER + EACH * TRAIN.batch_samples
    answer = answer_on(MemoryBudget(CARD, whole, whole), update_during_backward=True)
    assert (answer.found.plan.micro_batch, answer.found.plan.accumulate) == (TRAIN.batch_samples, 1)
    short = whole - OPTIMIZER - 1
    assert not answer_on(MemoryBudget(CARD, short, short), update_during_backward=True).fits


@pytest.mark.parametrize(
    "ram_bytes, lacks", [(None, 0), (16 * GIB, 0), (GIB + HOST, 0), (GIB + HOST - 1, 1), (GIB // 2, HOST + GIB // 2)]
)
def test_a_computer_with_too_little_memory_is_told_how_much_it_lacks(ram_bytes: int | None, lacks: int) -> None:
    answer = answer_on(ROOMY._replace(ram_bytes=ram_bytes))
    assert answer.host_bytes == GIB + HOST
    assert answer.lacks_host_bytes == lacks
    assert answer.fits == (lacks == 0)
    assert answer.found.fits, "the card has room"


def test_where_memory_is_shared_nothing_is_counted_twice() -> None:
    answer = answer_on(MemoryBudget(load_profile("m3-max"), 8 * GIB, 8 * GIB, ram_bytes=36 * GIB))
    assert answer.host_bytes == GIB // 2


def test_of_a_card_without_figures_the_plan_is_known_and_the_speed_is_not() -> None:
    answer = answer_on(MemoryBudget(generic_profile(8 * GIB), 6 * GIB, 7 * GIB))
    assert answer.fits
    assert (answer.speed, answer.days, answer.kwh) == (None, None, None)


def test_time_and_electricity_have_the_range_of_the_speed() -> None:
    answer = answer_on(ROOMY)
    for middle, (low, high) in ((answer.days, answer.days_range), (answer.kwh, answer.kwh_range)):
        assert low == pytest.approx(middle * answer.speed.tokens_per_second / answer.speed.high)
        assert high == pytest.approx(middle * answer.speed.tokens_per_second / answer.speed.low)
        assert low < middle < high
    unknown = answer_on(MemoryBudget(generic_profile(8 * GIB), 6 * GIB, 7 * GIB))
    assert (unknown.days_range, unknown.kwh_range) == (None, None)
