"""Where a run is to be carried out: the card that was named or is here, its limits, and the plan that fits there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from lowvram.cli.show import notice
from lowvram.fit.answer import Answer, Place, judge
from lowvram.fit.measured import load_measured
from lowvram.fit.search import ANY, Wish
from lowvram.fit.sketch import Rehearsal, Sketch
from lowvram.machine import detect, machine_memory_bytes
from lowvram.plan import Plan
from lowvram.profile import Desktop, Profile, find_profile, generic_profile

if TYPE_CHECKING:
    from lowvram.config import ModelConfig, RunOptions, TrainConfig


class Card(NamedTuple):
    """A profile, what is known of its memory now, and a sentence about both.  ram_bytes, free_bytes: None: unknown."""

    profile: Profile
    sentence: str
    ram_bytes: int | None
    free_bytes: int | None
    desktop: Desktop
    beside: str = "a desktop"

    def place(self, precision: str) -> Place:
        """Return the limits, and the measurement that was made here in this precision, if any."""
        measured, problem = load_measured(self.profile.id, precision)
        if problem:
            notice(problem, "yellow")
        beside = self.profile.limit_bytes(self.desktop, self.ram_bytes, self.free_bytes)
        alone = self.profile.limit_bytes("none", self.ram_bytes)
        return Place(self.profile, beside, max(beside, alone), self.ram_bytes, measured, self.beside)


def name_card(gpu: str | None, memory_bytes: int | None, ram_bytes: int | None, desktop: Desktop | None) -> Card:
    """Return the card that was named, or known by its memory; raises ConfigError that names the nearest ones."""
    if gpu is None:
        assert memory_bytes is not None, "asked for by name or by memory"
        profile, note = generic_profile(memory_bytes), "Without a name its speed is not known."
    else:
        profile, note = find_profile(gpu, memory_bytes)
        if profile.unified:
            profile, note = find_profile(gpu, memory_bytes or ram_bytes)
            ram_bytes = profile.memory_bytes
    here: Desktop = "windows" if sys.platform == "win32" else "linux"
    return Card(profile, f"{profile.name}. {note}".strip(), ram_bytes, None, desktop or here)


def find_card(device: str | None = None, ram_bytes: int | None = None) -> Card:
    """Return what is here; device "cpu": the processor, whatever card there is."""
    ram_bytes = ram_bytes or machine_memory_bytes()
    found = detect()
    if device == "cpu" and found.profile.platform != "cpu":
        return Card(find_profile("cpu", ram_bytes)[0], "The processor.", ram_bytes, None, "none")
    # What a desktop takes is not free any more.
    return Card(found.profile, found.sentence, ram_bytes, found.free_bytes, "none", "other programs")


def sketch_run(model: ModelConfig, train: TrainConfig, profile: Profile) -> Sketch:
    """Return a sketch whose rehearsals are made when they are asked for, a second or so each."""

    def make(plan: Plan) -> Rehearsal:
        from lowvram_kernels.dispatch import Card as Imagined

        from lowvram.fit.rehearse import rehearse

        return rehearse(model, train, plan, Imagined(profile.platform, profile.capability))

    return Sketch(train.batch_samples, make)


def judge_here(
    name: str,
    model: ModelConfig,
    train: TrainConfig,
    place: Place,
    options: RunOptions | None = None,
    wish: Wish = ANY,
) -> Answer:
    """Rehearse a run on a card and judge it.  options, wish: see `judge`."""
    return judge(name, model, train, sketch_run(model, train, place.profile), place, True, options, wish)
