"""The training state: everything that a run needs to resume as if it had never stopped; knows names, not files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
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
from lowvram.train.loss_scale import next_loss_scale
from lowvram.train.optim import LeanOptimizer, build_optimizer
from lowvram.train.optimizer_tensors import load_optimizer_tensors, optimizer_tensors, refuse_other_states
from lowvram.train.rotation import ExpertRotation
from lowvram.train.spikes import History, is_history

_NUMBERS = ("step", "tokens", "loss_scale", "quiet", "skipped_in_row", "went_back_at", "went_back_to", "losses")


@dataclass
class TrainState:
    """The model, its optimizer, and a few counters.

    step: optimizer steps done, skipped ones included; the data position follows from it.
    skipped_in_row: steps in a row in which no weight was updated.  quiet: finite steps since the loss scale changed.
    went_back_at, went_back_to: see `divergence.may_go_back`.  losses: of the last steps, for the rule in `spikes`.
    """

    model: Transformer
    optimizer: LeanOptimizer
    rotation: ExpertRotation | None = None
    step: int = 0
    tokens: int = 0
    loss_scale: float = 1.0
    quiet: int = 0
    skipped_in_row: int = 0
    went_back_at: int = 0
    went_back_to: int = 0
    losses: History = field(default_factory=list)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights and the optimizer states, by name; rotating experts are complete and in natural order."""
        weights, states = dict(self.model.state_dict()), optimizer_tensors(self.model, self.optimizer)
        if self.rotation is None:
            return weights, states
        self.rotation.update_masters()
        masters, expert_states = self.rotation.tensors()
        return weights | masters, states | expert_states

    def numbers(self) -> dict[str, Any]:
        """Return the counters, and the position of the expert rotation, as plain values."""
        plain = {name: getattr(self, name) for name in _NUMBERS}
        plain["losses"] = [list(pair) for pair in self.losses]  # as JSON gives them back
        return plain if self.rotation is None else {**plain, "rotation": self.rotation.numbers()}

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise CheckpointError where `restore` would find numbers or tensors that this run cannot have saved."""
        _check_numbers(checkpoint, self.rotation)
        masters, expert_states = self.rotation.tensors() if self.rotation is not None else ({}, {})
        weights, states = checkpoint.map_weights(), checkpoint.map_state()
        expected = {name: tuple(tensor.shape) for name, tensor in (self.model.state_dict() | masters).items()}
        found = {name: weights.shape(name) for name in weights.names()}
        wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        shapes = {name: states.shape(name) for name in states.names()}
        # Imported weights have no states; for rotating experts either all states are saved or none.
        rotating = {name: shapes.pop(name) for name in expert_states if name in shapes}
        sizes = {name: tuple(tensor.reshape(-1).shape) for name, tensor in expert_states.items()}
        wrong += sorted(name for name in rotating if math.prod(rotating[name]) != math.prod(sizes[name]))
        wrong += sorted(expert_states.keys() - rotating.keys()) if rotating else []
        if wrong:
            why = f"The first of {len(wrong)} tensors that are missing, unknown or of another shape is {wrong[0]}."
            raise CheckpointError(f"{checkpoint.directory} holds other tensors than its configuration describes.", why)
        refuse_other_states(self.model, self.optimizer, shapes)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load everything that a checkpoint holds; raises CheckpointError if it is of another model."""
        numbers, states = checkpoint.numbers(), checkpoint.state()
        names = set(self.rotation.tensors()[1]) if self.rotation is not None else set()
        self.take_weights(checkpoint, {name: states[name] for name in names & set(states)}, numbers.get("rotation"))
        own = {name: tensor for name, tensor in states.items() if name not in names}
        load_optimizer_tensors(self.model, self.optimizer, own)
        for name in numbers.keys() & set(_NUMBERS):
            setattr(self, name, numbers[name])
        self.losses = [(step, loss) for step, loss in self.losses]

    def take_weights(
        self, checkpoint: Checkpoint, states: dict[str, Tensor] | None = None, numbers: dict[str, Any] | None = None
    ) -> None:
        """Load a checkpoint's weights.  states, numbers: those of rotating experts; None starts the rotation anew."""
        if self.rotation is None:
            load_weights(self.model, checkpoint)
            return
        masters, _ = self.rotation.tensors()
        load_weights(self.model, checkpoint, masters)
        weights = checkpoint.weights()
        self.rotation.restore({name: weights[name] for name in masters}, states or {}, numbers)

    def update_loss_scale(self, finite: bool, is_scaled: bool, has_learnt: bool | None = None) -> None:
        """Count a step as finite or skipped, and update the loss scale of an fp16 run.

        has_learnt: whether some weight was updated; None means all were if `finite`, else none.
        """
        self.skipped_in_row = 0 if (finite if has_learnt is None else has_learnt) else self.skipped_in_row + 1
        if not is_scaled:
            return
        self.loss_scale, self.quiet = next_loss_scale(self.loss_scale, self.quiet, finite)


def is_healthy(numbers: dict[str, Any]) -> bool:
    """Say whether the last step before a checkpoint updated weights: it was not skipped, nor did the run go back."""
    return numbers.get("skipped_in_row", 0) == 0 and numbers.get("went_back_at", 0) != (numbers.get("step") or None)


def _check_numbers(checkpoint: Checkpoint, rotation: ExpertRotation | None) -> None:
    numbers = checkpoint.numbers()
    wrong = [name for name in _NUMBERS if name in numbers and not _is_valid(name, numbers[name])]
    if rotation is not None and not rotation.accepts(numbers.get("rotation")):
        wrong.append("rotation")
    if wrong:
        path = checkpoint.directory / NUMBERS
        raise CheckpointError(f"{path} was altered.", f"Its {wrong[0]} is {str(numbers[wrong[0]])[:60]}.")


def _is_valid(name: str, value: object) -> bool:
    return is_history(value) if name == "losses" else _is_number(value, name == "loss_scale")


def _is_number(value: object, is_fractional: bool) -> bool:
    """Say whether a value is a whole number from 0 on, or, if it is fractional, a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if not is_fractional:
        return isinstance(value, int) and value >= 0
    return 0.0 < value < math.inf


def build_state(
    model: ModelConfig, train: TrainConfig, plan: Plan, device: torch.device, seed: int | None
) -> TrainState:
    """Return the state of a run before its first step.  seed: None leaves the weights uninitialised."""
    network = Transformer(model, seed, device, DTYPES[train.weights], train.rotation, MATMUL_FORMATS[train.precision])
    if plan.keep_casts:
        network.keep_casts(DTYPES[train.precision])
    optimizer = build_optimizer(network, train.optimizer, train.seed, on_host=plan.offload == "optimizer")
    rotation = ExpertRotation(network, optimizer, train.rotation, seed) if train.rotation is not None else None
    return TrainState(network, optimizer, rotation)


def load_weights(model: Transformer, checkpoint: Checkpoint, apart: dict[str, Tensor] | None = None) -> None:
    """Load a checkpoint's weights into a model of the same configuration; raises CheckpointError naming what differs.

    apart: tensors of the checkpoint that are compared like the others, but that the caller loads.
    """
    weights, apart = checkpoint.weights(), apart or {}
    own = model.state_dict() | apart
    different = [
        name
        for name in sorted({*own, *weights})
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    ]
    if different:
        raise CheckpointError(
            f"{checkpoint.directory} holds another model than the run file describes.",
            f"{len(different)} tensors differ in name or shape, the first is {different[0]}.",
            "Make [model] equal to that run's, or start from another checkpoint.",
        )
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in apart}, strict=not apart)
