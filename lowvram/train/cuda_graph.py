"""One micro-batch's passes as a CUDA graph: recorded once, then played again without the host; knows no loop.

A step of a small model is some thousand launches, each of which costs the host more than the card.  A recording has
the same kernels on the same addresses, so what it computes is the same; its activations keep their memory between
steps, which then nothing else can use.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowvram.model.transformer import Transformer
from lowvram.objective import Batch, Loss

_WARM_UPS = 2


class RecordedPass:
    """The gradients of micro-batches of one shape, in place of `step.add_gradients`.

    add: passes a micro-batch through the model, its loss times a factor on the device.  It must not read anything back.
    batch: one of the shape, whose numbers do not matter.  accumulates: whether a step has several micro-batches; the
    first one makes `.grad`, the others add to it, and each of both is a recording.  `.grad` is dropped.
    Raises what torch raises where memory runs out or something cannot be recorded.
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
        self._play_first, self._first, pool = _record(run, None)
        self._gradients = [weight.grad for weight in self._weights]
        self._play_next, self._next = self._play_first, self._first
        if accumulates:
            self._play_next, self._next, _ = _record(run, pool)
        self._drop_gradients()

    def add(self, batch: Batch, factor: float) -> Loss:
        """Do what `step.add_gradients` does; the shapes of the batch are those of the recording."""
        for own, given in zip(self._batch, batch, strict=True):
            own.copy_(given)
        self._factor.fill_(factor)
        is_first = all(weight.grad is None for weight in self._weights)
        play, loss = (self._play_first, self._first) if is_first else (self._play_next, self._next)
        play()
        if is_first:
            for weight, gradient in zip(self._weights, self._gradients, strict=True):
                weight.grad = gradient
        return Loss(loss.total.clone(), None if loss.loads is None else loss.loads.clone())

    def _drop_gradients(self) -> None:
        for weight in self._weights:
            weight.grad = None


def _warm_up(run: Callable[[], Loss]) -> None:
    """Let libraries and Triton do what they do once, on a stream of its own as recording wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)


def _record(run: Callable[[], Loss], pool: tuple[int, int] | None) -> tuple[Callable[[], None], Loss, tuple[int, int]]:
    """Return what plays it again, the loss that this writes, and the memory that it lives in."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        loss = run()
    return graph.replay, loss, graph.pool()
