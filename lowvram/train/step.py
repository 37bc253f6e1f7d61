"""One optimizer step in two halves, with the trainer's only look at the device between them.

Neither half reads a device value on the host, except that a MoE layer learns its experts' slices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram.config import TrainConfig
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES, Batch, Loss, causal_loss
from lowvram.plan import Plan
from lowvram.train.optim import LeanOptimizer


class Found(NamedTuple):
    """stats: [mean loss, gradient norm, 1 if both are finite], fp32 on the device.  loads: [MoE layers, E] or None."""

    stats: Tensor
    loads: Tensor | None


def loss_for(model: Transformer, train: TrainConfig, plan: Plan) -> Callable[[Batch], Loss]:
    """Return what maps a micro-batch to its loss: the one that is trained, rehearsed and timed."""
    return functools.partial(
        causal_loss,
        model,
        dtype=DTYPES[train.precision],
        dropout=train.dropout,
        seed=train.seed,
        loss_chunk=plan.loss_chunk,
        recompute=plan.recompute,
    )


def gradients(
    model: Transformer,
    loss_of: Callable[[Batch], Loss],
    micro_batches: Sequence[Batch],
    targets: int,
    loss_scale: float = 1.0,
) -> Found:
    """Accumulate the gradients of the mean loss over all micro-batches in `.grad`, times loss_scale.

    targets: predicted tokens of the whole step, by which every micro-batch's sum is divided.
    """
    total: Tensor | None = None
    loads: Tensor | None = None
    for batch in micro_batches:
        loss = loss_of(batch)
        (loss.total * (loss_scale / targets)).backward()
        seen = loss.total.detach()
        total = seen if total is None else total + seen
        if loss.loads is not None:
            loads = loss.loads if loads is None else loads + loss.loads
    assert total is not None, "a step has at least one micro-batch"
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    # foreach is left to torch: it refuses to be asked for on MPS.
    norm = torch.nn.utils.get_total_norm(grads).float() / loss_scale
    mean = total / targets
    return Found(torch.stack([mean, norm, (mean + norm).isfinite().float()]), loads)


@torch.no_grad()
def update(
    model: Transformer,
    optimizer: LeanOptimizer,
    loads: Tensor | None,
    learning_rate: float,
    gradient_scale: float,
) -> None:
    """Scale the gradients (clipping and loss scaling in one factor), step the weights, move the balancing biases."""
    optimizer.gradient_scale = gradient_scale
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    if loads is not None:
        for layer, load_E in zip(model.moe_layers(), loads, strict=True):
            layer.router.balance(load_E)
    discard(optimizer)


def discard(optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients, as after an update or instead of one."""
    optimizer.zero_grad(set_to_none=True)
