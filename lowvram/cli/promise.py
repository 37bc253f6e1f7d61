"""What `fit` promises about the run that begins: its plan, its peak, its speed; and whether the first steps keep it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from lowvram.cli.place import find_card_of, judge_here
from lowvram.errors import MachineError
from lowvram.fit.rehearse import imagine, rehearse
from lowvram.fit.sketch import Rehearsal
from lowvram.fit.speed import Speed, estimate
from lowvram.plan import Plan
from lowvram.train.guard import cap_memory, compare_with_ledger, looks_spilled
from lowvram.units import show_bytes

if TYPE_CHECKING:
    from lowvram.config import RunConfig
    from lowvram.fit.answer import Answer
    from lowvram.train.events import StepDone

# Steps of this start after which the allocator has seen its peak and kernels are compiled; and those whose pace counts.
_PEAK_STEP, _SPEED_STEP = 3, 10


class Promise:
    """The fit of one run on the device that it was given."""

    def __init__(self, what: RunConfig, device: torch.device) -> None:
        self._what, self._device = what, device
        self.card = find_card_of(device)
        self.place = self.card.place(what.train.precision)
        self._rehearsal: Rehearsal | None = None
        self._speed: Speed | None = None
        self._steps = 0
        self._is_compiled = False
        self._clock = (0.0, 0)

    def judge(self) -> Answer:
        """Rehearse the run and return what is to be said about it here."""
        what = self._what
        return judge_here(what.run.dir.name, what.model, what.train, self.place)

    def choose(self) -> tuple[Plan, str]:
        """Return the plan that fits and why; raises MachineError where none does, with the way to learn more."""
        answer = self.judge()
        found = answer.found
        if answer.lacks_host_bytes and found.fits:
            raise MachineError(
                f"This run needs {show_bytes(answer.lacks_host_bytes)} more of the computer's memory than there is.",
                f"A save brings {show_bytes(found.rehearsal.ledger.host_bytes)} there from the card.",
                "Choose a smaller model, or optimizer.bits = 8.",
            )
        if not found.fits:
            needs, has = show_bytes(found.peak_bytes), show_bytes(self.place.limit_bytes)
            raise MachineError(
                f"This run does not fit on {self.place.profile.name}.",
                f"Its smallest plan takes {needs}, and tensors have {has} there now.",
                fix="lowvram fit with the same run file says what would make it fit; --micro-batch 1 --recompute block "
                "tries it all the same.",
            )
        return found.plan, found.reason

    def bind(self, plan: Plan) -> None:
        """Hold the run to its plan: cap the card's memory, and reckon what the plan takes where that can be checked.

        Called again where the micro-batch was halved.
        """
        self._steps, self._is_compiled = 0, plan.compile
        if self._device.type != "cuda":
            return
        what, profile = self._what, self.place.profile
        torch.cuda.reset_peak_memory_stats(self._device)  # what a trial or a resume took is not the step's
        cap_memory(self._device, profile.allocator_bytes(self.place.limit_bytes))
        self._rehearsal = rehearse(what.model, what.train, plan, imagine(profile))
        self._speed = estimate(self._rehearsal, plan, what.train, profile, self.place.measured)

    def room_to_compile(self) -> int | None:
        """Return what the card may hold before the optimizer's states exist; None where nobody knows."""
        if self._rehearsal is None:
            return None
        return self.place.limit_bytes - self._rehearsal.ledger.optimizer

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
        if measured_bytes < ledger_bytes and self._is_compiled:
            return None
        if ledger_bytes <= measured_bytes <= ledger_bytes + beside:
            return None
        return compare_with_ledger(max(0, measured_bytes - beside), ledger_bytes)
