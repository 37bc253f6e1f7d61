"""Evaluates one model on one card: whether it fits, with which plan, how fast, at what cost; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Ledger, Plan
from lowvram.config.run import RunOptions
from lowvram.config.train import TrainConfig
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal
from lowvram.fit.receipts import ReceiptSummary
from lowvram.fit.search import ANY, PlanConstraints, SearchResult, search, spend_the_rest
from lowvram.fit.throughput import Calibration, Speed, days, estimate, is_replayed, kwh, step_seconds
from lowvram.hardware.profile import Profile

# Host memory that an operating system and a browser take.
SYSTEM_BYTES = 2 * 2**30
_TOKEN_BYTES = 2  # a vocabulary below 65,536 is packed as uint16


class MemoryBudget(NamedTuple):
    """A card, and the bytes that tensors may take on it.

    limit_bytes: beside a desktop or other programs.  headless_bytes: with nothing else on the card.  ram_bytes: host
    memory, None if it is not known.  measured: this machine's measurement.  beside: what else takes the card's memory.
    measured_problem: why a measurement that exists on this machine is not used; "" where there is nothing to say.
    receipts: those of other runs on such a card, by whose median an estimated speed is corrected.
    """

    profile: Profile
    limit_bytes: int
    headless_bytes: int
    ram_bytes: int | None = None
    measured: Calibration | None = None
    beside: str = "a desktop"
    measured_problem: str = ""
    receipts: ReceiptSummary | None = None


class FitReport(NamedTuple):
    """The evaluation of one model on one card.

    search_result: the plan that was searched.  host_bytes: what the process takes in host memory.  state_bytes: the
    size of one checkpoint.  written_bytes_per_day: what saving writes.  disk_bytes: what must be free on the disk, for
    the kept checkpoints and the tokens.  fits_headless: whether it fits with nothing else on the card.
    lacks_host_bytes: how much host memory is missing, 0 if it is not known.  saves_beside_training: whether a copy of
    the state fits into host memory, so that training goes on while it is written; None if that is not known.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    search_result: SearchResult
    speed: Speed | None
    days: float | None
    kwh: float | None
    host_bytes: int
    state_bytes: int
    written_bytes_per_day: int
    disk_bytes: int
    fits_headless: bool
    lacks_host_bytes: int
    saves_beside_training: bool | None

    @property
    def fits(self) -> bool:
        """Say whether it fits into both the card's memory and the host's."""
        return self.search_result.fits and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Say whether it fits into host memory, as far as that is known."""
        return not self.lacks_host_bytes

    @property
    def is_dense(self) -> bool:
        """Say whether every token passes through all weights."""
        return self.model.ffn.kind != "moe"

    @property
    def days_range(self) -> tuple[float, float] | None:
        """The fewest and the most days that are expected, None where the speed is not known."""
        if self.days is None or self.speed is None:
            return None
        pace = self.speed.tokens_per_second
        return self.days * pace / self.speed.high, self.days * pace / self.speed.low

    @property
    def kwh_range(self) -> tuple[float, float] | None:
        """The least and the most electricity that is expected, None where speed or power is not known."""
        if self.kwh is None or self.speed is None:
            return None
        pace = self.speed.tokens_per_second
        return self.kwh * pace / self.speed.high, self.kwh * pace / self.speed.low

    def with_tokens(self, tokens: int) -> FitReport:
        """Return the evaluation of the same run on another number of tokens, which changes no step of it."""
        share = tokens / self.train.tokens
        return self._replace(
            train=self.train.model_copy(update={"tokens": tokens}),
            days=None if self.days is None else self.days * share,
            kwh=None if self.kwh is None else self.kwh * share,
            disk_bytes=self.disk_bytes + (tokens - self.train.tokens) * _TOKEN_BYTES,
        )


def evaluate_fit(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    curve: MemoryCurve,
    budget: MemoryBudget,
    exact: bool = False,
    options: RunOptions | None = None,
    constraints: PlanConstraints = ANY,
) -> FitReport:
    """Search a model's plan on a card and return what it takes.

    exact, constraints: as for `search`.  options: how often the run saves.
    """

    def seconds(rehearsal: Rehearsal, plan: Plan) -> float:
        return step_seconds(rehearsal, plan, train, budget.profile, budget.measured, budget.limit_bytes)

    def has_room(ledger: Ledger) -> bool:
        return not lacking_bytes(ledger, budget)

    may_offload = None if budget.profile.unified else has_room
    result = search(curve, budget.limit_bytes, seconds, exact, constraints, may_offload)
    if exact and result.fits and budget.profile.platform == "cuda":
        result = spend_the_rest(result, curve, budget.limit_bytes, seconds)
    fits_headless = result.fits
    if not result.fits and result.peak_bytes <= budget.headless_bytes:
        result = search(curve, budget.headless_bytes, seconds, exact, constraints, may_offload)._replace(fits=False)
        fits_headless = True
    ledger = result.rehearsal.ledger
    state = ledger.checkpoint_bytes
    options = options or RunOptions(dir=Path("run"))
    how = (train, budget.profile, budget.measured, budget.limit_bytes)
    speed = estimate(result.rehearsal, result.plan, *how) if fits_headless else None
    if speed is not None and budget.receipts is not None:
        recorded = is_replayed(result.rehearsal, budget.limit_bytes)
        speed = speed.times(budget.receipts.ratio_of(result.plan.compile, recorded))
    run_days = days(train.tokens, speed) if speed else None
    return FitReport(
        name,
        model,
        train,
        result,
        speed,
        days=run_days,
        kwh=kwh(run_days, budget.profile) if run_days is not None else None,
        host_bytes=host_bytes_of(ledger, budget.profile),
        state_bytes=state,
        written_bytes_per_day=round(state * 86_400 / options.save_interval_s(state)),
        disk_bytes=options.disk_bytes(state, train.steps) + train.tokens * _TOKEN_BYTES,
        saves_beside_training=has_room_for_copy(ledger, budget),
        fits_headless=fits_headless,
        lacks_host_bytes=lacking_bytes(ledger, budget),
    )


def host_bytes_of(ledger: Ledger, profile: Profile) -> int:
    """Return what a run takes in host memory: the process, and what is moved there from the card."""
    return profile.host_process_bytes + (0 if profile.unified else ledger.host_bytes)


def lacking_bytes(ledger: Ledger, budget: MemoryBudget) -> int:
    """Return how much host memory is missing; 0 if it is not known how much there is.

    If a run keeps tensors in host memory all the time, SYSTEM_BYTES must be left for the operating system.
    """
    if budget.ram_bytes is None:
        return 0
    share = SYSTEM_BYTES if ledger.kept_on_host and not budget.profile.unified else 0
    return max(0, host_bytes_of(ledger, budget.profile) + share - budget.ram_bytes)


def has_room_for_copy(ledger: Ledger, budget: MemoryBudget) -> bool | None:
    """Say whether host memory has room for a copy of a checkpoint beside all else; None if it is not known."""
    if budget.ram_bytes is None:
        return None
    profile = budget.profile
    taken = ledger.peak_bytes if profile.unified else ledger.kept_on_host
    return profile.host_process_bytes + taken + ledger.checkpoint_bytes + SYSTEM_BYTES <= budget.ram_bytes
