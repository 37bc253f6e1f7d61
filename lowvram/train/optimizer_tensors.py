"""The optimizer's states by name, as a checkpoint holds them: out of the optimizer, checked, and into it again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowvram.errors import CheckpointError
from lowvram.model.transformer import Transformer
from lowvram.train.optim import LeanOptimizer


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's states, by `<field>.<weight's name>`; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        for field, tensor in optimizer.state.get(weight, {}).items():
            tensors[f"{field}.{name}"] = tensor.reshape(-1) if field == "step" else tensor
    return tensors


def refuse_other_states(model: Transformer, optimizer: LeanOptimizer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError where a checkpoint's states do not match the model's weights.

    A weight that was never updated has no state; every other one has all of its fields.  shapes: those of the states
    in a checkpoint, by name as in `optimizer_tensors`.
    """
    unknown = set(shapes)
    for name, weight in model.named_parameters():
        expected = {f"{field}.{name}": shape for field, shape in optimizer.shapes_of(weight).items()}
        stored = {key: shapes[key] for key in expected if key in shapes}
        unknown -= stored.keys()
        if stored not in ({}, expected):
            wrong = next(key for key in expected if stored.get(key) != expected[key])
            has = f"has the shape {list(stored[wrong])}" if wrong in stored else "is missing"
            raise CheckpointError(f"The optimizer state {wrong} {has}.", f"It should be {list(expected[wrong])}.")
    if unknown:
        raise CheckpointError(f"The optimizer remembers {min(unknown)}.", "The model has no such weight.")


def load_optimizer_tensors(model: Transformer, optimizer: LeanOptimizer, tensors: dict[str, Tensor]) -> None:
    """Load states as `optimizer_tensors` returned them; they are copied, since they are views of the checkpoint's file.

    Raises CheckpointError where a tensor belongs to no weight.
    """
    weights = dict(model.named_parameters())
    for key, tensor in tensors.items():
        field, _, name = key.partition(".")
        if name not in weights:
            raise CheckpointError(f"The optimizer remembers {key}.", f"The model has no weight {name}.")
        weight = weights[name]
        shape = () if field == "step" else tensor.shape
        optimizer.state[weight][field] = optimizer.place(tensor.reshape(shape), weight.device)
