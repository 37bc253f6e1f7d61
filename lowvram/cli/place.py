"""Where a run is to be carried out: the card that was named or is here, its limits, and the plan that fits there."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from lowvram_kernels.capabilities import features_of

from lowvram.cli.console import notice
from lowvram.config.plan import Plan
from lowvram.fit.calibration_store import compare_precisions, load_calibration
from lowvram.fit.memory_curve import MemoryCurve, Rehearsal
from lowvram.fit.report import FitReport, MemoryBudget, evaluate_fit, lacking_bytes
from lowvram.fit.search import ANY, PlanConstraints
from lowvram.fit.suggestions import Change, Weighed, propose, propose_faster, propose_fp32
from lowvram.fit.throughput import estimate
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

    from lowvram.config.model import ModelConfig
    from lowvram.config.run import RunOptions
    from lowvram.config.train import TrainConfig


class Card(NamedTuple):
    """A profile, what is known of its memory now, and a sentence about both.  ram_bytes, free_bytes: None: unknown."""

    profile: Profile
    sentence: str
    ram_bytes: int | None
    free_bytes: int | None
    desktop: Desktop
    beside: str = "a desktop"

    def place(self, precision: str) -> MemoryBudget:
        """Return the limits, and the measurement that was made here in this precision, if any."""
        measured, problem = load_calibration(self.profile.id, precision)
        if problem:
            notice(problem, "yellow")
        beside = self.profile.limit_bytes(self.desktop, self.ram_bytes, self.free_bytes)
        alone = self.profile.limit_bytes("none", self.ram_bytes)
        return MemoryBudget(self.profile, beside, max(beside, alone), self.ram_bytes, measured, self.beside)


def name_card(gpu: str | None, memory_bytes: int | None, ram_bytes: int | None, desktop: Desktop | None) -> Card:
    """Return the card that was named, or known by its memory; raises ConfigError that names the nearest ones."""
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
    return Card(profile, f"{profile.name}. {note}".strip(), ram_bytes, None, drawn)


def find_card(ram_bytes: int | None = None) -> Card:
    """Return what is here, as its driver says; never imports torch."""
    return _card_of(detect(), ram_bytes)


def find_card_of(device: torch.device) -> Card:
    """Return the card that torch calls `device`: where there are several, or no driver's library, torch is right."""
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
    return _card_of(found, None)


def _card_of(found: Detected, ram_bytes: int | None) -> Card:
    # What a desktop takes is not free any more.
    profile = _as_installed(found.profile, sys.platform == "win32")
    ram_bytes = ram_bytes or machine_memory_bytes()
    return Card(profile, found.sentence, ram_bytes, found.free_bytes, "none", beside="other programs")


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


def rehearse_on(profile: Profile, model: ModelConfig, train: TrainConfig) -> Callable[[Plan], Rehearsal]:
    """Return what rehearses a run's plans on a card, a second or so each, and the same plan once."""

    @functools.cache
    def make(plan: Plan) -> Rehearsal:
        from lowvram.fit.rehearse import imagine, rehearse

        return rehearse(model, train, plan, imagine(profile))

    return make


def memory_curve_of_run(model: ModelConfig, train: TrainConfig, profile: Profile) -> MemoryCurve:
    """Return a sketch whose rehearsals are made when they are asked for."""
    return MemoryCurve(train.micro_batches, rehearse_on(profile, model, train), train.seq_len)


def evaluate_fit_here(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    place: MemoryBudget,
    options: RunOptions | None = None,
    wish: PlanConstraints = ANY,
) -> FitReport:
    """Rehearse a run on a card and judge it.  options, wish: see `judge`."""
    return evaluate_fit(
        name, model, train, memory_curve_of_run(model, train, place.profile), place, True, options, wish
    )


def find_faster(answer: FitReport, card: Card) -> list[Change]:
    """Return the precisions of 8 bits, and on a processor fp32, in which a run's plan would be faster on a card.

    Either both precisions were measured there, or both are estimated from published figures.  Only NVIDIA cards have
    kernels for products in 8 bits, so elsewhere an estimate would promise what plain PyTorch does not keep.  For fp32
    only a measurement of both speaks.
    """
    profile, plan, train = card.profile, answer.found.plan, answer.train
    others = ("fp8", "int8", *(["fp32"] if profile.platform == "cpu" else []))
    places = {name: card.place(name) for name in (train.precision, *others)}

    def weigh(model: ModelConfig, other: TrainConfig) -> Weighed:
        is_measured = places[other.precision].measured is not None and places[train.precision].measured is not None
        if not is_measured and profile.platform != "cuda":
            return Weighed(0, None, fits_host=False)  # no speed to compare, so a rehearsal would only take time
        rehearsal = rehearse_on(profile, model, other)(plan)
        measured = places[other.precision].measured if is_measured else None
        speed = estimate(rehearsal, plan, other, profile, measured)
        fits_host = not lacking_bytes(rehearsal.ledger, places[train.precision])
        return Weighed(rehearsal.ledger.peak_bytes, speed.tokens_per_second if speed else None, fits_host)

    limit_bytes = places[train.precision].headless_bytes
    in_fp32 = propose_fp32(answer.model, train, limit_bytes, weigh, compare_precisions(profile))
    return [*in_fp32, *propose_faster(answer.model, train, limit_bytes, weigh)]


def find_changes(model: ModelConfig, train: TrainConfig, place: MemoryBudget) -> list[Change]:
    """Return what would make a run fit on a card that it does not fit on, each rehearsed."""
    profile = place.profile

    @functools.cache
    def weigh(model: ModelConfig, train: TrainConfig) -> Weighed:
        sketch = memory_curve_of_run(model, train, profile)
        rehearsal = sketch.at("block", sketch.sizes[0])
        if rehearsal.ledger.peak_bytes > place.limit_bytes and not profile.unified:
            # As the search does where nothing fits: the states lie in the computer's memory.
            sketch = sketch.offloaded()
            rehearsal = sketch.at("block", sketch.sizes[0])
        speed = estimate(rehearsal, sketch.plan("block", sketch.sizes[0]), train, profile, place.measured)
        fits_host = not lacking_bytes(rehearsal.ledger, place)
        return Weighed(rehearsal.ledger.peak_bytes, speed.tokens_per_second if speed else None, fits_host)

    return list(propose(model, train, place.limit_bytes, weigh, can_move=not profile.unified))
