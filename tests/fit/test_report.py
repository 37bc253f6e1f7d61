"""What is said about a model on a card, in numbers that can be checked by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowvram.config.plan import Ledger, Plan
from lowvram.config.run import RunOptions
from lowvram.config.run_file import load_preset
from lowvram.config.train import divisors
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal, Work
from lowvram.fit.receipts import ReceiptSummary
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


def report_on(budget: MemoryBudget, name: str = "tr-25m", **changes: object) -> FitReport:
    train = TRAIN.model_copy(update=changes)
    return evaluate_fit(name, MODEL, train, MemoryCurve(train.micro_batches, rehearse, 2_000), budget)


ROOMY = MemoryBudget(CARD, 8 * GIB, 9 * GIB)


def test_days_and_electricity_follow_from_the_speed_of_the_plan() -> None:
    report = report_on(ROOMY)
    seconds = step_seconds(report.search_result.rehearsal, report.search_result.plan, TRAIN, CARD)
    assert report.fits
    assert report.speed.tokens_per_second == pytest.approx(TRAIN.batch_tokens / seconds)
    assert report.days == pytest.approx(TRAIN.tokens / TRAIN.batch_tokens * seconds / 86_400)
    assert report.kwh == pytest.approx((CARD.watts + 60) * report.days * 24 / 1000)


def test_a_checkpoint_is_weights_and_optimizer_and_all_that_may_exist_at_once_must_have_room() -> None:
    report = report_on(ROOMY)
    state = WEIGHTS + OPTIMIZER
    assert report.state_bytes == state
    assert report.disk_bytes == 5 * state + 2 * TRAIN.tokens, "two, the best, the one that is written, and the reserve"
    assert report.written_bytes_per_day == state * 144, "every ten minutes"


def test_a_large_state_is_saved_so_seldom_that_a_disk_lasts() -> None:
    def large(plan: Plan) -> Rehearsal:
        found = rehearse(plan)
        return found._replace(ledger=found.ledger._replace(checkpoint_bytes=4 * GIB))

    report = evaluate_fit("large", MODEL, TRAIN, MemoryCurve(divisors(64), large, 2_000), ROOMY)
    assert report.written_bytes_per_day == 50_000_000_000


def test_a_run_that_says_how_often_it_saves_and_how_many_it_keeps_is_believed() -> None:
    options = RunOptions(dir=Path("run"), keep=5, save_every_minutes=60)
    report = evaluate_fit("mine", MODEL, TRAIN, MemoryCurve(divisors(64), rehearse, 2_000), ROOMY, options=options)
    assert report.written_bytes_per_day == report.state_bytes * 24
    assert report.disk_bytes == 8 * report.state_bytes + 2 * TRAIN.tokens


def test_what_fits_only_without_a_desktop_says_so_and_is_planned_for_that() -> None:
    least = WEIGHTS + EACH
    report = report_on(MemoryBudget(CARD, least - 1, least + EACH))
    assert (report.fits, report.search_result.fits, report.fits_headless) == (False, False, True)
    assert least <= report.search_result.peak_bytes <= least + EACH
    assert report.speed is not None
    assert report.days is not None


def test_what_fits_nowhere_has_no_speed_and_shows_the_smallest_plan() -> None:
    report = report_on(MemoryBudget(CARD, 10, WEIGHTS + EACH - 1))
    assert (report.fits, report.fits_headless) == (False, False)
    assert (report.search_result.plan.micro_batch, report.search_result.plan.recompute) == (1, "block")
    assert (report.speed, report.days, report.kwh) == (None, None, None)


def test_states_move_to_the_computers_memory_only_where_nothing_fits_with_them_on_the_card() -> None:
    least = WEIGHTS + OPTIMIZER + EACH
    on_card, moved = (report_on(MemoryBudget(CARD, limit, limit)) for limit in (least, least - 1))
    assert (on_card.fits, on_card.search_result.plan.offload) == (True, "none")
    plan = moved.search_result.plan
    assert (moved.fits, plan.offload, plan.recompute) == (True, "optimizer", "block")
    assert moved.host_bytes == on_card.host_bytes + OPTIMIZER
    assert moved.state_bytes == on_card.state_bytes
    assert moved.search_result.reason.startswith("the optimizer's states lie in the computer's memory")
    crowded = report_on(MemoryBudget(CARD, least - 1, least - 1, ram_bytes=GIB + HOST + OPTIMIZER + SYSTEM_BYTES - 7))
    assert (crowded.fits, crowded.lacks_host_bytes) == (False, 7)


@pytest.mark.parametrize("card", ["m4", "cpu"])
def test_one_memory_has_no_other_side_to_move_states_to(card: str) -> None:
    least = WEIGHTS + OPTIMIZER + EACH
    report = report_on(MemoryBudget(load_profile(card), least - 1, least - 1))
    assert (report.fits, report.search_result.plan.offload) == (False, "none")


def test_a_step_that_updates_during_backward_is_planned_at_once_or_not_at_all() -> None:
    whole = WEIGHTS + OPTIMIZER + EACH * TRAIN.batch_samples
    report = report_on(MemoryBudget(CARD, whole, whole), update_during_backward=True)
    assert (report.search_result.plan.micro_batch, report.search_result.plan.accumulate) == (TRAIN.batch_samples, 1)
    short = whole - OPTIMIZER - 1
    assert not report_on(MemoryBudget(CARD, short, short), update_during_backward=True).fits


@pytest.mark.parametrize(
    "ram_bytes, lacks", [(None, 0), (16 * GIB, 0), (GIB + HOST, 0), (GIB + HOST - 1, 1), (GIB // 2, HOST + GIB // 2)]
)
def test_a_computer_with_too_little_memory_is_told_how_much_it_lacks(ram_bytes: int | None, lacks: int) -> None:
    report = report_on(ROOMY._replace(ram_bytes=ram_bytes))
    assert report.host_bytes == GIB + HOST
    assert report.lacks_host_bytes == lacks
    assert report.fits == (lacks == 0)
    assert report.search_result.fits, "the card has room"


def test_where_memory_is_shared_nothing_is_counted_twice() -> None:
    report = report_on(MemoryBudget(load_profile("m3-max"), 8 * GIB, 8 * GIB, ram_bytes=36 * GIB))
    assert report.host_bytes == GIB // 2


def test_of_a_card_without_figures_the_plan_is_known_and_the_speed_is_not() -> None:
    report = report_on(MemoryBudget(generic_profile(8 * GIB), 6 * GIB, 7 * GIB))
    assert report.fits
    assert (report.speed, report.days, report.kwh) == (None, None, None)


def test_time_and_electricity_have_the_range_of_the_speed() -> None:
    report = report_on(ROOMY)
    for middle, (low, high) in ((report.days, report.days_range), (report.kwh, report.kwh_range)):
        assert low == pytest.approx(middle * report.speed.tokens_per_second / report.speed.high)
        assert high == pytest.approx(middle * report.speed.tokens_per_second / report.speed.low)
        assert low < middle < high
    unknown = report_on(MemoryBudget(generic_profile(8 * GIB), 6 * GIB, 7 * GIB))
    assert (unknown.days_range, unknown.kwh_range) == (None, None)


def test_receipts_correct_an_estimated_speed_by_their_median() -> None:
    plain, corrected = (
        report_on(ROOMY._replace(receipts=receipts)) for receipts in (None, ReceiptSummary(3, 0.8, 0.25))
    )
    assert plain.speed is not None
    assert corrected.speed is not None
    assert corrected.speed[:3] == pytest.approx([0.8 * value for value in plain.speed[:3]])
    assert corrected.days == pytest.approx((plain.days or 0.0) / 0.8)
    way = {(False, False): 0.5}
    of_launched = report_on(ROOMY._replace(receipts=ReceiptSummary(3, 0.8, 0.25, way))).speed
    assert of_launched is not None
    assert of_launched[:3] == pytest.approx([0.5 * value for value in plain.speed[:3]])
