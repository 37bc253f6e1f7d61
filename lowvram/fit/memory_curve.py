"""What rehearsals found, and what lies between them; plain numbers, never imports torch.

The peak of a step is the greatest of many moments, each affine in the micro-batch: so it is convex in it, and a
straight line between two rehearsals promises no room that is not there.  The chunks of the loss interrupt that: from
the second one on gradients add up in fp32, and chunks are equal, so that odd lengths err by a part of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lowvram.config.plan import LEDGER_LINES, Ledger, Offload, Plan, Recompute

# The most rows of one chunk of the loss (lowvram_kernels/loss/linear_cross_entropy.py).
_ONE_CHUNK_TOKENS = 1_024
# Somewhere near these another moment becomes the peak: rehearsals there keep the lines within some percent.
_MIDDLE_TOKENS = (8_192, 16_384)


_BESIDE_THE_CARD = ("host_bytes", "kept_on_host", "checkpoint_bytes")


class Work(NamedTuple):
    """What a part of the step costs.

    flops: of matrix products.  moved_bytes: read and written by every op, products too: so narrow layers cost more
    for each FLOP.  ops: launches.  attention_flops: of fused attention, which is slower than a product.  host_bytes:
    copied between the card and the computer's memory.  low_flops: of matrix products in 8 bits.
    """

    flops: float
    moved_bytes: float
    ops: float
    attention_flops: float = 0.0
    host_bytes: float = 0.0
    low_flops: float = 0.0


class Rehearsal(NamedTuple):
    """A step on paper.  micro: one micro-batch, forward and backward.  update: the optimizer, once a step."""

    ledger: Ledger
    micro: Work
    update: Work


class MemoryCurve:
    """The rehearsals of one model on one card's path, made when they are asked for and kept.

    rehearse: makes one for a plan.  sizes: the micro-batches that a step can have, in order; the last is all of it.
    seq_len: tokens of each.  offload: what these plans keep in the computer's memory; can_offload: whether others may.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        rehearse: Callable[[Plan], Rehearsal],
        seq_len: int,
        offload: Offload = "none",
        can_offload: bool = True,
    ) -> None:
        self.sizes, self.samples, self._rehearse, self._seq_len = sizes, sizes[-1], rehearse, seq_len
        self.offload: Offload = offload
        self.can_offload = can_offload
        self.found: dict[tuple[Recompute, int], Rehearsal] = {}

    def offloaded(self) -> MemoryCurve:
        """Return the same model's plans with the optimizer's states in the computer's memory."""
        return MemoryCurve(self.sizes, self._rehearse, self._seq_len, "optimizer")

    def exactly(self, recompute: Recompute, micro_batch: int) -> Rehearsal:
        """Return the rehearsal of one plan."""
        key = (recompute, micro_batch)
        if key not in self.found:
            self.found[key] = self._rehearse(self.plan(recompute, micro_batch))
        return self.found[key]

    def has(self, recompute: Recompute, micro_batch: int) -> bool:
        """Say whether a plan's rehearsal is there, so that it is no line."""
        return (recompute, micro_batch) in self.found

    def plan(self, recompute: Recompute, micro_batch: int) -> Plan:
        """Return the plan that makes up a step with so many sequences at a time."""
        accumulate = self.samples // micro_batch
        return Plan(micro_batch=micro_batch, accumulate=accumulate, recompute=recompute, offload=self.offload)

    def at(self, recompute: Recompute, micro_batch: int) -> Rehearsal:
        """Return the rehearsal of a plan, or the straight line between the two nearest anchors."""
        if micro_batch == self.samples or self.has(recompute, micro_batch):
            return self.exactly(recompute, micro_batch)
        anchors = self.anchors()
        below = max(n for n in anchors if n <= micro_batch)
        above = min((n for n in anchors if n >= micro_batch), default=below)
        if below == above:
            return self.exactly(recompute, below)
        share = (micro_batch - below) / (above - below)
        return _between(self.exactly(recompute, below), self.exactly(recompute, above), share)

    def anchors(self) -> list[int]:
        """Return the micro-batches that are rehearsed while gradients accumulate.

        Every one whose loss may be one chunk and the next, two in the middle, and the largest.
        """
        below = [n for n in self.sizes if n < self.samples]
        small = [n for n in below if n * self._seq_len <= _ONE_CHUNK_TOKENS]
        next_ones = [n for n in below if n not in small]
        middle = [n for tokens in _MIDDLE_TOKENS for n in [m for m in below if m * self._seq_len >= tokens][:1]]
        return sorted({*small, *next_ones[:1], *middle, below[-1]}) if below else [self.samples]


def _between(low: Rehearsal, high: Rehearsal, share: float) -> Rehearsal:
    def blend(a: float, b: float) -> float:
        return a + (b - a) * share

    # Lines of two different moments do not mix, their sum does: the larger plan's moment, scaled to the sum.
    peak = blend(low.ledger.peak_bytes, high.ledger.peak_bytes)
    mixed = {name: blend(getattr(low.ledger, name), getattr(high.ledger, name)) for name in LEDGER_LINES}
    scale = peak / max(1.0, sum(mixed.values()))
    lines = {name: round(value * scale) for name, value in mixed.items()}
    micro = Work(*(blend(a, b) for a, b in zip(low.micro, high.micro, strict=True)))
    rest = {name: max(getattr(one.ledger, name) for one in (low, high)) for name in _BESIDE_THE_CARD}
    return Rehearsal(Ledger(**lines, moment=high.ledger.moment, **rest), micro, high.update)
