"""A run rehearsed on a target: whether it fits, what would make it fit, and which precision would be faster."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from lowvram.api.target import Target, notices_of
from lowvram.api.tasks import Notice
from lowvram.config.plan import Plan
from lowvram.config.train import LOW_PRECISIONS
from lowvram.fit.calibration_store import compare_precisions
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal
from lowvram.fit.report import FitReport, MemoryBudget, evaluate_fit, lacking_bytes
from lowvram.fit.search import ANY, PlanConstraints
from lowvram.fit.suggestions import Change, Weighed, propose, propose_faster, propose_fp32
from lowvram.fit.throughput import estimate
from lowvram.hardware.profile import Profile, measured_ids

if TYPE_CHECKING:
    from lowvram.config.model import ModelConfig
    from lowvram.config.run import RunOptions
    from lowvram.config.train import TrainConfig


def rehearse_on(profile: Profile, model: ModelConfig, train: TrainConfig) -> Callable[[Plan], Rehearsal]:
    """Return what rehearses a run's plans on a card, a second or so each, and the same plan once."""

    @functools.cache
    def make(plan: Plan) -> Rehearsal:
        from lowvram.fit.rehearse import imagine, rehearse

        return rehearse(model, train, plan, imagine(profile))

    return make


def memory_curve_of_run(model: ModelConfig, train: TrainConfig, profile: Profile) -> MemoryCurve:
    """Return the memory curve of a run, whose rehearsals are made when they are asked for."""
    return MemoryCurve(train.micro_batches, rehearse_on(profile, model, train), train.seq_len)


def rehearse_fit(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    budget: MemoryBudget,
    options: RunOptions | None = None,
    constraints: PlanConstraints = ANY,
) -> FitReport:
    """Rehearse a run on a card and return whether and how it fits.

    options, constraints: see `fit.report.evaluate_fit`.
    """
    return evaluate_fit(
        name, model, train, memory_curve_of_run(model, train, budget.profile), budget, True, options, constraints
    )


def suggest_precisions(
    report: FitReport, target: Target, untimed: Sequence[str] = ()
) -> Generator[Notice, None, list[Change]]:
    """Return the precisions of 8 bits, and on a processor fp32, in which a run's plan would be faster on a card.

    An 8-bit precision is proposed only where it was timed: on this machine, by a receipt of such a card, or by our own
    report of it.  Only NVIDIA cards have kernels for products in 8 bits.  For fp32 only a measurement of both counts.
    untimed: what `untimed_precisions` returned.
    """
    profile, plan, train = target.profile, report.search_result.plan, report.train
    others = (*LOW_PRECISIONS, *(["fp32"] if profile.platform == "cpu" else []))
    budgets = {name: target.budget(name) for name in (train.precision, *others)}
    for budget in budgets.values():
        yield from notices_of(budget)

    def weigh(model: ModelConfig, other: TrainConfig) -> Weighed:
        is_measured = budgets[other.precision].measured is not None and budgets[train.precision].measured is not None
        if other.precision in untimed or (not is_measured and profile.platform != "cuda"):
            return Weighed(0, None, fits_host=False)  # no speed to compare, so a rehearsal would only take time
        rehearsal = rehearse_on(profile, model, other)(plan)
        measured = budgets[other.precision].measured if is_measured else None
        speed = estimate(rehearsal, plan, other, profile, measured, limit_bytes)
        fits_host = not lacking_bytes(rehearsal.ledger, budgets[train.precision])
        return Weighed(rehearsal.ledger.peak_bytes, speed.tokens_per_second if speed else None, fits_host)

    limit_bytes = budgets[train.precision].headless_bytes
    in_fp32 = propose_fp32(report.model, train, limit_bytes, weigh, compare_precisions(profile))
    return [*in_fp32, *propose_faster(report.model, train, limit_bytes, weigh)]


def untimed_precisions(report: FitReport, target: Target) -> tuple[str, ...]:
    """Return the 8-bit precisions that an NVIDIA card's run could take and that nobody has timed on such a card."""
    profile = target.profile
    if profile.platform != "cuda" or report.train.precision not in ("bf16", "fp16") or profile.id in measured_ids():
        return ()

    def is_timed(precision: str) -> bool:
        budget = target.budget(precision)
        return budget.measured is not None or budget.receipts is not None

    return tuple(precision for precision in LOW_PRECISIONS if not is_timed(precision))


def suggest_changes(model: ModelConfig, train: TrainConfig, budget: MemoryBudget) -> list[Change]:
    """Return what would make a run fit on a card that it does not fit on, each rehearsed."""
    profile = budget.profile

    @functools.cache
    def weigh(model: ModelConfig, train: TrainConfig) -> Weighed:
        curve = memory_curve_of_run(model, train, profile)
        rehearsal = curve.at("block", curve.sizes[0])
        if rehearsal.ledger.peak_bytes > budget.limit_bytes and not profile.unified:
            # As the search does where nothing fits: the states lie in the computer's memory.
            curve = curve.offloaded()
            rehearsal = curve.at("block", curve.sizes[0])
        plan = curve.plan("block", curve.sizes[0])
        speed = estimate(rehearsal, plan, train, profile, budget.measured, budget.limit_bytes)
        fits_host = not lacking_bytes(rehearsal.ledger, budget)
        return Weighed(rehearsal.ledger.peak_bytes, speed.tokens_per_second if speed else None, fits_host)

    return list(propose(model, train, budget.limit_bytes, weigh, can_move=not profile.unified))
