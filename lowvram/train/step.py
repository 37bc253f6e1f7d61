"""One optimizer step, either as gradients and then an update, or with updates during backward; knows no loop.

The trainer reads device values once per step, between the two halves.  Nothing here reads a device value on the host,
except that a MoE layer reads the sizes of its experts' slices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lowvram_kernels.random.stochastic_rounding import add_rounded_
from torch import Tensor

from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES, Batch, Loss, causal_loss
from lowvram.train.optim import LeanOptimizer


class StepStats(NamedTuple):
    """stats: [mean loss, gradient norm, number of weights whose gradient is not finite], fp32 on the device.

    From `gradients`, the third value is 0, or 1 where loss or norm is not finite.  loads: [MoE layers, E] or None.
    """

    stats: Tensor
    loads: Tensor | None


# Runs forward and backward for a micro-batch, with its loss multiplied by the factor.
Add = Callable[[Batch, float], Loss]


def loss_for(model: Transformer, train: TrainConfig, plan: Plan) -> Callable[[Batch], Loss]:
    """Return the function from a micro-batch to its loss; training, memory estimates and timing all use this one."""
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
    micro_batches: Iterable[Batch],
    targets: int,
    loss_scale: float = 1.0,
    seed: int = 0,
    add: Add | None = None,
) -> StepStats:
    """Accumulate the gradients of the mean loss over all micro-batches in `.grad`, times loss_scale.

    targets: the number of predicted tokens in the whole step, by which every micro-batch's sum is divided.  seed:
    together with a micro-batch's first sample it decides how the sums of bf16 gradients are rounded.  add: replaces
    `add_gradients`, with the same loss and seed.
    """
    add = add or functools.partial(add_gradients, model, loss_of, seed)
    total: Tensor | None = None
    loads: Tensor | None = None
    for batch in micro_batches:
        loss = add(batch, loss_scale / targets)
        total = loss.total if total is None else total + loss.total
        if loss.loads is not None:
            loads = loss.loads if loads is None else loads + loss.loads
    assert total is not None, "a step has at least one micro-batch"
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = total_norm(grads) / loss_scale
    mean = total / targets
    return StepStats(torch.stack([mean, norm, (~(mean + norm).isfinite()).float()]), loads)


def add_gradients(
    model: Transformer, loss_of: Callable[[Batch], Loss], seed: int, batch: Batch, factor: float | Tensor
) -> Loss:
    """Add the gradients of one micro-batch's summed loss, times factor, to `.grad`; returns the loss and the loads."""
    loss = loss_of(batch)
    with _adding_rounded(model, seed, batch.sample_B[0]):
        (loss.total * factor).backward()
    return Loss(loss.total.detach(), loss.loads)


@contextmanager
def _adding_rounded(model: Transformer, seed: int, sample: Tensor) -> Iterator[None]:
    """Add new gradients of bf16 weights to the existing ones with stochastic rounding.

    Autograd's own sums round to nearest, which loses many small terms: after a first term 20 times as large, the sum of
    255 equal ones is 7 % too small.
    """
    sums: dict[Tensor, Tensor] = {
        w: w.grad for w in model.parameters() if w.dtype == torch.bfloat16 and w.grad is not None
    }
    if not sums:
        yield
        return
    purpose_of: dict[Tensor, int] = {weight: number for number, weight in enumerate(model.parameters())}

    def add(weight: Tensor) -> None:
        assert weight.grad is not None, "the hook runs after the gradient is set"
        new, weight.grad = weight.grad, sums.pop(weight)
        add_rounded_(weight.grad, new, seed, purpose_of[weight], sample)

    hooks = [weight.register_post_accumulate_grad_hook(add) for weight in sums]
    for weight in sums:
        weight.grad = None
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for weight, grad in sums.items():  # weights to which this micro-batch gave no gradient
        weight.grad = grad


@torch.no_grad()
def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all tensors together, summed in fp32, on the device."""
    if not any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return torch.nn.utils.get_total_norm(tensors).float()  # with bf16 tensors it would round each norm to bf16
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def update(
    model: Transformer,
    optimizer: LeanOptimizer,
    loads: Tensor | None,
    learning_rate: float,
    gradient_scale: float,
) -> None:
    """Update the weights with scaled gradients (clipping and loss scaling in one factor) and the balancing biases."""
    optimizer.gradient_scale = gradient_scale
    optimizer.set_rate(learning_rate)
    optimizer.step()
    _balance(model, loads)
    discard(optimizer)


def learn_in_backward(
    model: Transformer,
    loss_of: Callable[[Batch], Loss],
    batch: Batch,
    optimizer: LeanOptimizer,
    targets: int,
    learning_rate: float,
    clip: float,
    loss_scale: float = 1.0,
) -> StepStats:
    """Update each weight as soon as backward has its gradient and free it then, so that all gradients never coexist.

    clip: the greatest norm of all gradients together.  Each of the P weights may have clip / √P of it, because the
    norms of the others are not known yet.  A weight whose gradient is not finite is not updated, and is counted.
    Source: Lv et al. 2023 (LOMO), with the optimizer's states kept.
    """
    squares: list[Tensor] = []
    skipped: list[Tensor] = []
    optimizer.set_rate(learning_rate)
    own_clip = clip / math.sqrt(sum(1 for _ in model.parameters()))

    @torch.no_grad()
    def step(weight: Tensor) -> None:
        assert weight.grad is not None, "the hook runs after the gradient is set"
        norm = total_norm([weight.grad]) / loss_scale
        is_finite = norm.isfinite()
        optimizer.found_inf = (~is_finite).float()
        optimizer.gradient_scale = (own_clip / (norm + 1e-6)).clamp(max=1.0) / loss_scale
        optimizer.step_one(weight)
        weight.grad = None
        squares.append(torch.where(is_finite, norm * norm, 0.0))
        skipped.append(optimizer.found_inf)

    hooks = [weight.register_post_accumulate_grad_hook(step) for weight in model.parameters()]
    try:
        loss = loss_of(batch)
        (loss.total * (loss_scale / targets)).backward()
    finally:
        for hook in hooks:
            hook.remove()
        optimizer.found_inf, optimizer.gradient_scale = None, 1.0
    mean = loss.total.detach() / targets
    # Where the loss is not finite, no weight was updated and the loads mean nothing, so the biases stay as they are.
    _balance(model, loss.loads * mean.isfinite() if loss.loads is not None else None)
    return StepStats(torch.stack([mean, torch.stack(squares).sum().sqrt(), torch.stack(skipped).sum()]), loss.loads)


@torch.no_grad()
def _balance(model: Transformer, loads: Tensor | None) -> None:
    if loads is not None:
        for layer, load_E in zip(model.moe_layers(), loads, strict=True):
            layer.router.balance(load_E)


def discard(optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradients, after an update or instead of one."""
    optimizer.zero_grad(set_to_none=True)
