"""The optimizer and its learning rate: which weights decay, what it remembers by name; knows no loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowvram.config import AdamW, TrainConfig
from lowvram.model.transformer import Transformer

_MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(model: Transformer, config: AdamW) -> torch.optim.AdamW:
    """Return AdamW over the model's weights; decay acts on matrices, not on norms.

    The fused form is stated, because torch's default differs by device and its temporaries with it.
    """
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": config.decay},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the rate of optimizer step number `step`, counted from 0."""
    schedule, steps = train.schedule, train.steps
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return train.optimizer.lr * (step + 1) / (warmup + 1)
    if schedule.kind == "cosine":
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        share = schedule.floor + (1.0 - schedule.floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    else:
        decay_steps = max(1, round(schedule.decay * steps))
        left = min(1.0, max(0, steps - step) / decay_steps)
        share = schedule.floor + (1.0 - schedule.floor) * left
    return train.optimizer.lr * share


def optimizer_tensors(model: Transformer, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return what the optimizer remembers, by `<moment>.<weight's name>`; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        remembered = optimizer.state.get(weight)
        if remembered:
            tensors |= {f"{moment}.{name}": remembered[moment] for moment in _MOMENTS}
            tensors[f"step.{name}"] = remembered["step"].reshape(1)
    return tensors


def load_optimizer_tensors(model: Transformer, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Put back copies of what `optimizer_tensors` returned: loaded tensors are views of the checkpoint's file."""
    for name, weight in model.named_parameters():
        if f"step.{name}" in tensors:
            device = weight.device
            optimizer.state[weight] = {
                "step": tensors[f"step.{name}"].reshape(()).to(device, copy=True),
                **{moment: tensors[f"{moment}.{name}"].to(device, copy=True) for moment in _MOMENTS},
            }
