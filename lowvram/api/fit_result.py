"""What `fit` found: a frozen value, and the same as plain values for JSON; rehearses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.errors import DataError
from lowvram.fit.epochs import Remark, RunText, suitable_preset
from lowvram.fit.evidence import describe_evidence
from lowvram.fit.recommend import PATIENCE_DAYS, Advice
from lowvram.fit.report import FitReport, MemoryBudget
from lowvram.fit.suggestions import Change
from lowvram.fit.tariff import HoursPlan
from lowvram.hardware.profile import Desktop, measured_ids

if TYPE_CHECKING:
    from lowvram.api.target import Target
    from lowvram.api.tasks import Notice
    from lowvram.config.plan import Recompute
    from lowvram.config.tariff import Tariff


@dataclass(frozen=True)
class FitOptions:
    """What is asked of `fit`.

    run_file: judge this run, None: presets.  gpu, memory_bytes: a card elsewhere; both None: this machine.  ram_bytes:
    of the computer.  desktop: which one the card draws.  preset: judge this one alone.  overrides: as `--set` takes
    them.  micro_batch, recompute: only such plans.  days: the longest run to recommend.  measure: time real steps here
    first.  data: packed text, or the folder of train, valid and tok.  tariff: a file of electricity prices, for the
    cost of one model by the hours in which it trains.
    """

    run_file: Path | None = None
    gpu: str | None = None
    memory_bytes: int | None = None
    ram_bytes: int | None = None
    desktop: Desktop | None = None
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    micro_batch: int | None = None
    recompute: Recompute | None = None
    days: float = PATIENCE_DAYS
    measure: bool = False
    data: Path | None = None
    tariff: Path | None = None

    @property
    def is_here(self) -> bool:
        """Say whether this machine is meant."""
        return self.gpu is None and self.memory_bytes is None

    @property
    def is_alone(self) -> bool:
        """Say whether one model is meant, and not all presets."""
        return self.run_file is not None or self.preset is not None

    @property
    def has_plan(self) -> bool:
        """Say whether a plan, or a part of one, was asked for."""
        return self.micro_batch is not None or self.recompute is not None


@dataclass(frozen=True)
class FitResult:
    """Which models a card can pretrain and how, or what one run needs.

    target, budget: the card, and the memory that tensors may take on it.  models: a report for each model, the
    smallest first.  first_run, recommended: what to begin with, and the long run; None where nothing fits.  text: what
    there is to read, None where nobody said.

    Of a single model also changes: what would make it fit, None where a plan was asked for; faster: precisions in which
    it would be faster; remarks: about its text; instead: what this machine can train in time, where this model takes
    years; tariff, hours: the prices that were named, and a plan for each of them, none where its time is not known.
    """

    options: FitOptions
    target: Target
    budget: MemoryBudget
    models: tuple[FitReport, ...]
    first_run: Advice | None
    recommended: Advice | None
    text: RunText | None = None
    changes: tuple[Change, ...] | None = None
    faster: tuple[Change, ...] = ()
    remarks: tuple[Remark, ...] = ()
    instead: Advice | None = None
    tariff: Tariff | None = None
    hours: tuple[HoursPlan, ...] = ()
    notices: tuple[Notice, ...] = ()

    def __iter__(self) -> Iterator[FitReport]:
        """Iterate over the reports, one for each model."""
        return iter(self.models)

    def as_dict(self) -> dict[str, Any]:
        """Return the values that `lowvram fit --json` prints."""
        first, long, profile = self.first_run, self.recommended, self.budget.profile
        is_measured = any(report.speed and report.speed.is_measured for report in self.models)
        evidence = describe_evidence(profile, measured_ids(), is_measured, self.budget.receipts)
        return {
            "gpu": profile.id,
            "gpu_name": profile.name,
            "limit_bytes": self.budget.limit_bytes,
            "limit_bytes_without_desktop": self.budget.headless_bytes,
            "recommended": long.report.name if long else None,
            "first_run": first.report.name if first else None,
            "first_run_tokens": (first.tokens or first.report.train.tokens) if first else None,
            "evidence": evidence if any(report.speed for report in self.models) else None,
            "text": _text_values(self.text),
            "models": [_values(report, self.text) for report in self.models],
            "changes": [change._asdict() for change in self.changes or ()],
            "faster": [change._asdict() for change in self.faster],
            "hours": [plan._asdict() | {"finishes": plan.finishes.isoformat()} for plan in self.hours],
        }


def _text_values(text: RunText | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {
        "tokens": text.tokens,
        "text_bytes": sum(part.text_bytes for part in text.parts),
        "is_held_out": text.is_held_out,
        "suits_parameters": text.suits(),
        "suits_preset": suitable_preset(text),
    }


def _passes(report: FitReport, text: RunText | None) -> float | None:
    """Return how often the part that is read most often is read; None where that is not known, or it is too short."""
    try:
        return round(max(text.passes(report.train)), 3) if text is not None else None
    except DataError:
        return None


def _values(report: FitReport, text: RunText | None) -> dict[str, Any]:
    found, speed = report.search_result, report.speed
    return {
        "name": report.name,
        "parameters": report.model.num_parameters(),
        "active_parameters": report.model.active_parameters(),
        "fits": report.fits,
        "fits_without_desktop": report.fits_headless and not report.lacks_host_bytes,
        "plan": found.plan.model_dump(),
        "reason": found.reason,
        "peak_bytes": found.peak_bytes,
        "host_bytes": report.host_bytes,
        "kept_on_host_bytes": found.rehearsal.ledger.kept_on_host,
        "lacks_host_bytes": report.lacks_host_bytes,
        "ledger": found.rehearsal.ledger.lines() | {"moment": found.rehearsal.ledger.moment},
        "tokens_per_second": round(speed.tokens_per_second, 1) if speed else None,
        "tokens_per_second_range": [round(speed.low, 1), round(speed.high, 1)] if speed else None,
        "is_measured": speed.is_measured if speed else None,
        "days": round(report.days, 5) if report.days is not None else None,
        "days_range": [round(days, 5) for days in report.days_range] if report.days_range is not None else None,
        "kwh": round(report.kwh, 2) if report.kwh is not None else None,
        "kwh_range": [round(kwh, 3) for kwh in report.kwh_range] if report.kwh_range is not None else None,
        "passes": _passes(report, text),
        "checkpoint_bytes": report.state_bytes,
        "saves_beside_training": report.saves_beside_training,
        "written_bytes_per_day": report.written_bytes_per_day,
        "disk_bytes": report.disk_bytes,
    }
