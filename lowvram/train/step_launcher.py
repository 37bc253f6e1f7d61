"""Makes the parts of a run's step, each from its CUDA graph where one was recorded; knows no events, no checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowvram.config.plan import Plan
from lowvram.config.run import RunConfig
from lowvram.data.loader import Loader
from lowvram.objective import Batch, Loss
from lowvram.train.compilation import compiled
from lowvram.train.cuda_graph import CapturedPass, UpdateRecorder
from lowvram.train.late_read import on_its_way
from lowvram.train.loss_scale import LossScale
from lowvram.train.state import TrainState
from lowvram.train.step import StepStats, add_gradients, finish, loss_for, measure, sum_gradients


@dataclass
class StepLauncher:
    """The gradients of the next step, and the update by them; the host reads nothing of either.

    captured_pass: the graphs of a micro-batch's passes, None where they are launched.  recorder: of the update.
    loss_scale: that of an fp16 run, on the device.  spike_limit: the loss above which a step is skipped, a scalar on
    the device; None where spikes are learnt from.  micro_batches_begun: those of the step in progress; other threads
    may read it at any time.
    """

    config: RunConfig
    plan: Plan
    state: TrainState
    loader: Loader
    captured_pass: CapturedPass | None = field(default=None, init=False)
    loss_scale: LossScale | None = field(default=None, init=False)
    spike_limit: Tensor | None = field(default=None, init=False)
    micro_batches_begun: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.recorder = UpdateRecorder(self.state.optimizer)
        if self.config.train.precision == "fp16" and not self.config.train.update_during_backward:
            self.loss_scale = LossScale(self.state.model.embedding.device)
        if self.config.train.skip_spikes:
            self.spike_limit = torch.full((), torch.inf, device=self.state.model.embedding.device)

    def write_loss_scale(self) -> None:
        """Write the state's loss scale to the device, after it was set or restored."""
        if self.loss_scale is not None:
            self.loss_scale.set_(self.state.loss_scale, self.state.quiet)

    def drop_graphs(self) -> None:
        """Give up the recorded passes and the recorded update; what follows is launched."""
        self.captured_pass = None
        self.recorder.give_up()

    def finish(self, sums: Loss, rate: float, limit: float = torch.inf) -> Tensor:
        """Clip the gradients that belong to sums, update by them, and return the step's numbers on the device.

        limit: the loss above which the step is a spike, which is skipped where the run is to skip them.
        """
        train = self.config.train
        if self.spike_limit is not None:
            self.spike_limit.fill_(limit)
        run = functools.partial(
            finish,
            self.state.model,
            self.state.optimizer,
            targets=train.batch_samples * train.seq_len,
            clip=train.clip,
            loss_scale=self.loss_scale,
            limit=self.spike_limit,
        )
        return self.recorder.run(run, sums, rate, self.captured_pass)

    def accumulate(self, numbers: Sequence[int] | None = None) -> StepStats:
        """Put the gradients of the next step into `.grad`, or only those of the micro-batches with these numbers."""
        numbers = range(self.plan.accumulate) if numbers is None else numbers
        return measure(self.state.model, self.sum_gradients(numbers), *self._targets_and_scale(len(numbers)))

    def _targets_and_scale(self, micro_batches: int) -> tuple[int, Tensor | float]:
        targets = micro_batches * self.plan.micro_batch * self.config.train.seq_len
        return targets, 1.0 if self.loss_scale is None else self.loss_scale.value

    def sum_gradients(self, numbers: Sequence[int]) -> Loss:
        """Put the gradients of micro-batches with these numbers into `.grad`; returns the sums of losses and loads."""
        state, seed = self.state, self.config.train.seed
        loss_of = loss_for(state.model, self.config.train, self.plan)
        batches, (targets, scale) = self.micro_batches(numbers), self._targets_and_scale(len(numbers))
        add = self.captured_pass.add if self.captured_pass is not None else None
        with compiled(state.model) if self.plan.compile and add is None else nullcontext():
            return sum_gradients(state.model, loss_of, self._count(batches), targets, scale, seed, add)

    def _count(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        for self.micro_batches_begun, batch in enumerate(batches, 1):
            yield batch

    def capture(self) -> None:
        """Capture a micro-batch's passes as a CUDA graph and use it from now on; only `.grad` is changed (dropped)."""
        state, train = self.state, self.config.train
        self.drop_graphs()
        (batch,) = self.micro_batches([0])
        add = functools.partial(add_gradients, state.model, loss_for(state.model, train, self.plan), train.seed)
        with compiled(state.model) if self.plan.compile else nullcontext():
            self.captured_pass = CapturedPass(state.model, add, batch, self.plan.accumulate > 1)

    def micro_batches(self, numbers: Sequence[int]) -> list[Batch]:
        """Return the next step's micro-batches with these numbers."""
        device = self.state.model.embedding.device
        first, count = self.state.step * self.config.train.batch_samples, self.plan.micro_batch
        starts = [first + number * count for number in numbers]
        return [
            Batch(
                on_its_way(self.loader.batch(start, count), device),
                torch.arange(start, start + count, device=device),
            )
            for start in starts
        ]
