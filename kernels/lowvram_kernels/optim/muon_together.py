"""A step of Muon for several weights of one shape on a card: one launch, one iteration for all, and one launch.

Results differ from `muon_` of each weight by how the library multiplies a batch.  Alive inside a step: the 2 bytes of u
for each element beside the gradients, then 6 bytes for each element without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowvram_kernels.dispatch import is_simulated
from lowvram_kernels.optim.adamw8 import CodeMap
from lowvram_kernels.optim.muon import Momentum, check, dtype_of_products, orthogonalise, size_of
from lowvram_kernels.optim.muon_launch import lead_many, move_many
from lowvram_kernels.random.counter_rng import chain_numbers

# Elements of the weights that step together, where nothing else is known: fewer launches for more memory.
TOGETHER = 3 * 2**22
# More elements than this fill no card better.
MOST_TOGETHER = 3 * 2**25
# Bytes that are alive for each element while matrices are orthogonalised.
_ALIVE_BYTES = 6
# Offsets that are all multiples of this many elements let a kernel read 16 bytes at once.
_ALIGNED = 16


class MuonPart(NamedTuple):
    """A weight that steps with others of its shape: see `muon_` for the fields."""

    weight: Tensor
    momentum: Momentum
    step: Tensor
    purpose: int


def elements_together(freed_bytes: int, gradient_bytes: int) -> int:
    """Return how many elements may step together where gradients of so many bytes are gone already.

    Their memory is then free, and so is that of the stepping weights' own gradients, gradient_bytes an element.
    """
    room = freed_bytes // max(2, _ALIVE_BYTES - gradient_bytes)
    return min(MOST_TOGETHER, max(TOGETHER, room))


def offsets_of(parts: Sequence[MuonPart], gradients: Sequence[Tensor], seed: int) -> tuple[tuple[int, ...], ...] | None:
    """Return where the parts' tensors lie, as `muon_launch` says; None where a kernel cannot find them by it.

    The numbers change where the allocator puts a gradient elsewhere, and a graph that was recorded keeps reading them.
    """
    fields = [
        list(gradients),
        [part.momentum.code for part in parts],
        [part.momentum.absmax for part in parts],
        [part.weight for part in parts],
    ]
    rows = [_distances(tensors) for tensors in fields]
    if any(row is None or any(number % _ALIGNED for number in row) for row in rows):
        return None
    steps = _distances([part.step for part in parts])
    if steps is None:
        return None
    named = tuple(chain_numbers(seed, part.purpose) for part in parts)
    return (*(row for row in rows if row is not None), steps, named)


def _distances(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Return how many elements each tensor lies behind the first one; None where these are no whole numbers."""
    if is_simulated() or not tensors[0].numel():
        return (0,) * len(tensors)
    size, first = tensors[0].element_size(), tensors[0].data_ptr()
    distances = [tensor.data_ptr() - first for tensor in tensors]
    return None if any(bytes_ % size for bytes_ in distances) else tuple(bytes_ // size for bytes_ in distances)


def to_device(offsets: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return the offsets on a device, int64 [6, P]; the host does not wait for the copy."""
    if device.type != "cuda":
        return torch.tensor(offsets, dtype=torch.int64, device=device)
    return torch.tensor(offsets, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


@torch.no_grad()
def muon_together_(
    parts: Sequence[MuonPart],
    gradients: list[Tensor],
    offsets: Tensor,
    codes: CodeMap,
    learning_rate: Tensor | float,
    rows: int | None = None,
    beta: float = 0.95,
    decay: float = 0.0,
    steps: int = 5,
    gradient_scale: Tensor | float = 1.0,
    skip: Tensor | None = None,
) -> None:
    """Make a step of weights of one shape and dtype on a card: `muon_` of each, with one iteration for many matrices.

    gradients: one for each part, all of one dtype; the list is emptied when they have been read, so that their memory
    is free for the iteration.  offsets: `to_device(offsets_of(parts, gradients, seed))`.  The other arguments are those
    of `muon_`.
    Raises ShapeError as `muon_` does.
    """
    sizes = {check(p.weight, gradient, p.momentum, rows) for p, gradient in zip(parts, gradients, strict=True)}
    assert len(sizes) == 1, "weights of one shape step together"
    ((rows, count, columns),) = sizes
    first, device = parts[0], parts[0].weight.device
    u_N = torch.empty(len(parts) * rows * count * columns, dtype=torch.bfloat16, device=device)
    firsts = (gradients[0], first.momentum.code, first.momentum.absmax)
    lead_many(firsts, u_N, codes.value, codes.midpoint, offsets, gradient_scale, skip, beta)
    del firsts
    gradients.clear()
    u_BMN = u_N.view(-1, rows, columns)
    del u_N
    o_N = orthogonalise(u_BMN, steps, dtype_of_products(device)).reshape(-1)
    move_many((first.weight, first.step), o_N, offsets, learning_rate, size_of(rows, columns), decay, skip)
