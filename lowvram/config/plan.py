"""The plan with which one machine computes a step; no plan changes the result of training, up to rounding."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from pydantic import PositiveInt

from lowvram.config.base import FrozenConfig
from lowvram.config.train import TrainConfig
from lowvram.errors import ConfigError, argument

# Tokens of one micro-batch if no plan has been searched: enough to fill a small card's matrix units.
DEFAULT_MICRO_TOKENS = 4_096


Recompute = Literal["none", "attention", "block"]
Offload = Literal["none", "optimizer"]
TECHNIQUES: tuple[Recompute, ...] = get_args(Recompute)


class Plan(FrozenConfig):
    """How a step is divided: micro_batch × accumulate is its number of sequences.

    recompute: what each block computes again in backward instead of keeping it (gradient checkpointing, Chen et al.
    2016).  loss_chunk: rows of logits that exist at a time (None: the op chooses).  offload: what is kept in host
    memory and copied to the card for the update.  compile: whether blocks go through torch.compile.  keep_casts:
    whether 16-bit copies of fp32 weights, and codes of those that are multiplied in 8 bits, are kept for all
    micro-batches of a step, instead of being made at each use.
    """

    micro_batch: PositiveInt
    accumulate: PositiveInt
    recompute: Recompute = "none"
    loss_chunk: PositiveInt | None = None
    offload: Offload = "none"
    compile: bool = False
    keep_casts: bool = False


class Ledger(NamedTuple):
    """Bytes of the tensors at a step's peak, by origin; each is rounded up to allocator blocks (512 bytes on a card).

    weights: with buffers.  activations: kept for backward.  loss: logits, and the head's gradients made with them.
    temporaries: everything else, the batch included.  moment: the phase of the step in which the peak is.
    kept_on_host: size of what is in host memory all the time: master weights and states of frozen experts, or
    offloaded states.  host_bytes: kept_on_host, and what saving a checkpoint copies there, one file at a time.
    checkpoint_bytes: all weights and states, as a checkpoint stores them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    temporaries: int
    moment: str
    host_bytes: int = 0
    kept_on_host: int = 0
    checkpoint_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """The most bytes allocated at once on the card."""
        return sum(self.lines().values())

    def lines(self) -> dict[str, int]:
        """Return the card's lines by name, whose sum is the peak."""
        return {name: getattr(self, name) for name in LEDGER_LINES}


LEDGER_LINES = ("weights", "gradients", "optimizer", "activations", "loss", "temporaries")


def choose_plan(train: TrainConfig, micro_batch: int | None = None) -> tuple[Plan, str]:
    """Return a plan that keeps `batch_tokens`, and the reason for its micro-batch.

    micro_batch: sequences at a time, as the user asked; it must divide the step's sequences (ConfigError).
    """
    samples, possible = train.batch_samples, train.micro_batches
    if micro_batch is not None:
        if micro_batch not in possible:
            why = f"A step has {samples} sequences (batch_tokens / seq_len), which it must divide."
            if train.update_during_backward:
                why = f"update_during_backward excludes accumulation: the step's {samples} sequences go at once."
            raise ConfigError(
                f"{argument('micro_batch')} is {micro_batch}.", why, f"Possible: {', '.join(map(str, possible))}."
            )
        return Plan(micro_batch=micro_batch, accumulate=samples // micro_batch), "you asked for it"
    most = max(1, DEFAULT_MICRO_TOKENS // train.seq_len)
    chosen = max((n for n in possible if n <= most), default=possible[0])
    if train.update_during_backward:
        return Plan(micro_batch=chosen, accumulate=1), "a step that updates during backward has one micro-batch"
    within = f"the most sequences of {train.seq_len} within {DEFAULT_MICRO_TOKENS} tokens"
    reason = f"{within} that divide the step's {samples}"
    return Plan(micro_batch=chosen, accumulate=samples // chosen), reason
