"""Captures the passes of a micro-batch, and the update, as CUDA graphs and replays them; knows no loop.

A step of a small model launches thousands of kernels, and each launch costs the host more time than the card.  A graph
runs the same kernels on the same addresses, so its results are the same.  Its activations keep their memory between
steps, and nothing else can use that memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, Loss
from lowvram.train.oom import is_out_of_memory
from lowvram.train.optim import LeanOptimizer

_WARM_UPS = 2
# A sample may need this much more than validation; it cannot use the memory of a CUDA graph.
SPARE_BYTES = 128 * 2**20
Result = TypeVar("Result")


class CapturedPass:
    """Computes the gradients of micro-batches of one shape from CUDA graphs, in place of `step.add_gradients`.

    add: runs forward and backward for a micro-batch, with its loss times a factor on the device; it must not read
    anything back.  batch: an example of the shape; its values do not matter.  accumulates: whether a step has several
    micro-batches; the first one creates `.grad`, the others add to it, and each of the two is a graph of its own.
    `.grad` is dropped.  pool: the graphs' memory.
    Raises torch's errors where memory runs out or something cannot be captured.
    """

    def __init__(
        self, model: Transformer, add: Callable[[Batch, Tensor], Loss], batch: Batch, accumulates: bool
    ) -> None:
        self._weights = list(model.parameters())
        self._batch = Batch(batch.token_BT.clone(), batch.sample_B.clone())
        self._factor = torch.ones((), device=batch.token_BT.device)

        def run() -> Loss:
            return add(self._batch, self._factor)

        self._drop_gradients()
        _warm_up(run)
        self._drop_gradients()
        self._replay_first, self._first_loss, self.pool = _capture(run, None)
        self._gradients = [weight.grad for weight in self._weights]
        self._replay_next, self._next_loss = self._replay_first, self._first_loss
        if accumulates:
            self._replay_next, self._next_loss, _ = _capture(run, self.pool)
        self._drop_gradients()

    def add(self, batch: Batch, factor: Tensor | float) -> Loss:
        """Do what `step.add_gradients` does; the batch must have the captured shapes."""
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given)
        _write(self._factor, factor)
        is_first = all(weight.grad is None for weight in self._weights)
        if is_first:
            replay, loss = self._replay_first, self._first_loss
        else:
            replay, loss = self._replay_next, self._next_loss
        replay()
        if is_first:
            self.put_gradients()
        return Loss(loss.total.clone(), None if loss.loads is None else loss.loads.clone())

    def put_gradients(self) -> None:
        """Let each weight's `.grad` be what the graphs write."""
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient

    def _drop_gradients(self) -> None:
        for weight in self._weights:
            weight.grad = None


# Measures, clips and updates, from the sums of a step's losses and its learning rate; returns the step's numbers.
Finish = Callable[[Loss, Tensor | float], Tensor]


class UpdateRecorder:
    """Runs `step.finish`: first launched, then, where gradients come from a `CapturedPass`, from a CUDA graph.

    The launched step makes the optimizer's states, compiles kernels and shows where the gradients lie.  Recording
    executes nothing, so one that fails costs nothing: the step is launched, as all later ones are.
    problem: why the update cannot be recorded; None until that is known.  is_recorded: a graph of it is in use.
    """

    def __init__(self, optimizer: LeanOptimizer) -> None:
        self._optimizer = optimizer
        self._has_run = False
        self._graph: _UpdateGraph | None = None
        self.problem: str | None = optimizer.unrecorded
        self._has_told = False

    def news(self) -> bool:
        """Say whether it is known since the last call that updates are recorded, or that they cannot be."""
        is_known = self.is_recorded or self.problem is not None
        told, self._has_told = self._has_told, self._has_told or is_known
        return is_known and not told

    @property
    def is_recorded(self) -> bool:
        """Say whether updates are replayed from a graph."""
        return self._graph is not None

    def forget(self) -> None:
        """Drop the graph, whose constants hold no longer or whose memory is needed; the next step records it anew."""
        self._graph = None

    def give_up(self) -> None:
        """Drop the graph for good, with that of the passes."""
        self._graph, self._has_run = None, False

    def run(self, finish: Finish, sums: Loss, learning_rate: float, passes: CapturedPass | None) -> Tensor:
        """Finish a step whose gradients are in `.grad`, and return its numbers."""
        if self._graph is None and passes is not None and self._has_run and self.problem is None:
            self._record(finish, sums, passes)
        if self._graph is not None:
            return self._graph.replay(sums, learning_rate)
        self._has_run = True
        return finish(sums, learning_rate)

    def _record(self, finish: Finish, sums: Loss, passes: CapturedPass) -> None:
        if self._optimizer.is_on_host:
            self.problem = "the optimizer's states are in host memory."
            return
        try:
            self._graph = _UpdateGraph(finish, sums, passes, self._optimizer)
        except RuntimeError as error:
            self.problem = "memory ran out." if is_out_of_memory(error) else f"{str(error).strip().splitlines()[0]}."
            passes.put_gradients()  # the update drops each as it comes to it


class _UpdateGraph:
    """A graph of `step.finish`, its inputs, and what it reads that no one else may keep."""

    def __init__(self, finish: Finish, sums: Loss, passes: CapturedPass, optimizer: LeanOptimizer) -> None:
        self._sums = Loss(sums.total.clone(), None if sums.loads is None else sums.loads.clone())
        self._rate = torch.zeros((), device=sums.total.device)
        self._optimizer = optimizer
        self._replay, self._stats = _record_update(lambda: finish(self._sums, self._rate), passes.pool)
        self._tables = list(optimizer.tables)

    def replay(self, sums: Loss, learning_rate: float) -> Tensor:
        """Return the step's numbers, in memory that no later replay writes."""
        self._sums.total.copy_(sums.total)
        if self._sums.loads is not None and sums.loads is not None:
            self._sums.loads.copy_(sums.loads)
        self._rate.fill_(learning_rate)
        self._replay()
        self._optimizer.zero_grad(set_to_none=True)
        return self._stats.clone()


def _write(scalar: Tensor, value: Tensor | float) -> None:
    """Write a number, or a scalar on the device, into a scalar there."""
    if isinstance(value, Tensor):
        scalar.copy_(value)
    else:
        scalar.fill_(value)


def _record_update(run: Callable[[], Tensor], pool: torch.cuda._POOL_HANDLE) -> tuple[Callable[[], None], Tensor]:
    """Return the function that replays `run`, and the tensor that it writes."""
    replay, stats, _ = _capture(run, pool)
    return replay, stats


def _warm_up(run: Callable[[], Loss]) -> None:
    """Run the initialisation of libraries and Triton's compilation, on a side stream as capturing requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)


def _capture(
    run: Callable[[], Result], pool: torch.cuda._POOL_HANDLE | None
) -> tuple[Callable[[], None], Result, torch.cuda._POOL_HANDLE]:
    """Return the function that replays `run`, what it writes, and the graph's memory pool."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run()
    return graph.replay, result, graph.pool()
