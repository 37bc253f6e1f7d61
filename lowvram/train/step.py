"""One optimizer step in two halves, with the trainer's only look at the device between them, or in one.

Nothing here reads a device value on the host, except that a MoE layer learns its experts' slices.
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
    """stats: [mean loss, gradient norm, weights whose gradient is not finite], fp32 on the device.

    Of a whole step's gradients the third is 0, or 1 where loss or norm is not finite.  loads: [MoE layers, E] or None.
    """

    stats: Tensor
    loads: Tensor | None


# Passes a micro-batch forward and backward; the factor is what its loss counts.
Add = Callable[[Batch, float], Loss]


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
    micro_batches: Iterable[Batch],
    targets: int,
    loss_scale: float = 1.0,
    seed: int = 0,
    add: Add | None = None,
) -> StepStats:
    """Accumulate the gradients of the mean loss over all micro-batches in `.grad`, times loss_scale.

    targets: predicted tokens of the whole step, by which every micro-batch's sum is divided.  seed: with a
    micro-batch's first sample it decides how the sums of bf16 gradients are rounded.  add: what passes through the
    model in place of `add_gradients`, with the same loss and seed.
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
    """Add the gradients of bf16 weights to those that are there with rounding at random.

    Autograd's own sums round to nearest, where small terms that come again and again are lost: after a first one of 20
    times their size, 255 equal ones miss 7 % of the sum.
    """
    sums = {w: w.grad for w in model.parameters() if w.dtype == torch.bfloat16 and w.grad is not None}
    if not sums:
        yield
        return
    purpose_of = {weight: number for number, weight in enumerate(model.parameters())}

    def add(weight: Tensor) -> None:
        assert weight.grad is not None, "the hook comes with it"
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
    for weight, grad in sums.items():  # which this micro-batch had nothing to say about
        weight.grad = grad


@torch.no_grad()
def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all tensors together, added up in fp32, on the device."""
    if not any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return torch.nn.utils.get_total_norm(tensors).float()  # which would round each norm to bf16
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
    """Step the weights with scaled gradients (clipping and loss scaling in one factor), move the balancing biases."""
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
    """Step each weight as soon as backward has its gradient, which then goes: never do all gradients exist.

    clip: greatest norm of all gradients together, shared out evenly: each of the P weights may have clip / √P of it,
    because the others' norms are not known yet.  A weight whose gradient is not finite stays as it is, and is counted.
    Source: Lv et al. 2023 (LOMO), with the optimizer's states kept.
    """
    squares: list[Tensor] = []
    skipped: list[Tensor] = []
    optimizer.set_rate(learning_rate)
    own_clip = clip / math.sqrt(sum(1 for _ in model.parameters()))

    @torch.no_grad()
    def step(weight: Tensor) -> None:
        assert weight.grad is not None, "the hook comes with it"
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
    # Where the loss is not finite no weight has moved, and nobody's load is known to be more or less than the mean.
    _balance(model, loss.loads * mean.isfinite() if loss.loads is not None else None)
    return StepStats(torch.stack([mean, torch.stack(squares).sum().sqrt(), torch.stack(skipped).sum()]), loss.loads)


@torch.no_grad()
def _balance(model: Transformer, loads: Tensor | None) -> None:
    if loads is not None:
        for layer, load_E in zip(model.moe_layers(), loads, strict=True):
            layer.router.balance(load_E)


def discard(optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients, as after an update or instead of one."""
    optimizer.zero_grad(set_to_none=True)
