"""The learning rate of each step."""

from __future__ import annotations

import math

from lowvram.config.train import TrainConfig


def learning_rate(train: TrainConfig, step: int) -> float:
    """Return the learning rate of optimizer step number `step`, counted from 0."""
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
