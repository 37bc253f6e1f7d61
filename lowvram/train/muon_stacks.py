"""Which of Muon's weights step together on a card, and the tables by which kernels find them; knows no optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from lowvram_kernels.optim.muon_together import MuonPart, elements_together, offsets_of, to_device
from torch import Tensor


def by_kind(weights: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return the weights that may step together: of one shape and dtype, with gradients of one dtype."""
    kinds: dict[tuple[object, ...], list[Tensor]] = {}
    for weight in weights:
        dtype = weight.grad.dtype if weight.grad is not None else None
        kinds.setdefault((weight.shape, weight.dtype, weight.device, dtype), []).append(weight)
    return list(kinds.values())


def count_at_once(alike: Sequence[Tensor], freed_bytes: int) -> int:
    """Return how many of the weights, all of one kind, to take now.  freed_bytes: of gradients that are gone."""
    grad = alike[0].grad
    assert grad is not None, "only weights with gradients are updated"
    return max(1, elements_together(freed_bytes, grad.element_size()) // alike[0].numel())


class OffsetTables:
    """Keeps the tables of offsets of a step's stacks on the device; a table is made anew where a tensor has moved."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[tuple[tuple[int, ...], ...], Tensor]] = {}
        self._number = 0

    def begin(self) -> None:
        """Begin a step: its first stack comes next."""
        self._number = 0

    def table_of(self, parts: Sequence[MuonPart], gradients: Sequence[Tensor], seed: int) -> Tensor | None:
        """Return the table of the step's next stack, None where each of its weights must step alone."""
        offsets, number = offsets_of(parts, gradients, seed), self._number
        self._number += 1
        if offsets is None:
            return None
        kept = self._tables.get(number)
        # The numbers are relative to the first weight's tensors, whose addresses are arguments of the kernels.
        if kept is None or kept[0] != offsets or kept[1].device != parts[0].weight.device:
            kept = self._tables[number] = (offsets, to_device(offsets, parts[0].weight.device))
        return kept[1]

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the tables that were used last; a recorded graph reads them as long as it exists."""
        yield from (table for _, table in self._tables.values())


def on_device(value: Tensor | float, device: torch.device) -> Tensor:
    """Return a number as an fp32 scalar on the device; the host does not wait for it."""
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=device)
