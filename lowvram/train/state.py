"""Everything that a run must remember to go on as if it had never stopped; knows names, not files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram.checkpoint import Checkpoint
from lowvram.errors import CheckpointError
from lowvram.model.transformer import Transformer
from lowvram.train.optim import load_optimizer_tensors, optimizer_tensors

# Micikevicius et al. 2018: start high, halve on overflow, double after a long quiet time.
FIRST_LOSS_SCALE = 2.0**16
QUIET_STEPS = 2_000


@dataclass
class TrainState:
    """The model, its optimizer, and the few numbers beside them.

    step: optimizer steps done, skipped ones included; the data position follows from it.
    skipped_in_row: steps in a row whose gradients were not finite.  quiet: finite steps since the scale last moved.
    """

    model: Transformer
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    loss_scale: float = 1.0
    quiet: int = 0
    skipped_in_row: int = 0

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights and the optimizer's memory, by name."""
        return dict(self.model.state_dict()), optimizer_tensors(self.model, self.optimizer)

    def numbers(self) -> dict[str, Any]:
        """Return the plain values."""
        names = ("step", "tokens", "loss_scale", "quiet", "skipped_in_row")
        return {name: getattr(self, name) for name in names}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint holds; raises CheckpointError if it is of another model."""
        load_weights(self.model, checkpoint)
        load_optimizer_tensors(self.model, self.optimizer, checkpoint.state())
        numbers = checkpoint.numbers()
        for name in self.numbers().keys() & numbers.keys():
            setattr(self, name, numbers[name])

    def judge_scale(self, finite: bool, is_scaled: bool) -> None:
        """Count a step as finite or skipped, and move the loss scale of an fp16 run."""
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1
        if not is_scaled:
            return
        self.quiet = self.quiet + 1 if finite else 0
        if not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.quiet >= QUIET_STEPS:
            self.loss_scale, self.quiet = self.loss_scale * 2, 0


def load_weights(model: Transformer, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model of the same form; raises CheckpointError naming what differs."""
    weights = checkpoint.weights()
    own = model.state_dict()
    strange = [
        name
        for name in sorted({*own, *weights})
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if strange:
        raise CheckpointError(
            f"{checkpoint.directory} holds another model than the run file describes.",
            f"{len(strange)} tensors differ in name or shape, the first is {strange[0]}.",
            "Make [model] equal to that run's, or start from another checkpoint.",
        )
    model.load_state_dict(weights)
