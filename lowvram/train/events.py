"""The events of a run, as frozen values; knows neither who makes them nor who shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lowvram.errors import CheckpointError

# What a run waits for.
Cause = Literal["room", "asked", "schedule", "battery", "disk"]


@dataclass(frozen=True)
class Started:
    """The run starts or resumes at `step`.

    resumed_from: the checkpoint of this run that was loaded.  began_from: the checkpoint of another run whose weights a
    new run starts with.  passed_over: the errors of newer checkpoints that were corrupt.  notices: sentences about the
    one that is used.
    """

    step: int
    steps: int
    resumed_from: Path | None
    passed_over: tuple[CheckpointError, ...]
    began_from: Path | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepDone:
    """One optimizer step.  loss: mean nats per token.  memory_bytes: the card's peak, or this process's size on CPU.

    left_s: estimated time to the end of the run.  skipped: 1 where the step taught nothing, because its gradients were
    not finite, its loss is a spike that `train.skip_spikes` skips, or the run went back; where weights are updated
    during backward, the number of weights whose gradient was not finite.
    spike_above: the limit that the loss exceeds if it is a spike, else None; see `lowvram.train.spikes`.
    """

    step: int
    tokens: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens_per_second: float
    memory_bytes: int
    left_s: float
    skipped: int
    spike_above: float | None = None

    @property
    def is_skipped(self) -> bool:
        """Say whether a weight was not updated."""
        return self.skipped > 0


@dataclass(frozen=True)
class Halved:
    """Memory ran out after `step`: the next step is tried again with this micro-batch, and all later ones use it."""

    step: int
    micro_batch: int
    accumulate: int


@dataclass(frozen=True)
class WentBack:
    """The run diverged: after `step` it goes on with the weights of step `to_step`; the others taught nothing."""

    step: int
    to_step: int


@dataclass(frozen=True)
class Recorded:
    """From the step after `step` on, updates are replayed from a CUDA graph; problem: why they are not, else empty."""

    step: int
    problem: str = ""


@dataclass(frozen=True)
class Rotated:
    """After `step`, these experts of each layer are trained.  card_bytes, host_bytes: the memory of all experts."""

    step: int
    experts: tuple[int, ...]
    card_bytes: int
    host_bytes: int
    took_s: float


@dataclass(frozen=True)
class SourceLoss:
    """What one source of held-out text costs.  loss: nats per predicted token; text_bytes: what was read."""

    loss: float
    bits_per_byte: float
    text_bytes: int


@dataclass(frozen=True)
class Evaluated:
    """Validation after a step.  reads_masters: frozen experts were read from their masters, not from their copies.

    by_source: the loss of each source where `data.valid` names several; `loss` and `bits_per_byte` are of all of them.

    pairs_right, choices_right: the share of right answers to the run's minimal pairs and questions.  suffix_bits: bits
    per byte of stems and of each class of suffix.  Each is None where the run names no file for it or it could not be
    measured; its problem says why that was so where memory ran out, and is empty otherwise.
    """

    step: int
    loss: float
    bits_per_byte: float
    reads_masters: bool = False
    pairs_right: float | None = None
    pairs_problem: str = ""
    suffix_bits: Mapping[str, float] | None = None
    suffixes_problem: str = ""
    choices_right: float | None = None
    choices_problem: str = ""
    by_source: Mapping[str, SourceLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled:
    """What the model writes after a fixed prompt.  problem: why it could not write (then text is empty), else empty."""

    step: int
    prompt: str
    text: str
    problem: str = ""


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the drive.  took_s: the time that it took; held_s: how much of it training stood still.

    It is of the state after `step`, even where later steps were done while it was written.
    """

    step: int
    directory: Path
    took_s: float
    held_s: float = 0.0


@dataclass(frozen=True)
class Paused:
    """After `step` the run waits.  why: what it waits for, in a sentence.

    cause: "room" for the next save; "asked": until it is resumed; "schedule", "battery", "disk": the guard of that
    name.  A run that waits for another reason now yields another Paused.  Only one that was asked to does not go on by
    itself.
    """

    step: int
    why: str
    cause: Cause = "room"


@dataclass(frozen=True)
class Resumed:
    """What a run waited for has come.  waited_s: how long it did."""

    step: int
    waited_s: float


@dataclass(frozen=True)
class Slowed:
    """From `step` on the run pauses between steps.  why: in a few words, "84 °C"; "" where that has ended."""

    step: int
    why: str


@dataclass(frozen=True)
class Metered:
    """The energy of a run up to `step`, over all of its starts, pauses left out.

    seconds: the time in which it was counted.  source: "counter", "power" or "power_watts" (of the run file).  cost: in
    the run file's currency, None where it names no price.  power_w, temperature_c: of the card now, None where they
    cannot be read.
    """

    step: int
    kwh: float
    seconds: float
    source: str
    cost: float | None = None
    currency: str = ""
    power_w: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class Stopped:
    """The run stopped after `step`.  is_finished: all tokens were seen."""

    step: int
    is_finished: bool


Event = (
    Started
    | StepDone
    | Halved
    | WentBack
    | Recorded
    | Rotated
    | Evaluated
    | Sampled
    | Saved
    | Paused
    | Resumed
    | Slowed
    | Metered
    | Stopped
)
# What a trainer is doing between two events, which may take minutes.
Doing = Literal["starting", "step", "validating", "sampling", "saving", "waiting for room on the disk", "paused"]
