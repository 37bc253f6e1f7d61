"""What `fit` promises about the run that begins: its plan, its peak, its speed; and whether the first steps keep it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from lowvram.cli.place import find_card_of, find_changes, rehearse_on
from lowvram.config.plan import Ledger, Plan, Recompute
from lowvram.errors import MachineError, MemoryRanOutError
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

# Of a plan's reckoned bytes, which were too many: what asks for less than this is another plan, and not the same again.
_SURELY_LESS = 0.9


class Promise:
    """The fit of one run on the device that it was given."""

    def __init__(self, what: RunConfig, device: torch.device) -> None:
        self._what, self._device = what, device
        self.card = find_card_of(device)
        self.place = self.card.place(what.train.precision)
        self._rehearse = rehearse_on(self.place.profile, what.model, what.train)
        self._rehearsal: Rehearsal | None = None
        self._speed: Speed | None = None
        self._steps = 0
        self._is_compiled = self._is_recorded = False
        self._clock = (0.0, 0)

    def evaluate_fit(self, wish: PlanConstraints = ANY) -> FitReport:
        """Rehearse the run and return what is to be said about it here."""
        what, train = self._what, self._what.train
        sketch = MemoryCurve(train.micro_batches, self._rehearse, train.seq_len)
        return evaluate_fit(what.run.dir.name, what.model, train, sketch, self.place, exact=True, wish=wish)

    def choose(self, micro_batch: int | None = None, recompute: Recompute | None = None) -> tuple[Plan, str]:
        """Return the plan that fits, and why, around what was asked for.

        What was asked for is tried even where it is not expected to fit; else MachineError says how to learn more.
        """
        wish = PlanConstraints(micro_batch, recompute)
        answer = self.evaluate_fit(wish)
        found = answer.found
        if wish != ANY:
            return found.plan, "you asked for it" if found.fits else "you asked for it; it is not expected to fit"
        if answer.lacks_host_bytes and found.fits:
            raise MachineError(
                f"This run needs {show_bytes(answer.lacks_host_bytes)} more of the computer's memory than there is.",
                _explain_host(found.rehearsal.ledger),
                "Ask lowvram fit with the same run file what would make it fit.",
            )
        if not found.fits:
            raise self._explain(answer)
        return found.plan, found.reason

    def _explain(self, answer: FitReport) -> MachineError:
        has, place = show_bytes(self.place.limit_bytes), self.place
        least = (
            self.evaluate_fit(PlanConstraints(self._what.train.micro_batches[0], "block")).found.peak_bytes
            if answer.fits_headless
            else answer.found.peak_bytes
        )
        close = f"Without {place.beside} it would fit: close that, or " if answer.fits_headless else ""
        fix = f"{close}ask lowvram fit with the same run file what would make it fit."
        return MachineError(
            f"This run does not fit on {place.profile.name} now.",
            f"Its smallest plan takes {show_bytes(least)}, and tensors have {has} there.",
            f"{fix[0].upper()}{fix[1:]}  --micro-batch 1 --recompute block tries it all the same.",
        )

    def keep_here(self, plan: Plan) -> Plan:
        """Return a kept plan as it is right on this machine: one memory has no side to move anything to."""
        return plan.model_copy(update={"offload": "none"}) if self.place.profile.unified else plan

    def doubt(self, plan: Plan) -> str | None:
        """Return a sentence where a plan that is kept or asked for is not expected to fit now."""
        peak = self._reckon(plan).ledger.peak_bytes
        if peak <= self.place.limit_bytes:
            return None
        has = show_bytes(self.place.limit_bytes)
        return f"This plan takes {show_bytes(peak)}, and tensors have {has} here now: memory may run out."

    def propose(self, error: MemoryRanOutError, plan: Plan) -> MemoryRanOutError:
        """Return the error of a plan that did not fit after all, with the changes that would take a tenth less."""
        room = min(self.place.limit_bytes, int(_SURELY_LESS * self._reckon(plan).ledger.peak_bytes))
        what = self._what
        found = find_changes(what.model, what.train, self.place._replace(limit_bytes=room))
        if not found:
            return error
        sets = [" ".join(f"--set {assignment}" for assignment in change.sets) for change in found]
        rows = (f"{words} ({change.says}; {change.costs})" for words, change in zip(sets, found, strict=True))
        return MemoryRanOutError(
            error.what, error.why, f"{error.fix}  In a new run.dir would fit: {'; or '.join(rows)}."
        )

    def bind(self, plan: Plan, is_recorded: bool = False) -> None:
        """Hold the run to its plan: cap the card's memory, and reckon what the plan takes where that can be checked.

        Called again where the micro-batch was halved.  is_recorded: passes are played, so what they take is no longer
        seen to come and go.
        """
        self._steps, self._is_compiled, self._is_recorded = 0, plan.compile, is_recorded
        if self._device.type != "cuda":
            return
        profile = self.place.profile
        torch.cuda.reset_peak_memory_stats(self._device)  # what a trial or a resume took is not the step's
        cap_memory(self._device, profile.allocator_bytes(self.place.limit_bytes))
        self._rehearsal = self._reckon(plan)
        self._speed = estimate(self._rehearsal, plan, self._what.train, profile, self.place.measured)

    def _reckon(self, plan: Plan) -> Rehearsal:
        """Rehearse a plan as it is without compilation, which paper does not know."""
        return self._rehearse(plan.model_copy(update={"compile": False}))

    def room_to_compile(self, states_bytes: int) -> int | None:
        """Return what the card may hold before all states exist; None where nobody knows.  states_bytes: that do."""
        if self._rehearsal is None:
            return None
        return self.place.limit_bytes - self._rehearsal.ledger.optimizer + states_bytes

    def look(self, step: StepDone) -> str | None:
        """Return a sentence where a step is not what was promised."""
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
        beside = self.place.profile.workspace_bytes
        if self._is_recorded or (measured_bytes < ledger_bytes and self._is_compiled):
            return None
        if ledger_bytes <= measured_bytes <= ledger_bytes + beside:
            return None
        return compare_with_ledger(max(0, measured_bytes - beside), ledger_bytes)


def _explain_host(ledger: Ledger) -> str:
    saved = show_bytes(ledger.host_bytes - ledger.kept_on_host)
    if not ledger.kept_on_host:
        return f"A save brings {saved} there from the card."
    return f"Experts and states that wait take {show_bytes(ledger.kept_on_host)} there, and a save brings {saved} more."
