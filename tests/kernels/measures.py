"""What a test of an op measures: bytes kept for backward, bytes alive at the peak, distance from the truth."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth, or the norm itself where the truth is zero."""
    truth = truth.detach().double()
    return float((got.detach().double() - truth).norm() / (truth.norm() or 1.0))


def saved_bytes(run: Callable[[], Tensor], parameters: Sequence[Tensor]) -> int:
    """Count the bytes that run() keeps for backward, each storage once, without the caller's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(kept.values())


def hidden_bytes(run: Callable[[], object]) -> int:
    """Count the most bytes that torch's CPU allocator had given out at once in run(), its kernels' own included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


class LiveBytes(TorchDispatchMode):
    """Count the storage born inside the mode: `now`, `peak`, and the `largest` single one."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> LiveBytes:
        super().__enter__()
        return self

    def ignore(self, *tensors: Tensor) -> LiveBytes:
        """Leave out what existed before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._seen[storage._cdata] = weakref.ref(storage)
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return

        def died(_: object) -> None:
            del self._seen[address]
            self.now -= size

        self._seen[address] = weakref.ref(storage, died)
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)


def take_workspaces() -> int:
    """Let cuBLAS take its workspaces, which the profile counts and no ledger; returns the bytes that are held now."""
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (x @ x).sum().backward()
    del x
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())
