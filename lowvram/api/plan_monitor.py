"""The plan of the run that begins: chosen, enforced, and compared with the peak and the pace of its first steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from lowvram.api.rehearsals import rehearse_on, suggest_changes
from lowvram.api.target import detect_target_of
from lowvram.config.plan import Ledger, Plan, Recompute
from lowvram.errors import MachineError, MemoryRanOutError, argument
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal
from lowvram.fit.report import FitReport, evaluate_fit
from lowvram.fit.search import ANY, PlanConstraints
from lowvram.fit.throughput import Speed, estimate
from lowvram.train.oom import cap_memory, compare_with_ledger, looks_spilled
from lowvram.units import show_bytes

if TYPE_CHECKING:
    from lowvram.config.run import RunConfig
    from lowvram.train.events import StepDone

# Steps of this start after which the allocator has seen its peak and kernels are compiled; and those whose pace counts.
_PEAK_STEP, _SPEED_STEP = 3, 10

# Of the bytes that were estimated for a plan that did not fit: a change that takes less than this share will fit.
_SURELY_LESS = 0.9


class PlanMonitor:
    """The memory and the speed that are expected of one run on one device.

    target: the device's card.  budget: the memory that tensors may take there.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self.target = detect_target_of(device)
        self.budget = self.target.budget(config.train.precision)
        self._rehearse = rehearse_on(self.budget.profile, config.model, config.train)
        self._rehearsal: Rehearsal | None = None
        self._speed: Speed | None = None
        self._published: Speed | None = None
        self._steps = 0
        self._is_compiled = self._is_recorded = False
        self._clock = (0.0, 0)

    def rehearse_fit(self, constraints: PlanConstraints = ANY) -> FitReport:
        """Rehearse the run and return whether and how it fits here."""
        config, train = self._config, self._config.train
        curve = MemoryCurve(train.micro_batches, self._rehearse, train.seq_len)
        name = config.run.dir.name
        return evaluate_fit(name, config.model, train, curve, self.budget, exact=True, constraints=constraints)

    def choose(self, micro_batch: int | None = None, recompute: Recompute | None = None) -> tuple[Plan, str]:
        """Return the plan that fits, and why, around what was asked for.

        What was asked for is tried even where it is not expected to fit; else MachineError says how to learn more.
        """
        constraints = PlanConstraints(micro_batch, recompute)
        report = self.rehearse_fit(constraints)
        found = report.search_result
        if constraints != ANY:
            return found.plan, "you asked for it" if found.fits else "you asked for it; it is not expected to fit"
        if report.lacks_host_bytes and found.fits:
            raise MachineError(
                f"This run needs {show_bytes(report.lacks_host_bytes)} more of the computer's memory than there is.",
                _explain_host(found.rehearsal.ledger),
                "Ask lowvram fit with the same run file what would make it fit.",
            )
        if not found.fits:
            raise self._explain(report)
        return found.plan, found.reason

    def _explain(self, report: FitReport) -> MachineError:
        has, budget = show_bytes(self.budget.limit_bytes), self.budget
        least = (
            self.rehearse_fit(PlanConstraints(self._config.train.micro_batches[0], "block")).search_result.peak_bytes
            if report.fits_headless
            else report.search_result.peak_bytes
        )
        close = f"Without {budget.beside} it would fit: close that, or " if report.fits_headless else ""
        fix = f"{close}ask lowvram fit with the same run file what would make it fit."
        return MachineError(
            f"This run does not fit on {budget.profile.name} now.",
            f"Its smallest plan takes {show_bytes(least)}, and tensors have {has} there.",
            f'{fix[0].upper()}{fix[1:]} `micro_batch=1` with `recompute="block"` tries it all the same.',
        )

    def checkpoint_bytes(self, plan: Plan) -> int:
        """Return the bytes that a checkpoint of the run will have."""
        return self._rehearse_eager(plan).ledger.checkpoint_bytes

    def adapt(self, plan: Plan) -> Plan:
        """Return a plan of an earlier start as it can be used here: unified memory has nowhere to offload to."""
        return plan.model_copy(update={"offload": "none"}) if self.budget.profile.unified else plan

    def warn_if_tight(self, plan: Plan) -> str | None:
        """Return a sentence where a plan of an earlier start is not expected to fit now."""
        peak = self._rehearse_eager(plan).ledger.peak_bytes
        if peak <= self.budget.limit_bytes:
            return None
        has = show_bytes(self.budget.limit_bytes)
        return f"This plan takes {show_bytes(peak)}, and tensors have {has} here now: memory may run out."

    def add_suggestions(self, error: MemoryRanOutError, plan: Plan) -> MemoryRanOutError:
        """Return the error of a plan that did not fit after all, with the changes that would take a tenth less."""
        room = min(self.budget.limit_bytes, int(_SURELY_LESS * self._rehearse_eager(plan).ledger.peak_bytes))
        config = self._config
        found = suggest_changes(config.model, config.train, self.budget._replace(limit_bytes=room))
        if not found:
            return error
        sets = [argument("overrides", list(change.sets)) for change in found]
        rows = (f"{words} ({change.says}; {change.costs})" for words, change in zip(sets, found, strict=True))
        return MemoryRanOutError(
            error.what, error.why, f"{error.fix} In a new run.dir would fit: {'; or '.join(rows)}."
        )

    def enforce(self, plan: Plan, is_recorded: bool = False) -> None:
        """Cap the card's memory, and estimate what the plan takes, so that `check_step` can compare.

        Called again where the micro-batch was halved.  is_recorded: passes are replayed from CUDA graphs, whose
        allocations the allocator does not count.
        """
        self._steps, self._is_compiled, self._is_recorded = 0, plan.compile, is_recorded
        if self._device.type != "cuda":
            return
        profile = self.budget.profile
        torch.cuda.reset_peak_memory_stats(self._device)  # what a trial or a resume took is not the step's
        cap_memory(self._device, profile.allocator_bytes(self.budget.limit_bytes))
        self._rehearsal = self._rehearse_eager(plan)
        room = self.budget.limit_bytes if is_recorded else 0
        self._speed = estimate(self._rehearsal, plan, self._config.train, profile, self.budget.measured, room)
        self._published = estimate(self._rehearsal, plan, self._config.train, profile, None, room)

    @property
    def prediction(self) -> tuple[int, float | None]:
        """The peak bytes of the plan that is enforced, and its tokens per second by published figures alone."""
        assert self._rehearsal is not None, "only a card's plan is rehearsed again"
        speed = self._published.tokens_per_second if self._published is not None else None
        return self._rehearsal.ledger.peak_bytes, speed

    def _rehearse_eager(self, plan: Plan) -> Rehearsal:
        """Rehearse a plan without compilation, which cannot be rehearsed."""
        return self._rehearse(plan.model_copy(update={"compile": False}))

    def room_to_compile(self, states_bytes: int) -> int | None:
        """Return the bytes that a trial may take before all optimizer states exist; None where that is not known.

        states_bytes: the size of the optimizer states that already exist.
        """
        if self._rehearsal is None:
            return None
        return self.budget.limit_bytes - self._rehearsal.ledger.optimizer + states_bytes

    def check_step(self, step: StepDone) -> str | None:
        """Return a sentence where a step takes other memory or more time than was expected."""
        self._steps += 1
        if self._rehearsal is None:
            return None
        if self._steps == _PEAK_STEP:
            self._clock = (time.monotonic(), step.tokens)
            return self._compare(step.memory_bytes, self._rehearsal.ledger.peak_bytes)
        if self._steps == _SPEED_STEP and self._speed is not None:
            began, tokens = self._clock
            pace = (step.tokens - tokens) / max(1e-9, time.monotonic() - began)
            return looks_spilled(pace, self._speed.tokens_per_second)
        return None

    def _compare(self, measured_bytes: int, ledger_bytes: int) -> str | None:
        """Compare a peak with the ledger, which knows nothing of torch's workspace nor of what compiling saves."""
        beside = self.budget.profile.workspace_bytes
        if self._is_recorded or (measured_bytes < ledger_bytes and self._is_compiled):
            return None
        if ledger_bytes <= measured_bytes <= ledger_bytes + beside:
            return None
        return compare_with_ledger(max(0, measured_bytes - beside), ledger_bytes)


def _explain_host(ledger: Ledger) -> str:
    saved = show_bytes(ledger.host_bytes - ledger.kept_on_host)
    if not ledger.kept_on_host:
        return f"A save brings {saved} there from the card."
    kept = show_bytes(ledger.kept_on_host)
    return f"Frozen experts and offloaded states take {kept} there, and a save brings {saved} more."
