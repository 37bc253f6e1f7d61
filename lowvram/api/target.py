"""Where a run is to be carried out: the card that was named or is here, and the memory that tensors may take there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from lowvram_kernels.capabilities import features_of

from lowvram.api.tasks import Notice
from lowvram.fit.calibration_store import load_calibration
from lowvram.fit.receipts import receipts_of, summarize
from lowvram.fit.report import MemoryBudget
from lowvram.hardware.detect import (
    Detected,
    NvidiaCard,
    describe_card,
    describe_processor,
    detect,
    machine_memory_bytes,
)
from lowvram.hardware.profile import Desktop, Profile, find_profile, generic_profile

if TYPE_CHECKING:
    import torch

    from lowvram.config.train import TrainConfig


class Target(NamedTuple):
    """A profile, what is known of its memory now, and a sentence about both.

    ram_bytes: the computer's memory; free_bytes: of the card; None where nobody knows.  beside: what else takes memory
    of the card.
    """

    profile: Profile
    sentence: str
    ram_bytes: int | None
    free_bytes: int | None
    desktop: Desktop
    beside: str = "a desktop"

    def budget(self, precision: str) -> MemoryBudget:
        """Return the limits of memory, and the measurement that was made here in this precision, if any."""
        measured, problem = load_calibration(self.profile.id, precision)
        beside = self.profile.limit_bytes(self.desktop, self.ram_bytes, self.free_bytes)
        alone = self.profile.limit_bytes("none", self.ram_bytes)
        receipts = summarize(receipts_of(self.profile.id, precision))
        return MemoryBudget(
            self.profile, beside, max(beside, alone), self.ram_bytes, measured, self.beside, problem, receipts
        )


def notices_of(budget: MemoryBudget) -> tuple[Notice, ...]:
    """Return a notice where a measurement of this machine lies there and cannot be used."""
    return (Notice(budget.measured_problem, "warning"),) if budget.measured_problem else ()


def describe_target(
    gpu: str | None, memory_bytes: int | None = None, ram_bytes: int | None = None, desktop: Desktop | None = None
) -> Target:
    """Return the target of a card's name, or of its memory alone; the card need not be here.

    memory_bytes: of the card.  ram_bytes: of the computer.  desktop: which one the card draws, None: this system's.
    Raises ConfigError naming the nearest cards where the name is not known.
    """
    if gpu is None:
        assert memory_bytes is not None, "asked for by name or by memory"
        profile, note = (
            generic_profile(memory_bytes),
            ("Without a name its speed is not known, and it is taken for an RTX 30 or later: name an RTX 20."),
        )
    else:
        profile, note = find_profile(gpu, memory_bytes)
        if profile.unified:
            profile, note = find_profile(gpu, memory_bytes or ram_bytes)
            ram_bytes = profile.memory_bytes
    here: Desktop = "windows" if sys.platform == "win32" else "linux"
    drawn = desktop or here
    profile = _as_installed(profile, "windows" in (drawn, here))
    return Target(profile, f"{profile.name}. {note}".strip(), ram_bytes, None, drawn)


def detect_target(ram_bytes: int | None = None) -> Target:
    """Return this machine, as its driver describes it; never imports torch.

    ram_bytes: the computer's memory, None: what it has.
    """
    return _target_of(detect(), ram_bytes)


def detect_target_of(device: torch.device) -> Target:
    """Return what torch calls `device`: where there are several cards, or no driver's library, torch is right."""
    import torch

    found = detect()
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        free_bytes = torch.cuda.mem_get_info(device)[0]
        # Asking makes this process's context, which the profile takes off what is free.
        free_bytes += generic_profile(facts.total_memory).context_bytes
        card = NvidiaCard(facts.name, (facts.major, facts.minor), facts.total_memory, free_bytes)
        found = describe_card(card)
    elif device.type == "cpu" and found.profile.platform != "cpu":
        found = describe_processor()
    return _target_of(found, None)


def _target_of(found: Detected, ram_bytes: int | None) -> Target:
    # What a desktop takes is not free any more.
    profile = _as_installed(found.profile, sys.platform == "win32")
    ram_bytes = ram_bytes or machine_memory_bytes()
    return Target(profile, found.sentence, ram_bytes, found.free_bytes, "none", beside="other programs")


def _as_installed(profile: Profile, is_windows: bool) -> Profile:
    """Return a profile with the attention that torch has there: its wheels for Windows have no FlashAttention."""
    if is_windows and profile.platform == "cuda" and profile.attention == "flash":
        return profile.model_copy(update={"attention": "efficient"})
    return profile


def warn_of_precision(train: TrainConfig, profile: Profile) -> str | None:
    """Return a sentence where a run computes in numbers that the card has no tensor cores for."""
    has_int8 = profile.capability is not None and features_of(profile.capability).has_int8
    if (train.precision == "fp8" and profile.fp8 == "storage") or (train.precision == "int8" and not has_int8):
        says = f"{profile.name} has no tensor cores for {train.precision}, which it must decode first"
        return f'{says}: train.precision = "{profile.dtype}" is faster.'
    if train.precision != "bf16" or profile.dtype != "fp16":
        return None
    known = profile.tflops
    times = round(known["fp16"] / known["bf16"]) if "fp16" in known and "bf16" in known else 8
    return f'{profile.name} has no tensor cores for bf16: train.precision = "fp16" is about {times} times as fast.'
