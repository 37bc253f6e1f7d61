"""Everything that a run must remember to go on as if it had never stopped; knows names, not files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowvram.config.model import ModelConfig
from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.errors import CheckpointError
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES, MATMUL_FORMATS
from lowvram.storage.checkpoint import Checkpoint
from lowvram.storage.manifest import NUMBERS
from lowvram.train.optim import (
    LeanOptimizer,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    refuse_other_states,
)
from lowvram.train.rotation import ExpertRotation

# Micikevicius et al. 2018: start high, halve on overflow, double after a long quiet time.
FIRST_LOSS_SCALE = 2.0**16
QUIET_STEPS = 2_000
_NUMBERS = ("step", "tokens", "loss_scale", "quiet", "skipped_in_row")


@dataclass
class TrainState:
    """The model, its optimizer, and the few numbers beside them.

    step: optimizer steps done, skipped ones included; the data position follows from it.
    skipped_in_row: steps in a row in which no weight moved, since gradients were not finite.  quiet: finite steps since
    the scale last moved.
    """

    model: Transformer
    optimizer: LeanOptimizer
    rotation: ExpertRotation | None = None
    step: int = 0
    tokens: int = 0
    loss_scale: float = 1.0
    quiet: int = 0
    skipped_in_row: int = 0

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights and the optimizer's memory, by name; of experts that rotate all, in natural order."""
        weights, memory = dict(self.model.state_dict()), optimizer_tensors(self.model, self.optimizer)
        if self.rotation is None:
            return weights, memory
        self.rotation.bring_home()
        masters, states = self.rotation.tensors()
        return weights | masters, memory | states

    def numbers(self) -> dict[str, Any]:
        """Return the plain values."""
        plain = {name: getattr(self, name) for name in _NUMBERS}
        return plain if self.rotation is None else {**plain, "rotation": self.rotation.numbers()}

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError where `restore` would meet numbers or tensors that this run cannot have saved."""
        _check_numbers(checkpoint, self.rotation)
        masters, own_states = self.rotation.tensors() if self.rotation is not None else ({}, {})
        weights, states = checkpoint.map_weights(), checkpoint.map_state()
        expected = {name: tuple(tensor.shape) for name, tensor in (self.model.state_dict() | masters).items()}
        found = {name: weights.shape(name) for name in weights.names()}
        wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        shapes = {name: states.shape(name) for name in states.names()}
        # Imported weights have no states; of experts that rotate all states are saved, or none.
        rotating = {name: shapes.pop(name) for name in own_states if name in shapes}
        sizes = {name: tuple(tensor.reshape(-1).shape) for name, tensor in own_states.items()}
        wrong += sorted(name for name in rotating if math.prod(rotating[name]) != math.prod(sizes[name]))
        wrong += sorted(own_states.keys() - rotating.keys()) if rotating else []
        if wrong:
            why = f"The first of {len(wrong)} tensors that are missing, unknown or of another shape is {wrong[0]}."
            raise CheckpointError(f"{checkpoint.directory} holds other tensors than its configuration describes.", why)
        refuse_other_states(self.model, self.optimizer, shapes)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over what a checkpoint holds; raises CheckpointError if it is of another model."""
        numbers, states = checkpoint.numbers(), checkpoint.state()
        names = set(self.rotation.tensors()[1]) if self.rotation is not None else set()
        self.take_weights(checkpoint, {name: states[name] for name in names & set(states)}, numbers.get("rotation"))
        own = {name: tensor for name, tensor in states.items() if name not in names}
        load_optimizer_tensors(self.model, self.optimizer, own)
        for name in numbers.keys() & set(_NUMBERS):
            setattr(self, name, numbers[name])

    def take_weights(
        self, checkpoint: Checkpoint, states: dict[str, Tensor] | None = None, numbers: dict[str, Any] | None = None
    ) -> None:
        """Take over a checkpoint's weights.  states, numbers: of experts that rotate; None begins them anew."""
        if self.rotation is None:
            load_weights(self.model, checkpoint)
            return
        masters, _ = self.rotation.tensors()
        load_weights(self.model, checkpoint, masters)
        weights = checkpoint.weights()
        self.rotation.restore({name: weights[name] for name in masters}, states or {}, numbers)

    def judge_scale(self, finite: bool, is_scaled: bool, has_learnt: bool | None = None) -> None:
        """Count a step as finite or skipped, and move the loss scale of an fp16 run.

        has_learnt: whether some weight has moved; None: all or none has.
        """
        self.skipped_in_row = 0 if (finite if has_learnt is None else has_learnt) else self.skipped_in_row + 1
        if not is_scaled:
            return
        self.quiet = self.quiet + 1 if finite else 0
        if not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.quiet >= QUIET_STEPS:
            self.loss_scale, self.quiet = self.loss_scale * 2, 0


def is_healthy(numbers: dict[str, Any]) -> bool:
    """Say whether the last step of a saved state has learnt something: none was skipped just before it."""
    return numbers.get("skipped_in_row", 0) == 0


def _check_numbers(checkpoint: Checkpoint, rotation: ExpertRotation | None) -> None:
    numbers = checkpoint.numbers()
    wrong = [name for name in _NUMBERS if name in numbers and not _is_number(numbers[name], name == "loss_scale")]
    if rotation is not None and not rotation.accepts(numbers.get("rotation")):
        wrong.append("rotation")
    if wrong:
        path = checkpoint.directory / NUMBERS
        raise CheckpointError(f"{path} was altered.", f"Its {wrong[0]} is {str(numbers[wrong[0]])[:60]}.")


def _is_number(value: object, may_be_broken: bool) -> bool:
    """Say whether a value counts something, or, where it may be broken, is finite and above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not may_be_broken:
        return isinstance(value, int) and value >= 0
    return 0.0 < value < math.inf


def build_state(
    model: ModelConfig, train: TrainConfig, plan: Plan, device: torch.device, seed: int | None
) -> TrainState:
    """Return the state of a run before its first step.  seed: None leaves the weights for a load to fill."""
    network = Transformer(model, seed, device, DTYPES[train.weights], train.rotation, MATMUL_FORMATS[train.precision])
    optimizer = build_optimizer(network, train.optimizer, train.seed, on_host=plan.offload == "optimizer")
    rotation = ExpertRotation(network, optimizer, train.rotation, seed) if train.rotation is not None else None
    return TrainState(network, optimizer, rotation)


def load_weights(model: Transformer, checkpoint: Checkpoint, apart: dict[str, Tensor] | None = None) -> None:
    """Put a checkpoint's weights into a model of the same form; raises CheckpointError naming what differs.

    apart: tensors of the checkpoint that are compared like the others, and left for the caller to load.
    """
    weights, apart = checkpoint.weights(), apart or {}
    own = model.state_dict() | apart
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
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in apart}, strict=not apart)
