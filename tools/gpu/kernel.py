"""Defines a case of the GPU report, checks it and times it; knows no particular kernel and no file."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lowvram_kernels.dispatch import Card, override_card
from torch import Tensor
from torch.utils._pytree import tree_map

from tools.gpu.timing import Timing, count_sets, distance, time_runs

Inputs = tuple[Any, ...]
Row = dict[str, Any]
# Errors of a case that are no fault of this tool: a launch that the card refuses, a library that does not support these
# shapes or has no such function.  The worker adds Triton's own errors if Triton is installed.
Refusal = (RuntimeError, ValueError, TypeError, AttributeError)
_PLAIN = Card("cpu")


class Scene(NamedTuple):
    """The device on which cases run.  is_tiny: smallest shapes, to see that every case runs.  dtype: of 16 bits."""

    device: torch.device
    is_tiny: bool
    dtype: torch.dtype

    @property
    def is_card(self) -> bool:
        """Say whether this is a CUDA card, on which other libraries' kernels run too."""
        return self.device.type == "cuda"

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normally distributed numbers, by default of the 16-bit dtype."""
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)


class Rival(NamedTuple):
    """Another library's kernel for the same work."""

    name: str
    inputs: Callable[[], Inputs]
    run: Callable[..., Any]


class Aim(NamedTuple):
    """What a figure should reach on an H200.

    of: "copy" (a share of the copy's bandwidth), a rival's name (its seconds divided by ours) or "tokens_per_second".
    """

    of: str
    least: float


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One op at one shape.

    inputs: makes a new set of inputs.  error: runs the op once on such a set and returns the distance from the expected
    result, which must not exceed tolerance.  moved_bytes: the least that must be read and written.  numbers: the format
    whose product rate bounds operations: "bf16", "fp8" or "int8".  rank: 0 comes first.
    """

    op: str
    shape: str
    inputs: Callable[[], Inputs]
    run: Callable[..., Any]
    error: Callable[..., float]
    tolerance: float
    moved_bytes: float
    operations: float = 0.0
    numbers: str = "bf16"
    rivals: tuple[Rival, ...] = ()
    aims: tuple[Aim, ...] = ()
    rank: int = 1

    @property
    def name(self) -> str:
        """Return op and shape, which --only searches."""
        return f"{self.op} {self.shape}"

    def measure(self, scene: Scene) -> Row:
        """Check the kernel, then time it and its rivals; a kernel with a wrong result is not timed."""
        torch.manual_seed(0)
        error = self.error(*self.inputs())
        row: Row = {
            "kind": "kernel",
            "error": error,
            "tolerance": self.tolerance,
            "moved_bytes": self.moved_bytes,
            "operations": self.operations,
            "numbers": self.numbers,
            "aims": [] if scene.is_tiny else [aim._asdict() for aim in self.aims],
        }
        if not error <= self.tolerance:
            return row | {"status": "wrong", "note": "not timed, because its result is not the reference's"}
        row |= self._time(self.inputs, self.run, scene)._asdict()
        row["rivals"] = [self._time_rival(rival, scene) for rival in self.rivals]
        return row | {"status": "ok"}

    def _time(self, inputs: Callable[[], Inputs], run: Callable[..., Any], scene: Scene) -> Timing:
        sets = [inputs() for _ in range(count_sets(self.moved_bytes, scene.device))]
        return time_runs([functools.partial(run, *values) for values in sets], scene.device)

    def _time_rival(self, rival: Rival, scene: Scene) -> Row:
        try:
            return {"name": rival.name, **self._time(rival.inputs, rival.run, scene)._asdict()}
        except Refusal as error:
            if is_lost(scene):
                raise
            return {"name": rival.name, "note": first_line(error)}


def is_lost(scene: Scene) -> bool:
    """Say whether this process can no longer use its card, as after an illegal access; only a new process can."""
    if not scene.is_card:
        return False
    try:
        torch.cuda.synchronize(scene.device)
    except RuntimeError:
        return True
    return False


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def bytes_of(*tensors: Tensor | None) -> float:
    """Return the bytes of tensors."""
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None))


def plainly(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs an op in its plain PyTorch form, on any device."""

    def plain(*inputs: Any) -> Any:
        with override_card(_PLAIN):
            return run(*inputs)

    return plain


def error_of(run: Callable[..., Tensor], truth: Callable[..., Tensor]) -> Callable[..., float]:
    """Return a function that measures the distance between run's result and truth's for the same inputs."""

    def error(*inputs: Any) -> float:
        return distance(run(*inputs), truth(*inputs))

    return error


def change_error(run: Callable[..., Any], changed: Callable[..., list[Tensor]]) -> Callable[..., float]:
    """Return a function that compares an in-place op with its plain form: the largest distance of changed tensors."""

    def error(*inputs: Any) -> float:
        copies = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, inputs)
        run(*inputs)
        plainly(run)(*copies)
        return max(distance(a, b) for a, b in zip(changed(*inputs), changed(*copies), strict=True))

    return error
