"""The optimizer and its learning rate: which weights decay, what it remembers by name; knows no loop."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lowvram_kernels.adamw8 import Maps, Moments, adamw8_, build_maps, new_moments
from torch import Tensor
from torch.optim.adamw import adamw

from lowvram.config import AdamW, TrainConfig
from lowvram.errors import CheckpointError
from lowvram.model.transformer import Transformer

# As in bitsandbytes: what is smaller weighs nothing.
LEAST_8BIT = 4_096


class AdamW8(torch.optim.Optimizer):
    """AdamW whose groups with `bits` = 8 keep their moments in 8 bits; those with 32 step as torch's fused AdamW does.

    A weight's state, made at its first step: `step` (a scalar on the device) and the fields of `Moments`, or `exp_avg`
    and `exp_avg_sq`.  seed: of a bf16 weight's rounding.
    found_inf: None, or an fp32 scalar as torch's fused optimizers read it: where it is 1, not a bit changes.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, seed: int = 0
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "bits": 8})
        self._seed = seed
        self._maps: dict[torch.device, Maps] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient; reads nothing back from the device."""
        assert closure is None, "the trainer has made the gradients already"
        purpose_of = {w: number for number, w in enumerate(w for g in self.param_groups for w in g["params"])}
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if group["bits"] == 32:
                self._step_32bit(group, weights)
                continue
            for weight in weights:
                self._step_8bit(group, weight, purpose_of[weight])

    def _step_8bit(self, group: dict[str, Any], weight: Tensor, purpose: int) -> None:
        state = self.state[weight]
        if not state:
            state |= {"step": _no_steps(weight), **new_moments(weight)._asdict()}
        if weight.device not in self._maps:
            self._maps[weight.device] = build_maps(weight.device)
        state["step"] += 1.0 if self.found_inf is None else 1.0 - self.found_inf
        adamw8_(
            weight,
            weight.grad,
            Moments(*(state[name] for name in Moments._fields)),
            self._maps[weight.device],
            state["step"],
            group["lr"],
            group["betas"],
            group["eps"],
            group["weight_decay"],
            skip=self.found_inf,
            seed=self._seed,
            purpose=purpose,
        )

    def _step_32bit(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        for weight in weights:
            if not self.state[weight]:
                zeros = {moment: torch.zeros_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
                self.state[weight] |= {"step": _no_steps(weight), **zeros}
        adamw(
            weights,
            [weight.grad for weight in weights],
            *([self.state[weight][moment] for weight in weights] for moment in ("exp_avg", "exp_avg_sq")),
            [],
            [self.state[weight]["step"] for weight in weights],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _no_steps(weight: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=weight.device)


def build_optimizer(model: Transformer, config: AdamW, seed: int = 0) -> torch.optim.Optimizer:
    """Return AdamW over the model's weights; decay acts on matrices, not on norms.

    seed: the run's; it decides how 8-bit AdamW rounds bf16 weights.
    The fused form is stated, because torch's default differs by device and its temporaries with it.
    """
    exempt = {id(model.embedding), id(model.head_VD)} if config.embeddings == "fp32" else set()

    def bits_of(weight: Tensor) -> int:
        is_8bit = weight.dim() > 1 and weight.numel() >= LEAST_8BIT and id(weight) not in exempt
        return 8 if config.bits == 8 and is_8bit else 32

    groups = []
    for is_matrix, bits in ((True, 8), (True, 32), (False, 32)):
        chosen = [w for w in model.parameters() if (w.dim() > 1, bits_of(w)) == (is_matrix, bits)]
        if chosen:
            groups.append({"params": chosen, "weight_decay": config.decay if is_matrix else 0.0, "bits": bits})
    return AdamW8(groups, config.lr, (config.beta1, config.beta2), config.eps, seed)


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


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what the optimizer remembers, by `<what>.<weight's name>`; empty before the first step."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        for what, tensor in optimizer.state.get(weight, {}).items():
            tensors[f"{what}.{name}"] = tensor.reshape(1) if what == "step" else tensor
    return tensors


def load_optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back copies of what `optimizer_tensors` returned: loaded tensors are views of the checkpoint's file.

    Raises CheckpointError where a tensor belongs to no weight.
    """
    weights = dict(model.named_parameters())
    for key, tensor in tensors.items():
        what, _, name = key.partition(".")
        if name not in weights:
            raise CheckpointError(f"The optimizer remembers {key}.", f"The model has no weight {name}.")
        weight = weights[name]
        shape = () if what == "step" else tensor.shape
        optimizer.state[weight][what] = tensor.reshape(shape).to(weight.device, copy=True)
