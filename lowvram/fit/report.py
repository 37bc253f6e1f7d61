"""What a person learns about one model on one card: does it fit, how, how fast, at what cost; never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Ledger, Plan
from lowvram.config.run import RunOptions
from lowvram.config.train import TrainConfig
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal
from lowvram.fit.search import ANY, PlanConstraints, SearchResult, search
from lowvram.fit.throughput import Calibration, Speed, days, estimate, kwh, step_seconds
from lowvram.hardware.profile import Profile

# What an operating system and a browser hold in the computer's memory.
SYSTEM_BYTES = 2 * 2**30
_TOKEN_BYTES = 2  # a vocabulary below 65,536 is packed as uint16


class MemoryBudget(NamedTuple):
    """A card, and what tensors may take on it: beside a desktop, and with the card to themselves.

    ram_bytes: the computer's memory, None where nobody said.  beside: what else takes memory of the card.
    """

    profile: Profile
    limit_bytes: int
    headless_bytes: int
    ram_bytes: int | None = None
    measured: Calibration | None = None
    beside: str = "a desktop"


class FitReport(NamedTuple):
    """Everything that is said about one model on one card.

    host_bytes: this process in the computer's memory.  state_bytes: one checkpoint.  written_bytes_per_day and
    disk_bytes: what saving writes, and what must be free for the checkpoints kept and the tokens.  fits_headless: on
    the card with nothing beside.  lacks_host_bytes: memory that the computer has too little, 0 where nobody knows.
    """

    name: str
    model: ModelConfig
    train: TrainConfig
    found: SearchResult
    speed: Speed | None
    days: float | None
    kwh: float | None
    host_bytes: int
    state_bytes: int
    written_bytes_per_day: int
    disk_bytes: int
    fits_headless: bool
    lacks_host_bytes: int

    @property
    def fits(self) -> bool:
        """Say whether card and computer both have room."""
        return self.found.fits and self.fits_host

    @property
    def fits_host(self) -> bool:
        """Say whether the computer has room, as far as is known."""
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


def evaluate_fit(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    sketch: MemoryCurve,
    place: MemoryBudget,
    exact: bool = False,
    options: RunOptions | None = None,
    wish: PlanConstraints = ANY,
) -> FitReport:
    """Search a model's plan on a card and say what it costs.

    exact, wish: see `search`.  options: how often it saves.
    """

    def seconds(rehearsal: Rehearsal, plan: Plan) -> float:
        return step_seconds(rehearsal, plan, train, place.profile, place.measured)

    def has_room(ledger: Ledger) -> bool:
        return not lacking_bytes(ledger, place)

    may_move = None if place.profile.unified else has_room
    found = search(sketch, place.limit_bytes, seconds, exact, wish, may_move)
    fits_headless = found.fits
    if not found.fits and found.peak_bytes <= place.headless_bytes:
        found = search(sketch, place.headless_bytes, seconds, exact, wish, may_move)._replace(fits=False)
        fits_headless = True
    ledger = found.rehearsal.ledger
    state = ledger.checkpoint_bytes
    options = options or RunOptions(dir=Path("run"))
    speed = estimate(found.rehearsal, found.plan, train, place.profile, place.measured) if fits_headless else None
    waiting = days(train.tokens, speed) if speed else None
    return FitReport(
        name,
        model,
        train,
        found,
        speed,
        days=waiting,
        kwh=kwh(waiting, place.profile) if waiting is not None else None,
        host_bytes=host_bytes_of(ledger, place.profile),
        state_bytes=state,
        written_bytes_per_day=round(state * 86_400 / options.save_interval_s(state)),
        # One more than are kept: the new one is whole before the oldest goes.
        disk_bytes=state * (options.keep + 1) + train.tokens * _TOKEN_BYTES,
        fits_headless=fits_headless,
        lacks_host_bytes=lacking_bytes(ledger, place),
    )


def host_bytes_of(ledger: Ledger, profile: Profile) -> int:
    """Return what a run takes in the computer's memory: the process, and what leaves the card."""
    return profile.host_process_bytes + (0 if profile.unified else ledger.host_bytes)


def lacking_bytes(ledger: Ledger, place: MemoryBudget) -> int:
    """Return what the computer's memory has too little; 0 where nobody knows how much there is.

    Where something lies there for weeks, the system must have its share beside it.
    """
    if place.ram_bytes is None:
        return 0
    share = SYSTEM_BYTES if ledger.kept_on_host and not place.profile.unified else 0
    return max(0, host_bytes_of(ledger, place.profile) + share - place.ram_bytes)
