"""One optimizer step, either as gradients and then an update, or with updates during backward; knows no loop.

Nothing here reads a device value on the host, except that a MoE layer without Triton reads the sizes of its experts'
slices.  The trainer reads a step's numbers once, when all of it is on its way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from lowvram_kernels.dispatch import card_of
from lowvram_kernels.matmul.fp32_sums import adding_to_grads
from lowvram_kernels.random.stochastic_rounding import add_rounded_
from torch import Tensor

from lowvram.config.plan import Plan
from lowvram.config.train import TrainConfig
from lowvram.model.ffn import balance
from lowvram.model.transformer import Transformer
from lowvram.objective import DTYPES, Batch, Loss, causal_loss
from lowvram.train.loss_scale import LossScale
from lowvram.train.muon_stacks import on_device
from lowvram.train.optim import LeanOptimizer

# Elements of a gradient whose norm a processor takes at once.
_NORM_PART = 2**16


class StepStats(NamedTuple):
    """stats: [mean loss, gradient norm, number of weights whose gradient is not finite], fp32 on the device.

    From `gradients`, the third value is 0, or 1 where loss or norm is not finite.  loads: [MoE layers, E] or None.
    """

    stats: Tensor
    loads: Tensor | None


# Runs forward and backward for a micro-batch, with its loss multiplied by the factor.
Add = Callable[[Batch, Tensor | float], Loss]


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
    loss_scale: Tensor | float = 1.0,
    seed: int = 0,
    add: Add | None = None,
) -> StepStats:
    """Accumulate the gradients of the mean loss over all micro-batches in `.grad`, times loss_scale, and measure them.

    The parameters are those of `sum_gradients`.
    """
    sums = sum_gradients(model, loss_of, micro_batches, targets, loss_scale, seed, add)
    return measure(model, sums, targets, loss_scale)


def sum_gradients(
    model: Transformer,
    loss_of: Callable[[Batch], Loss],
    micro_batches: Iterable[Batch],
    targets: int,
    loss_scale: Tensor | float = 1.0,
    seed: int = 0,
    add: Add | None = None,
) -> Loss:
    """Accumulate the gradients of the mean loss in `.grad`, times loss_scale; returns the sums of losses and loads.

    targets: the number of predicted tokens in the whole step, by which every micro-batch's sum is divided.  seed:
    together with a micro-batch's first sample it decides how the sums of bf16 gradients are rounded.  add: replaces
    `add_gradients`, with the same loss and seed.
    """
    add = add or functools.partial(add_gradients, model, loss_of, seed)
    if model.kept_casts is not None:
        model.kept_casts.refresh()
    total: Tensor | None = None
    loads: Tensor | None = None
    for batch in micro_batches:
        loss = add(batch, loss_scale / targets)
        total = loss.total if total is None else total + loss.total
        if loss.loads is not None:
            loads = loss.loads if loads is None else loads + loss.loads
    assert total is not None, "a step has at least one micro-batch"
    return Loss(total, loads)


@torch.no_grad()
def measure(model: Transformer, sums: Loss, targets: int, loss_scale: Tensor | float = 1.0) -> StepStats:
    """Return the mean loss and the norm of the gradients in `.grad`, which are times loss_scale."""
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    norm = total_norm(grads)
    if isinstance(loss_scale, Tensor) or loss_scale != 1.0:
        norm = norm / loss_scale
    mean = sums.total / targets
    return StepStats(torch.stack([mean, norm, (~(mean + norm).isfinite()).float()]), sums.loads)


def add_gradients(
    model: Transformer, loss_of: Callable[[Batch], Loss], seed: int, batch: Batch, factor: float | Tensor
) -> Loss:
    """Add the gradients of one micro-batch's summed loss, times factor, to `.grad`; returns the loss and the loads."""
    with model.kept_casts.in_use() if model.kept_casts is not None else nullcontext():
        loss = loss_of(batch)
        with _adding_rounded(model, seed, batch.sample_B[0]), adding_to_grads():
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
    # Few launches on a card, whatever the number of weights; torch's get_total_norm would round norms of bf16 to bf16.
    if tensors and card_of(tensors[0].device).platform == "cpu":
        # torch's norm copies 16 bits to fp32 whole; parts of such copies stay in the processor's cache.
        tensors = [part for tensor in tensors for part in tensor.reshape(-1).split(_NORM_PART)]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, torch.float32)))


@torch.no_grad()
def update(
    model: Transformer,
    optimizer: LeanOptimizer,
    loads: Tensor | None,
    learning_rate: Tensor | float,
    gradient_scale: Tensor | float,
    skip: Tensor | None = None,
) -> None:
    """Update the weights with scaled gradients (clipping and loss scaling in one factor) and the balancing biases.

    learning_rate, gradient_scale: numbers, or fp32 scalars on the device; both are computed with in fp32 everywhere.
    skip: an fp32 scalar on the device; where it is 1, nothing changes.  The gradients are dropped.
    """
    device = model.embedding.device
    optimizer.gradient_scale = on_device(gradient_scale, device)
    optimizer.found_inf = skip
    optimizer.set_rate(learning_rate)
    try:
        optimizer.step()
    finally:
        optimizer.found_inf, optimizer.gradient_scale = None, 1.0
    if loads is not None and skip is not None:
        loads = loads * (1.0 - skip)  # equal loads leave the biases as they are
    _balance(model, loads)
    discard(optimizer)


@torch.no_grad()
def clip_and_update(
    model: Transformer,
    optimizer: LeanOptimizer,
    result: StepStats,
    learning_rate: Tensor | float,
    clip: float,
    loss_scale: LossScale | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    """Update by gradients of at most the norm `clip`; where they are not finite, change nothing but the loss scale.

    limit: an fp32 scalar on the device; where the loss is above it, nothing changes either.  Returns a scalar, 1 where
    no weight changed.
    """
    loss, norm, is_broken = result.stats.unbind()
    skip = is_broken if limit is None else torch.maximum(is_broken, (loss > limit).float())
    factor = (clip / (norm + 1e-6)).clamp(max=1.0)
    if loss_scale is not None:
        factor = factor / loss_scale.value
    update(model, optimizer, result.loads, learning_rate, factor, skip)
    if loss_scale is not None:
        loss_scale.count_(is_broken)
    return skip


def finish(
    model: Transformer,
    optimizer: LeanOptimizer,
    sums: Loss,
    learning_rate: Tensor | float,
    targets: int,
    clip: float,
    loss_scale: LossScale | None = None,
    limit: Tensor | None = None,
) -> Tensor:
    """Measure, clip and update; returns [mean loss, gradient norm, 1 where nothing changed], fp32.

    sums: what `sum_gradients` returned.  limit: see `clip_and_update`.  The host reads nothing here, and every number
    that changes from step to step is a tensor (also the rate, where the caller gives one), so that a CUDA graph of it
    can be recorded.
    """
    result = measure(model, sums, targets, 1.0 if loss_scale is None else loss_scale.value)
    skip = clip_and_update(model, optimizer, result, learning_rate, clip, loss_scale, limit)
    return result.stats if limit is None else torch.stack([*result.stats[:2].unbind(), skip])


def learn_in_backward(
    model: Transformer,
    loss_of: Callable[[Batch], Loss],
    batch: Batch,
    optimizer: LeanOptimizer,
    targets: int,
    learning_rate: Tensor | float,
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
        balance([layer.router for layer in model.moe_layers()], loads)


def discard(optimizer: torch.optim.Optimizer) -> None:
    """Drop the gradients, after an update or instead of one."""
    optimizer.zero_grad(set_to_none=True)
