"""Captures the passes of one micro-batch as a CUDA graph and replays them without the host; knows no loop.

A step of a small model launches thousands of kernels, and each launch costs the host more time than the card.  A graph
runs the same kernels on the same addresses, so its results are the same.  Its activations keep their memory between
steps, and nothing else can use that memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, Loss

_WARM_UPS = 2


class CapturedPass:
    """Computes the gradients of micro-batches of one shape from CUDA graphs, in place of `step.add_gradients`.

    add: runs forward and backward for a micro-batch, with its loss times a factor on the device; it must not read
    anything back.  batch: an example of the shape; its values do not matter.  accumulates: whether a step has several
    micro-batches; the first one creates `.grad`, the others add to it, and each of the two is a graph of its own.
    `.grad` is dropped.
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
        self._replay_first, self._first_loss, pool = _capture(run, None)
        self._gradients = [weight.grad for weight in self._weights]
        self._replay_next, self._next_loss = self._replay_first, self._first_loss
        if accumulates:
            self._replay_next, self._next_loss, _ = _capture(run, pool)
        self._drop_gradients()

    def add(self, batch: Batch, factor: float) -> Loss:
        """Do what `step.add_gradients` does; the batch must have the captured shapes."""
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given)
        self._factor.fill_(factor)
        is_first = all(weight.grad is None for weight in self._weights)
        if is_first:
            replay, loss = self._replay_first, self._first_loss
        else:
            replay, loss = self._replay_next, self._next_loss
        replay()
        if is_first:
            for weight, gradient in zip(self._weights, self._gradients, strict=True):
                weight.grad = gradient
        return Loss(loss.total.clone(), None if loss.loads is None else loss.loads.clone())

    def _drop_gradients(self) -> None:
        for weight in self._weights:
            weight.grad = None


def _warm_up(run: Callable[[], Loss]) -> None:
    """Run the initialisation of libraries and Triton's compilation, on a side stream as capturing requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)


def _capture(
    run: Callable[[], Loss], pool: torch.cuda._POOL_HANDLE | None
) -> tuple[Callable[[], None], Loss, torch.cuda._POOL_HANDLE]:
    """Return the function that replays `run`, the loss that it writes, and the graph's memory pool."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        loss = run()
    return graph.replay, loss, graph.pool()
